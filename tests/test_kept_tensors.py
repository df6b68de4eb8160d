"""What processes keep for each other: the same tensors, made again whenever anything differs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import shards
from common.config import Experiment
from common.features import as_tensors, from_tensors
from common.kept_tensors import FOLDER, kept_or_made
from common.rows import _plain, load_training_rows
from common.shards import deal_shards
from common.tasks import _load
from server.simulation import simulate

Build = Callable[..., Experiment]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def forget() -> None:
    """As a new process does."""
    for remembered in (deal_shards, load_training_rows, _plain, _load):
        remembered.cache_clear()


class Maker:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.times += 1
        return {"x": torch.arange(3)}


def test_made_once_and_then_read(cache: Path) -> None:
    maker = Maker()
    first, second = (kept_or_made(["a", "b"], maker)["x"] for _ in range(2))
    assert maker.times == 1
    assert torch.equal(first, second)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("others", [["a"], ["ab"], ["a", "c"], ["b", "a"]])
def test_whatever_differs_is_made_again(cache: Path, others: list[str]) -> None:
    maker = Maker()
    kept_or_made(["a", "b"], maker)
    kept_or_made(others, maker)
    assert maker.times == 2


def test_a_file_that_is_cut_off_is_made_again(cache: Path) -> None:
    maker = Maker()
    kept_or_made(["a"], maker)
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(kept_or_made(["a"], maker)["x"], torch.arange(3))
    assert maker.times == 2
    assert torch.equal(kept_or_made(["a"], maker)["x"], torch.arange(3))
    assert maker.times == 2


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    maker = Maker()
    for _ in range(2):
        kept_or_made(["a"], maker)
    assert maker.times == 2


def test_a_run_on_what_others_kept_is_the_same(
    digits_experiment: Build, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER)
    forget()
    [without] = simulate([digits_experiment()], lambda *_: None)
    monkeypatch.setenv(FOLDER, str(cache))
    forget()
    [made] = simulate([digits_experiment()], lambda *_: None)
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 2  # the deal, the rows
    forget()
    monkeypatch.setattr(shards, "_deal", None)  # another process need not deal
    [kept] = simulate([digits_experiment()], lambda *_: None)
    forget()
    assert {run.outcomes.digest for run in (without, made, kept)} == {without.outcomes.digest}
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files


def test_rows_that_change_are_preprocessed_again(
    digits_experiment: Build, cache: Path, tmp_path: Path
) -> None:
    for split, shade in (("train", 10), ("test", 20)):
        for label in "ab":
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for n in range(4):
                picture = Image.new("L", (28, 28), shade + n)
                picture.save(tmp_path / "set" / split / label / f"{n}.png")
    experiment = digits_experiment(task__path=str(tmp_path / "set"), task__probe_examples=0)

    def pixels() -> int:
        forget()
        rows = _plain(experiment.task, "set", experiment.backbone, "server")
        return int(rows.inputs["pixel_values"].max())

    assert pixels() == pixels() == 13
    Image.new("L", (28, 28), 99).save(tmp_path / "set" / "train" / "b" / "3.png")
    assert pixels() == 99
    forget()


def test_features_survive_the_way_through_tensors(digits_experiment: Build) -> None:
    experiment = digits_experiment()
    rows = _plain(experiment.task, "digits", experiment.backbone, "server")
    back = from_tensors(as_tensors(rows))
    assert set(back.inputs) == set(rows.inputs)
    for name, tensor in as_tensors(rows).items():
        assert torch.equal(as_tensors(back)[name], tensor)
    assert rows.mean is not None
    assert back.mean is not None
