"""A last block that computes the first token only gives what the whole block gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.backbones import load_backbone
from common.config import Backbone
from common.first_token import keep_first_token

BATCH = {
    "input_ids": torch.tensor([[2, 7, 8, 9, 3], [2, 9, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def small_model(family: str, seed: int) -> Any:
    import transformers

    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(**BATCH).logits, torch.tensor([0, 2])).backward()
    # The unused pooler of some families, and nothing else, has none.
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["Bert", "Electra", "Roberta", "XLMRoberta"])
def test_logits_and_gradients_stay_what_they_are(family: str) -> None:
    model = small_model(family, 0)
    with torch.no_grad():
        before = model(**BATCH).logits
    expected = gradients(model)
    encoder = model.base_model
    tokens: list[int] = []
    encoder.encoder.layer[-1].register_forward_hook(lambda *a: tokens.append(a[2].shape[1]))
    keep_first_token(encoder)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert set(tokens) == {1}  # the short way was taken


def test_a_family_that_reads_other_tokens_is_left_alone() -> None:
    model = small_model("DistilBert", 0)
    with torch.no_grad():
        before = model(**BATCH).logits
        keep_first_token(model.base_model)
        assert torch.equal(model(**BATCH).logits, before)


def test_backbones_are_loaded_so(bert_folder: Path) -> None:
    backbone = load_backbone(Backbone(path=str(bert_folder)), "text", "cpu")
    found = backbone.encoder(**BATCH).last_hidden_state
    assert found.shape[:2] == (2, 1)
