"""Shards: every training row to exactly one client, by the seed alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Partition, Task, TaskSource
from common.errors import DataError
from common.shards import Shard, deal_label_mixes, deal_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 unique texts of 4 classes, of which 200 train."""
    place = tmp_path_factory.mktemp("texts") / "four"
    write(place, 240)
    return place


def write(place: Path, n: int) -> None:
    place.mkdir()
    lines = [
        json.dumps({"text": f"text {k}", "label": [0, 1, 2, 3, 0, 1, 0][k % 7]}) for k in range(n)
    ]
    (place / "train.jsonl").write_text("\n".join(lines))


def deal(folder: Path, seed: int = 0, **partition: Any) -> tuple[Shard, ...]:
    task = Task(path=str(folder), test_fraction=0.1, validation_fraction=0.0, probe_examples=16)
    return deal_shards(task, Partition(**partition), seed)


def rows_of(shards: Sequence[Shard]) -> list[int]:
    return [int(row) for shard in shards for row in shard.rows]


def same(one: Sequence[Shard], other: Sequence[Shard]) -> bool:
    return all(np.array_equal(a.rows, b.rows) for a, b in zip(one, other, strict=True))


KINDS = [
    pytest.param({"kind": "iid", "clients": 7}, id="iid"),
    pytest.param(
        {"kind": "dirichlet", "clients": 5, "alpha": 0.3, "min_examples": 2}, id="dir 0.3"
    ),
    pytest.param({"kind": "dirichlet", "clients": 5, "alpha": 50.0}, id="dirichlet 50"),
    pytest.param({"kind": "classes", "clients": 6, "classes": 2}, id="classes"),
]


@pytest.mark.parametrize("partition", KINDS)
def test_every_training_row_is_dealt_exactly_once(folder: Path, partition: dict[str, Any]) -> None:
    shards = deal(folder, **partition)
    assert [shard.client for shard in shards] == list(range(partition["clients"]))
    assert sorted(rows_of(shards)) == list(range(200))
    for shard in shards:
        assert shard.rows.dtype == np.int64
        assert len(shard.rows)


@pytest.mark.parametrize("partition", KINDS)
def test_shards_follow_from_the_seed_alone(folder: Path, partition: dict[str, Any]) -> None:
    first = deal(folder, **partition)
    deal_shards.cache_clear()
    np.random.seed(123)
    assert same(deal(folder, **partition), first)
    assert not same(deal(folder, seed=1, **partition), first)


@pytest.mark.parametrize("partition", KINDS)
def test_dealing_leaves_the_global_stream_alone(folder: Path, partition: dict[str, Any]) -> None:
    np.random.seed(5)
    expected = np.random.random(3).tolist()
    np.random.seed(5)
    deal_shards.cache_clear()
    deal(folder, **partition)
    assert np.random.random(3).tolist() == expected


def test_a_shard_knows_its_label_counts(folder: Path) -> None:
    shards = deal(folder, kind="iid", clients=3)
    labels = shards[0].task.train.labels
    for shard in shards:
        counts = [int((labels[shard.rows] == label).sum()) for label in range(4)]
        assert shard.label_counts == counts
    assert np.sum([s.label_counts for s in shards], axis=0).tolist() == np.bincount(labels).tolist()


def test_iid_shards_are_of_one_size_and_mixed(folder: Path) -> None:
    shards = deal(folder, kind="iid", clients=7)
    sizes = [len(shard.rows) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        assert min(np.diff(shard.rows)) >= 1
        assert max(np.diff(shard.rows)) > 7, "rows are contiguous"


def test_one_client_holds_everything(folder: Path) -> None:
    for kind in ("iid", "dirichlet"):
        (shard,) = deal(folder, kind=kind, clients=1)
        assert shard.rows.tolist() == list(range(200))


def skew(shards: Sequence[Shard]) -> float:
    """Return the mean total-variation distance of the shards' label shares from the whole."""
    counts = np.array([shard.label_counts for shard in shards], dtype=float)
    whole = counts.sum(axis=0) / counts.sum()
    return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - whole).sum(axis=1).mean() / 2)


