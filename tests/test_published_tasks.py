"""The 13 language tasks and the 19 of VTAB-1K: by name, from a hub's id or from elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.config import Task, build_experiment
from common.errors import ConfigError, DataError
from common.prompt_bank import _ROBERTA_BASE
from common.published_tasks import PUBLISHED_TASKS
from common.tasks import load_tasks
from server.catalogue import tasks

VTAB = [name for name in PUBLISHED_TASKS if name.startswith("vtab-")]


def test_all_are_in_the_table() -> None:
    assert len(VTAB) == 19
    sources = {name: task for name, task in PUBLISHED_TASKS.items() if task.kind == "text"}
    # The released prompts are of these very tasks, and as many rows.
    assert {n: t.examples for n, t in sources.items()} == {
        known.name: known.examples for known in _ROBERTA_BASE.values()
    }
    groups = [PUBLISHED_TASKS[name].group for name in VTAB]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [7, 4, 8]
    listed = {entry["name"]: entry for entry in tasks()}
    assert listed["vtab-svhn"]["verified"]
    assert "(not verified)" in listed["vtab-kitti"]["summary"]
    assert listed["mnli"]["splits"] == {"train": "train", "test": "validation_matched"}
    assert {entry["metric"] for name, entry in listed.items() if name in PUBLISHED_TASKS} == {
        "accuracy"
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ...]]]:
    """A function of splits: what every hub id then holds; it gives a list of what is asked for."""

    def serve(**splits: Any) -> list[tuple[str, ...]]:
        import datasets

        asked: list[tuple[str, ...]] = []

        def load(*wanted: str) -> Any:
            asked.append(wanted)
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return serve


def pairs(count: int) -> Any:
    from datasets import Dataset

    columns = {
        "premise": [f"p{row}" for row in range(count)],
        "hypothesis": [f"h{row}" for row in range(count)],
        "label": [row % 4 - 1 for row in range(count)],
    }
    return Dataset.from_dict(columns)


def test_a_language_task_comes_from_its_hub_with_its_own_splits_and_columns(
    hub: Callable[..., list[tuple[str, ...]]],
) -> None:
    asked = hub(train=pairs(80), validation_matched=pairs(40), test=pairs(4))
    (task,) = load_tasks(Task(name="mnli", probe_examples=0))
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (task.name, task.labels) == ("mnli", ("0", "1", "2"))
    # Rows without a label are left out; what is called test there has none at all.
    assert len(task.train) + len(task.validation) == 60
    assert sorted(text for text, _ in task.test.inputs) == sorted(
        f"p{r}" for r in range(40) if r % 4
    )
    for text, other in task.train.inputs:
        assert text[1:] == other[1:]
    (elsewhere,) = load_tasks(Task(name="mnli", location="me/mine", probe_examples=0))
    assert asked[1][0] == "me/mine"
    assert len(elsewhere.test) == 30


def test_what_has_other_classes_is_not_the_task(
    hub: Callable[..., list[tuple[str, ...]]],
) -> None:
    hub(train=pairs(80), validation=pairs(40))
    with pytest.raises(DataError, match="has text of 3 classes, and the task is text of 2"):
        load_tasks(Task(name="qnli", text_column="premise", probe_examples=0))
    with pytest.raises(DataError, match="there is no column 'question'"):
        load_tasks(Task(name="qqp", text_column="question", probe_examples=0))


def test_a_hub_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        load_tasks(Task(name="vtab-kitti"))
    message = str(caught.value)
    assert "task.name = 'vtab-kitti' at 'clip-benchmark/wds_" in message
    assert "an id that was never verified" in message
    assert "--set task.location=PLACE" in message
    assert "\n" not in message


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """A folder as VTAB's export writes it: 12 rows to train on, 4 to choose by, 8 to test."""
    numbers = iter(range(1000))
    for split, each in (("train", 3), ("validation", 1), ("test", 2)):
        for label in range(4):
            folder = tmp_path / "kitti" / split / str(label)
            folder.mkdir(parents=True)
            for _ in range(each):
                pixels = np.full((8, 8, 3), next(numbers), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{next(numbers)}.png")
    return tmp_path / "kitti"


def test_a_folder_takes_the_place_of_the_hub(kitti: Path) -> None:
    (task,) = load_tasks(Task(name="vtab-kitti", location=str(kitti), probe_examples=0))
    assert (task.name, task.kind) == ("vtab-kitti", "image")
    assert [len(s) for s in (task.train, task.validation, task.test)] == [12, 4, 8]
    (whole,) = load_tasks(
        Task(name="vtab-kitti", location=str(kitti), probe_examples=0, include_validation=True)
    )
    assert [len(s) for s in (whole.train, whole.validation, whole.test)] == [16, 0, 8]
    assert set(map(str, task.validation.inputs)) < set(map(str, whole.train.inputs))
    assert list(map(str, whole.test.inputs)) == list(map(str, task.test.inputs))
    with pytest.raises(DataError, match="image of 4 classes, and the task is image of 10"):
        load_tasks(Task(name="vtab-svhn", location=str(kitti)))
    with pytest.raises(ConfigError, match=r"task\.location = 'x' is of published tasks"):
        load_tasks(Task(name="digits", location="x"))


def test_eight_hundred_and_two_hundred_of_a_thousand() -> None:
    """The test rows are the same, however few there are to train on."""
    (all_rows,) = load_tasks(Task(name="digits", probe_examples=0))
    few = {"examples": 1000, "validation_fraction": 0.2, "probe_examples": 0}
    (task,) = load_tasks(Task(name="digits", **few))
    assert [len(s) for s in (task.train, task.validation)] == [800, 200]
    assert np.array_equal(task.test.labels, all_rows.test.labels)
    assert all(
        a is b or a == b for a, b in zip(task.test.inputs, all_rows.test.inputs, strict=True)
    )
    (whole,) = load_tasks(Task(name="digits", include_validation=True, **few))
    assert [len(s) for s in (whole.train, whole.validation)] == [1000, 0]


def test_another_source_drops_the_location() -> None:
    tables = {"task": {"name": "vtab-kitti", "location": "x"}, "backbone": {"name": "glyph-vit"}}
    assert build_experiment(tables, {"task.name": "digits"}).task.location == ""
    assert build_experiment(tables, {"task.location": "y"}).task.location == "y"
