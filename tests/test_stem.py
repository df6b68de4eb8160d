"""The stem: rows past the frozen blocks give what the whole model gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clients.training import LocalRun, train_locally
from common.adapters import AdaptedBackbone
from common.backbones import load_preprocessor
from common.config import Adapter, Backbone, Copra, Experiment, Train
from common.errors import ConfigError
from common.features import Features
from common.models import load_model
from common.rows import TrainingRows, load_training_rows
from common.tasks import LabelledTask, load_tasks
from server.simulation import simulate

Build = Callable[..., Experiment]
TEXTS = ["the film was very good", "dull", "this book is not bad", "slow slow slow", "good"]


def text_features(folder: Path) -> Features:
    preprocessor = load_preprocessor(Backbone(path=str(folder), max_length=16), "text")
    encoded = preprocessor.tool(TEXTS, padding=True, return_tensors="pt")
    return Features(dict(encoded), torch.tensor([0, 1, 2, 0, 1]))


def loaded(folder: Path, task: LabelledTask, blocks: int) -> AdaptedBackbone:
    config = Backbone(path=str(folder), max_length=16)
    adapter = Adapter(rank=2, alpha=3, blocks=blocks)
    model = load_model(config, task.kind, adapter, "cpu")
    assert isinstance(model, AdaptedBackbone)
    state = model.initial((task,), 0)
    stream = torch.Generator().manual_seed(5)
    moved = {n: t + 0.3 * torch.randn(t.shape, generator=stream) for n, t in state.items()}
    model.load(moved, 2, task)
    model.module.eval()
    return model


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_logits_past_the_stem_are_those_of_the_whole_model(
    kind: str,
    blocks: int,
    bert_folder: Path,
    vit_folder: Path,
    picture_rows: Features,
    empty_task: Callable[..., LabelledTask],
) -> None:
    folder = {"text": bert_folder, "image": vit_folder}[kind]
    model = loaded(folder, empty_task(kind), blocks)
    rows = text_features(bert_folder) if kind == "text" else picture_rows
    past = model.past_stem(rows)
    assert past.past_stem
    assert model.has_stem
    everything = torch.arange(len(rows))
    with torch.no_grad():
        whole = model.logits(rows.batch(everything, model.backbone.device))
        short = model.logits(past.batch(everything, model.backbone.device))
        again = model.logits(rows.batch(everything, model.backbone.device))
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, whole)


def test_only_the_last_blocks_carry_adapters(
    bert_folder: Path, empty_task: Callable[..., LabelledTask]
) -> None:
    task = empty_task("text")
    names = loaded(bert_folder, task, 1).shapes(2, task)
    factors = {name for name in names if ".lora_" in name}
    assert factors
    assert all(".layer.3." in name for name in factors)


def test_training_past_the_stem_is_training(
    vit_folder: Path, picture_rows: Features, empty_task: Callable[..., LabelledTask]
) -> None:
    """The tiny ViT has no dropout, so that both ways take the same steps."""
    task = empty_task("image")
    model = loaded(vit_folder, task, 2)
    start = model.state()
    run = LocalRun(0, 0, 4, 4, ("lora_A", "lora_B", "head"))
    ends = []
    for rows in (picture_rows, model.past_stem(picture_rows)):
        model.load(start, 2, task)
        train_locally(model, rows, run, Train(learning_rate=0.01), Copra())
        ends.append(model.state())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(tensor, start[name])


def test_rows_are_taken_past_the_stem_once(
    vit_folder: Path,
    picture_rows: Features,
    empty_task: Callable[..., LabelledTask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = loaded(vit_folder, empty_task("image"), 2)
    asked: list[int] = []
    run = model.past_stem

    def counted(features: Features) -> Features:
        asked.append(len(features))
        return run(features)

    monkeypatch.setattr(model, "past_stem", counted)
    rows = TrainingRows(picture_rows, model)
    whole = run(picture_rows)
    for wanted in ([3, 1], [1, 4, 3], [4]):
        found = rows.select(torch.tensor(wanted))
        torch.testing.assert_close(
            found.inputs["pixel_values"], whole.inputs["pixel_values"][wanted], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(found.labels, picture_rows.labels[wanted])
    assert asked == [2, 1]


def test_a_federation_with_a_stem_runs_and_repeats(digits_experiment: Build) -> None:
    experiment = digits_experiment(adapter__blocks=2)
    first, second = simulate([experiment, experiment], lambda index, row: None)
    assert first.outcomes.digest == second.outcomes.digest
    rows = load_training_rows(
        experiment.task,
        load_tasks(experiment.task)[0].name,
        experiment.backbone,
        experiment.adapter,
        experiment.train.device,
    )
    assert rows.select(torch.tensor([0])).past_stem


def test_more_blocks_than_there_are_is_refused(
    vit_folder: Path, empty_task: Callable[..., LabelledTask]
) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.blocks = 5.*4 blocks"):
        loaded(vit_folder, empty_task("image"), 5)