def test_a_smaller_alpha_is_more_skewed(folder: Path) -> None:
    by_alpha = [
        np.mean(
            [
                skew(deal(folder, s, kind="dirichlet", clients=4, alpha=alpha, min_examples=1))
                for s in range(5)
            ]
        )
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert by_alpha[0] > by_alpha[1] + 0.1 > by_alpha[2] + 0.2


@pytest.mark.parametrize("smallest", [1, 5, 10])
def test_no_dirichlet_shard_is_below_min_examples(folder: Path, smallest: int) -> None:
    for seed in range(4):
        shards = deal(folder, seed, kind="dirichlet", clients=5, alpha=0.3, min_examples=smallest)
        assert min(len(shard.rows) for shard in shards) >= smallest


def test_clients_hold_as_many_classes_as_asked_for(folder: Path) -> None:
    for classes in (1, 2, 3):
        for shard in deal(folder, kind="classes", clients=4, classes=classes):
            assert sum(count > 0 for count in shard.label_counts) == classes


def refusal(folder: Path, **partition: Any) -> str:
    with pytest.raises(DataError) as caught:
        deal(folder, **partition)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_minimum_that_cannot_be_met_is_refused(folder: Path) -> None:
    message = refusal(folder, kind="dirichlet", clients=5, alpha=0.3, min_examples=100)
    assert "dirichlet" in message
    assert "200" in message
    assert "5" in message


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes"])
def test_more_clients_than_rows_are_refused(folder: Path, kind: str) -> None:
    message = refusal(folder, kind=kind, clients=201, min_examples=1)
    assert "201" in message
    assert "200" in message


def test_as_many_clients_as_rows_get_one_each(folder: Path) -> None:
    shards = deal(folder, kind="iid", clients=200)
    assert sorted(rows_of(shards)) == list(range(200))
    assert {len(shard.rows) for shard in shards} == {1}


def test_more_classes_than_there_are_is_refused(folder: Path) -> None:
    assert "classes" in refusal(folder, kind="classes", clients=4, classes=5)


def test_more_clients_than_a_class_has_rows_are_refused(folder: Path) -> None:
    """Each client wants one class, and the rarest has fewer rows than takers."""
    assert "classes" in refusal(folder, kind="classes", clients=199, classes=1)


# --- several tasks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskSource, ...]:
    place = tmp_path_factory.mktemp("members")
    for name, n in (("one", 60), ("two", 100), ("three", 40)):
        write(place / name, n)
    return tuple(TaskSource(path=str(place / name)) for name in ("one", "two", "three"))


def deal_members(members: tuple[TaskSource, ...], clients: int, seed: int = 0) -> tuple[Shard, ...]:
    task = Task(members=members, test_fraction=0.1, validation_fraction=0.0, probe_examples=12)
    return deal_shards(task, Partition(kind="by-task", clients=clients), seed)


@pytest.mark.parametrize("clients", [3, 6, 9])
def test_by_task_deals_every_row_of_every_member_once(
    members: tuple[TaskSource, ...], clients: int
) -> None:
    shards = deal_members(members, clients)
    assert [shard.client for shard in shards] == list(range(clients))
    assert [shard.task.name for shard in shards] == ["one", "two", "three"] * (clients // 3)
    for name in ("one", "two", "three"):
        own = [shard for shard in shards if shard.task.name == name]
        assert sorted(rows_of(own)) == list(range(len(own[0].task.train)))


def test_by_task_is_deterministic_by_seed(members: tuple[TaskSource, ...]) -> None:
    first = deal_members(members, 6)
    deal_shards.cache_clear()
    assert same(deal_members(members, 6), first)
    assert not same(deal_members(members, 6, seed=1), first)


def test_by_task_names_the_member_with_too_few_rows(members: tuple[TaskSource, ...]) -> None:
    with pytest.raises(DataError, match="three"):
        deal_members(members, 3 * 33)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
def test_label_mixes_have_one_size_and_no_row_twice(alpha: float) -> None:
    labels = np.repeat(np.arange(6), [86, 1250, 1162, 1223, 835, 896])
    shards = deal_label_mixes(labels, alpha, clients=20, seed=3)
    assert {len(rows) for rows in shards} == {len(labels) // 20}
    dealt = np.concatenate(shards)
    assert len(np.unique(dealt)) == len(dealt)


def test_a_small_alpha_skews_label_mixes_and_a_large_one_does_not() -> None:
    labels = np.repeat(np.arange(6), 200)
    largest = {
        alpha: np.mean(
            [
                np.bincount(labels[rows], minlength=6).max() / len(rows)
                for rows in deal_label_mixes(labels, alpha, clients=12, seed=0)
            ]
        )
        for alpha in (0.01, 0.5, 100.0)
    }
    # Clients late in the queue have to make do with what is left.
    assert largest[0.01] > 0.85
    assert 0.4 < largest[0.5] < 0.85
    assert largest[100.0] < 0.3


def test_label_mixes_are_a_function_of_the_seed() -> None:
    labels = np.repeat(np.arange(5), 40)
    once, again = (deal_label_mixes(labels, 0.1, 8, seed=5) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    other = deal_label_mixes(labels, 0.1, 8, seed=6)
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))
