"""Soft prompts of a text encoder: the stock model without them, itself with them slipped in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_random
from torch import Tensor

from clients.training import LocalRun, train_locally
from common.backbones import load_preprocessor
from common.config import Adapter, Backbone, Copra, Experiment, Prompt, Train, build_experiment
from common.errors import ConfigError, UpdateRefusedError
from common.features import Features, extract_features
from common.models import load_model
from common.prompted_text import PromptedText, activated_neurons, first_state
from common.tasks import LabelledTask, Split
from common.tensors import is_prompt
from server.simulation import simulate
from strategies.base import EVERYTHING

WIDTH = 16
TEXTS = [("the film was good",), ("dull",), ("this book is not very good",), ("bad slow film",)]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def masked_folder(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT again, with a masked-LM head of random weights."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked") / "tiny-masked-bert"
    save_random(BertForMaskedLM(BertConfig.from_pretrained(bert_folder)), folder)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta_folder(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa, which counts positions from behind its padding, with its masked-LM head."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=66,
        type_vocab_size=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("masked") / "tiny-roberta"
    save_random(RobertaForMaskedLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return replace(empty_task("text"), class_names=("good", "bad", "dull"))


def prompted(folder: Path, **prompt: Any) -> PromptedText:
    adapter = Adapter(kind="prompt", prompt=Prompt(**prompt))
    model = load_model(Backbone(path=str(folder)), "text", adapter, "cpu")
    assert isinstance(model, PromptedText)
    return model


def rows_of(folder: Path) -> Features:
    preprocessor = load_preprocessor(Backbone(path=str(folder)), "text")
    return extract_features(preprocessor, Split(TEXTS, np.array([0, 2, 1, 1])))


def logits_of(model: PromptedText, rows: Features) -> Tensor:
    with torch.no_grad():
        return model.logits(rows.batch(torch.arange(len(rows)), model.device))


def stock_states(encoder: Any, inputs: dict[str, Tensor], vectors: Tensor, at: int) -> Tensor:
    """First states of the stock model, run whole, with rows put into what its layers get."""

    def slip_in(_: Any, __: Any, output: Tensor) -> Tensor:
        several = vectors.expand(len(output), -1, -1)
        output = output[:, : output.shape[1] - len(vectors)]
        return torch.cat([output[:, :at], several, output[:, at:]], dim=1)

    # Room at the end, which the embedding layer's hook gives back.
    count = len(vectors)
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, count))
    seen = torch.nn.functional.pad(inputs["attention_mask"].flip(1), (0, count), value=1).flip(1)
    hook = encoder.embeddings.register_forward_hook(slip_in)
    with torch.no_grad():
        states: Tensor = encoder(input_ids=ids, attention_mask=seen).last_hidden_state
    hook.remove()
    return states[:, 0]


@pytest.mark.parametrize("which", ["bert_folder", "roberta_folder"])
def test_without_a_prompt_it_is_the_stock_encoder_bit_by_bit(
    which: str, task: LabelledTask, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModel

    folder = request.getfixturevalue(which)
    model, rows = prompted(folder, length=0), rows_of(folder)
    start = model.initial((task,), 0)
    assert sorted(start) == ["head.toy.classifier.bias", "head.toy.classifier.weight"]
    model.load(start, 0, task)
    head = start["head.toy.classifier.weight"], start["head.toy.classifier.bias"]
    with torch.no_grad():
        read = model.text.encoder(**rows.inputs).last_hidden_state[:, 0]
        stock = AutoModel.from_pretrained(folder).eval()(**rows.inputs).last_hidden_state[:, 0]
    expected = torch.nn.functional.linear(read, *head)
    assert torch.equal(logits_of(model, rows), expected)
    torch.testing.assert_close(read, stock, **TOLERANCE)
    assert model.has_stem
    embedded = model.past_stem(rows)
    assert embedded.past_stem
    torch.testing.assert_close(logits_of(model, embedded), expected, **TOLERANCE)


@pytest.mark.parametrize("which", ["bert_folder", "roberta_folder"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_is_the_stock_model_with_vectors_slipped_in(
    which: str, masked: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    encoder, rows = prompted(folder, length=3).text.encoder, rows_of(folder)
    prompt = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    token = 4 if masked else None
    layer = encoder.embeddings
    with torch.no_grad():
        mask = [layer.word_embeddings.weight[4]] if masked else []
        vectors = torch.stack([*mask, *prompt]) + layer.token_type_embeddings.weight[0]
        vectors = torch.nn.functional.layer_norm(
            vectors, (WIDTH,), layer.LayerNorm.weight, layer.LayerNorm.bias, layer.LayerNorm.eps
        )
        expected = stock_states(encoder, dict(rows.inputs), vectors, at=0 if masked else 1)
        found = first_state(encoder, rows.inputs, prompt, token)
        turned = first_state(encoder, rows.inputs, prompt.flip(0), token)
        plain = first_state(encoder, rows.inputs, None, None)
        # What stands at the front of a text passes a LayerNorm: its scale says next to nothing.
        longer = first_state(encoder, rows.inputs, 100 * prompt, token)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    # Vectors have no position: their order is nothing.
    torch.testing.assert_close(turned, found, **TOLERANCE)
    assert float((plain - found).abs().max()) > 0.01
    assert float((longer - found).abs().max()) < 0.5 * float((plain - found).abs().max())


def test_padding_of_a_batch_changes_nothing(bert_folder: Path, task: LabelledTask) -> None:
    model, rows = prompted(bert_folder, length=3), rows_of(bert_folder)
    model.load(model.initial((task,), 0), 0, task)
    alone = [logits_of(model, rows.select(torch.tensor([row]))) for row in range(len(rows))]
    torch.testing.assert_close(torch.cat(alone), logits_of(model, rows), **TOLERANCE)


def test_words_answer_by_the_masked_lm_head(masked_folder: Path, task: LabelledTask) -> None:
    from transformers import BertForMaskedLM

    model, rows = prompted(masked_folder, length=2, verbaliser=True), rows_of(masked_folder)
    start = model.initial((task,), 0)
    assert {n: tuple(t.shape) for n, t in start.items()} == {"prompt.text": (2, WIDTH)}
    model.load(start, 0, task)
    whole = BertForMaskedLM.from_pretrained(masked_folder).eval()
    vocabulary = model.preprocessor.tool.get_vocab()
    with torch.no_grad():
        states = first_state(whole.bert, rows.inputs, start["prompt.text"], vocabulary["[MASK]"])
        words = whole.cls(states[:, None])[:, 0]
    expected = words[:, [vocabulary[name] for name in task.class_names]]
    torch.testing.assert_close(logits_of(model, rows), expected, **TOLERANCE)


@pytest.mark.parametrize("verbaliser", [False, True])
def test_one_step_trains_the_prompt_and_leaves_the_encoder(
    masked_folder: Path, task: LabelledTask, verbaliser: bool
) -> None:
    model = prompted(masked_folder, length=4, verbaliser=verbaliser)
    start = model.initial((task,), 0)
    model.load(start, 0, task)
    frozen = {n: p.clone() for n, p in model.text.encoder.named_parameters()}
    run = LocalRun(seed=0, first_step=0, steps=1, total_steps=1, trains=EVERYTHING)
    train_locally(
        model, rows_of(masked_folder), run, Train(optimiser="sgd", learning_rate=0.5), Copra()
    )
    assert not model.text.encoder.training
    assert all(not torch.equal(tensor, start[name]) for name, tensor in model.state().items())
    for name, parameter in model.text.encoder.named_parameters():
        assert torch.equal(parameter, frozen[name])
        assert parameter.grad is None


def test_neurons_that_a_prompt_activates(bert_folder: Path) -> None:
    text = prompted(bert_folder, length=3).text
    prompt = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    found = activated_neurons(text, prompt)
    assert (found.shape, found.dtype) == ((4 * 24,), torch.bool)
    layer, block = text.encoder.embeddings, text.encoder.encoder.layer[0]
    with torch.no_grad():
        token = layer(input_ids=torch.tensor([[2]]))
        rows = layer.LayerNorm(prompt + layer.token_type_embeddings.weight[0])
        attended = block.attention(torch.cat([token, rows[None]], dim=1))[0]
        expected = block.intermediate.dense(attended)[0, 0] > 0
    assert torch.equal(found[:24], expected)
    assert not torch.equal(activated_neurons(text, -prompt), found)
    with pytest.raises(ConfigError, match="does not fit an encoder of width 16"):
        activated_neurons(text, prompt[:, :5])


def test_settings_that_do_not_fit_are_refused(
    bert_folder: Path, masked_folder: Path, task: LabelledTask
) -> None:
    with pytest.raises(ConfigError, match=r"visual = 2 is for pictures, .* set it to 0"):
        prompted(bert_folder, length=2, visual=2)
    with pytest.raises(ConfigError, match=r"words = 'this film' is for captions"):
        prompted(bert_folder, length=2, words="this film")
    with pytest.raises(ConfigError, match=r"has no masked-LM head \(cls"):
        prompted(bert_folder, length=2, verbaliser=True)
    with pytest.raises(ConfigError, match=r"verbaliser = true needs adapter\.prompt\.length"):
        prompted(masked_folder, length=0, verbaliser=True)
    model = prompted(masked_folder, length=2, verbaliser=True)
    for names, problem in (
        (("good", "bad", "very dull"), "'very dull' .* it is 2 tokens"),
        (("good", "bad", "excellent"), "'excellent' .* the model does not know it"),
        (("good", "bad", "good"), "'good' .* it is the same token as 'good'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            model.load(model.initial((task,), 0), 0, replace(task, class_names=names))
    with pytest.raises(UpdateRefusedError, match=r"prompt.text has shape"):
        model.load({"prompt.text": torch.zeros(3, WIDTH)}, 0, task)


# --- federations ----------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Callable[[str], str]:
    """A function of a name: a folder of 80 short texts, whose one word says the label."""

    def make(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        words = ("good", "bad", "dull")
        lines = [
            f'{{"text": "the film was {words[row % 3]}", "label": {row % 3}}}\n'
            for row in range(80)
        ]
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "labels.json").write_text('["good", "bad", "dull"]', encoding="utf-8")
        return str(folder)

    return make


def several_tasks(folder: Path, texts: Callable[[str], str], **values: Any) -> Experiment:
    members = values.pop("task.members", None) or [{"path": texts(n)} for n in ("films", "books")]
    tables = {
        "task": {"members": members, "probe_examples": 0},
        "partition": {"kind": "by-task", "clients": 4},
        "backbone": {"path": str(folder)},
        "adapter": {"kind": "prompt", "prompt": {"length": 3, "task_specific": True}},
        "train": {"local_steps": 3, "batch_size": 8, "learning_rate": 0.05},
        "federation": {"rounds": 2, "workers": 0},
        "strategy": {"name": "promptfl"},
    }
    return build_experiment(tables, values)


@pytest.mark.parametrize("strategy", ["promptfl", "dir-mag"])
def test_a_federation_of_tasks_gives_a_prompt_a_task(
    masked_folder: Path, texts: Callable[[str], str], strategy: str
) -> None:
    experiment = several_tasks(masked_folder, texts, **{"strategy.name": strategy})
    [finished] = simulate([experiment], lambda *_: None)
    last = finished.outcomes.rounds[-1]
    assert all(client["status"] == "ok" for client in last["clients"])
    [model] = finished.outcomes.served
    prompts = {n: t for n, t in model.tensors.items() if is_prompt(n)}
    assert sorted(prompts) == ["head.books.context", "head.films.context"]
    assert not torch.equal(*prompts.values())
    # Clients of one task alone make its prompt: they are sent nothing of the other's.
    start = finished.evaluator.initial(0)
    idle = {"harm.kind": "scaled-update", "harm.clients": [1, 3], "harm.factor": 0.0}
    members = [{"path": source.path} for source in experiment.task.members]
    alone = several_tasks(
        masked_folder, texts, **{"strategy.name": strategy, "task.members": members, **idle}
    )
    [stopped] = simulate([alone], lambda *_: None)
    tensors = stopped.outcomes.served[0].tensors
    torch.testing.assert_close(tensors["head.books.context"], start["head.books.context"])
    torch.testing.assert_close(tensors["head.films.context"], prompts["head.films.context"])


def test_several_tasks_may_share_a_prompt(masked_folder: Path, texts: Callable[[str], str]) -> None:
    shared = several_tasks(masked_folder, texts, **{"adapter.prompt.task_specific": False})
    [finished] = simulate([shared], lambda *_: None)
    assert [n for n in finished.outcomes.served[0].tensors if is_prompt(n)] == ["prompt.text"]


def test_shifts_and_probes_that_no_text_answers_are_refused(
    masked_folder: Path, texts: Callable[[str], str]
) -> None:
    tables = {
        "task": {"path": texts("films"), "shifts": [{"path": texts("books")}], "probe_examples": 0},
        "backbone": {"path": str(masked_folder)},
        "adapter": {"kind": "prompt", "prompt": {"length": 3}},
        "partition": {"clients": 2},
        "train": {"local_steps": 1},
        "federation": {"rounds": 1, "workers": 0},
        "strategy": {"name": "promptfl"},
    }
    with pytest.raises(ConfigError, match=r"nothing would train head\.books\.classifier\.bias"):
        simulate([build_experiment(tables)], lambda *_: None)
    pan = {"adapter.prompt.verbaliser": True, "nemesis.kind": "pan"}
    words = build_experiment(tables, {"adapter.prompt.verbaliser": True})
    [finished] = simulate([words], lambda *_: None)
    assert "books" in finished.outcomes.rounds[-1]["shifts"]
    with pytest.raises(ConfigError, match=r"nemesis\.kind = 'pan' asks about positions"):
        simulate([build_experiment(tables, pan)], lambda *_: None)
