"""GPT-2's Conv1D, whose weight is (in, out): factors and residuals keep (out, in) all the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, save_random
from torch import Tensor

from common.adapters import AdaptedBackbone, export_peft
from common.backbones import load_backbone, load_preprocessor
from common.config import Adapter, Backbone, build_experiment
from common.errors import ConfigError
from common.features import Batch, extract_features
from common.lowrank import adapted_modules, factor_names
from common.residuals import residual_name
from common.tasks import LabelledTask, Split
from common.tensors import Tensors
from server.simulation import simulate

WIDTH = 16
CPU = torch.device("cpu")
ADAPTER = Adapter(rank=4, alpha=6.0)
MakeTask = Callable[..., LabelledTask]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 2 blocks, width 16, whose tokenizer has an end and no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<end>", "<unknown>", *WORDS])}
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("backbones") / "tiny-gpt2"
    save_random(GPT2Model(config), folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(gpt2_folder: Path) -> Backbone:
    return Backbone(path=str(gpt2_folder), max_length=16)


@pytest.fixture
def task(empty_task: MakeTask) -> LabelledTask:
    return empty_task("text")


def adapted(config: Backbone, adapter: Adapter = ADAPTER) -> AdaptedBackbone:
    return AdaptedBackbone(load_backbone(config, "text", "cpu"), adapter)


def batch_of(config: Backbone, *texts: str) -> Batch:
    split = Split([(text,) for text in texts], np.zeros(len(texts), dtype=np.int64))
    rows = extract_features(load_preprocessor(config, "text"), split)
    return rows.batch(torch.arange(len(texts)), CPU)


def logits_of(model: AdaptedBackbone, batch: Batch) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.logits(batch)


def awake(model: AdaptedBackbone, task: LabelledTask) -> dict[str, Tensor]:
    """A state whose every tensor is at work, and a residual at every module."""
    stream = torch.Generator().manual_seed(2)
    start = model.initial((task,), seed=0)
    state = {n: t + 0.3 * torch.randn(t.shape, generator=stream) for n, t in start.items()}
    for module in adapted_modules(start):
        name_B, name_A = factor_names(module)
        size = (state[name_B].shape[0], state[name_A].shape[1])
        state[residual_name(module)] = 0.3 * torch.randn(size, generator=stream)
    return state


def dense_logits(config: Backbone, state: Tensors, batch: Batch) -> Tensor:
    """Logits of transformers' own model with `W + ΔWᵀ` written into its weights (in, out)."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        config.path, num_labels=3, pad_token_id=0
    ).eval()
    with torch.no_grad():
        for module in adapted_modules(state):
            name_B, name_A = factor_names(module)
            delta = ADAPTER.scale(4) * state[name_B].double() @ state[name_A].double()
            if residual_name(module) in state:
                delta = delta + state[residual_name(module)].double()
            weight = model.get_submodule(module).weight
            weight.copy_(weight.double() + delta.T)
        model.score.weight.copy_(state["head.toy.score.weight"])
        return model(**batch.inputs).logits


def test_the_combined_projection_is_adapted_by_default(
    config: Backbone, task: LabelledTask
) -> None:
    shapes = adapted(config).shapes(4, task)
    name_B, name_A = factor_names("transformer.h.0.attn.c_attn")
    assert shapes[name_B] == (3 * WIDTH, 4)
    assert shapes[name_A] == (4, WIDTH)
    assert set(adapted_modules(shapes)) == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}


@pytest.mark.parametrize("targets", [("c_attn",), ("c_fc", "c_proj"), ("c_attn", "c_fc")])
@pytest.mark.parametrize("kept", ["factors", "residuals", "both"])
def test_the_model_is_that_with_the_dense_delta_in_its_weights(
    config: Backbone, task: LabelledTask, targets: tuple[str, ...], kept: str
) -> None:
    model = adapted(config, ADAPTER.model_copy(update={"targets": targets}))
    state = awake(model, task)
    for module in adapted_modules(state):
        if kept == "factors":
            del state[residual_name(module)]
        if kept == "residuals":
            state[factor_names(module)[0]].zero_()
    model.load(state, 4, task)
    batch = batch_of(config, "the film was good", "this book is dull")
    found, expected = logits_of(model, batch), dense_logits(config, state, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in state.items()}
    plain = {n: t for n, t in plain.items() if not n.endswith(".residual.weight")}
    assert float((dense_logits(config, plain, batch) - expected).abs().max()) > 0.1


def test_training_reaches_both_factors(config: Backbone, task: LabelledTask) -> None:
    model = adapted(config)
    model.load(awake(model, task), 4, task)
    model.logits(batch_of(config, "the film was good", "slow")).square().sum().backward()
    for name, parameter in model.parameters().items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_padding_does_not_change_what_a_text_is_classified_as(
    config: Backbone, task: LabelledTask
) -> None:
    """The head reads the last token that is no padding, though the tokenizer names none."""
    model = adapted(config)
    model.load(awake(model, task), 4, task)
    alone = logits_of(model, batch_of(config, "the film was good"))
    padded = logits_of(
        model, batch_of(config, "the film was good", "this book is very very very dull")
    )
    torch.testing.assert_close(padded[:1], alone, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_without_padding_and_end_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, PreTrainedTokenizerFast

    GPT2Config.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="a").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no padding and no end token"):
        load_preprocessor(Backbone(path=str(tmp_path), max_length=16), "text")


@pytest.mark.parametrize("merged", [False, True])
def test_peft_gives_the_same_logits_from_the_exported_folder(
    config: Backbone, task: LabelledTask, tmp_path: Path, merged: bool
) -> None:
    """Also with the factors merged into the weights, where a wrong layout would show."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = adapted(config)
    state = {n: t for n, t in awake(model, task).items() if not n.endswith(".residual.weight")}
    model.load(state, 4, task)
    export_peft(state, config, ADAPTER, task, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        config.path, num_labels=3, pad_token_id=0
    )
    theirs: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    if merged:
        theirs = theirs.merge_and_unload()
    batch = batch_of(config, "the film was good", "this book is dull")
    with torch.no_grad():
        logits = theirs(**batch.inputs).logits
    torch.testing.assert_close(logits, logits_of(model, batch), rtol=1e-5, atol=1e-5)


def test_a_federation_runs_on_gpt2(gpt2_folder: Path, tmp_path: Path) -> None:
    """From a folder of texts of unequal lengths to scores, with a method that sends residuals."""
    for split, count in {"train": 48, "test": 16}.items():
        lines = [
            f"{'the film was ' * (i % 3)}{('good', 'bad')[i % 2]},{i % 2}" for i in range(count)
        ]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    experiment = build_experiment(
        {
            "task": {"path": str(tmp_path), "probe_examples": 0},
            "partition": {"clients": 2},
            "backbone": {"path": str(gpt2_folder), "max_length": 16},
            "adapter": {"rank": 4},
            "train": {"local_steps": 10, "batch_size": 8, "learning_rate": 0.02},
            "federation": {"rounds": 2, "workers": 0},
            "strategy": {"name": "dense-oracle"},
        },
        {},
    )
    (finished,) = simulate([experiment], lambda *_: None)
    rounds = finished.outcomes.rounds
    assert all(client["status"] == "ok" for row in rounds for client in row["clients"])
    assert rounds[-1]["loss"] < finished.outcomes.start.loss
