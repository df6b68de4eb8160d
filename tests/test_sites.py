"""Sites with folders of their own: each reads its own rows, and nobody reads another's."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from clients.app import app as client_app
from common.config import Experiment, build_experiment
from common.errors import ConfigError, DataError, FedcopraError
from common.shards import shard_of
from common.tasks import load_tasks
from server.evaluation import Evaluator
from server.flower_strategy import find_clients, run_federation
from server.local_grid import LocalGrid
from server.record import build_record
from server.simulation import simulate
from strategies import resolve

LABELS = ("dull", "good")
Row = tuple[str, str]


def write(folder: Path, split: str, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def praise(count: int) -> list[Row]:
    return [(f"the film was very good {'not ' * (n % 3)}", "good") for n in range(count)]


def blame(count: int) -> list[Row]:
    return [(f"this book is {'very ' * (n % 4)}dull", "dull") for n in range(count)]


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Three sites, the second of which has seen one class only, and the server's test rows."""
    write(tmp_path / "data" / "0", "train", praise(12) + blame(8))
    write(tmp_path / "data" / "1", "train", praise(9))
    write(tmp_path / "data" / "2", "train", praise(3) + blame(14))
    write(tmp_path / "data" / "server", "test", praise(10) + blame(10))
    return tmp_path / "data"


@pytest.fixture
def at_sites(sites: Path, bert_folder: Path) -> Callable[..., Experiment]:
    def build(**settings: Any) -> Experiment:
        tables = {
            "task": {"path": f"{sites}/{{site}}", "labels": list(LABELS), "probe_examples": 0},
            "partition": {"kind": "sites", "clients": 3},
            "backbone": {"path": str(bert_folder)},
            "adapter": {"rank": 2, "alpha": 4},
            "train": {"local_steps": 2, "batch_size": 4},
            "federation": {"rounds": 2, "workers": 0},
        }
        return build_experiment(tables, {k.replace("__", "."): v for k, v in settings.items()})

    return build


def test_a_client_trains_on_all_rows_of_its_folder_and_the_server_tests_on_its_own(
    at_sites: Callable[..., Experiment],
) -> None:
    experiment = at_sites()
    [finished] = simulate([experiment], lambda *_: None)
    record = build_record(finished, "fedavg")
    assert [client["label_counts"] for client in record["task"]["clients"]] == [
        [8, 12],
        [0, 9],
        [14, 3],
    ]
    assert [client["num_examples"] for client in record["rounds"][-1]["clients"]] == [20, 9, 17]
    assert record["task"]["sizes"] == {"train": 46, "validation": 0, "probe": 0, "test": 20}
    assert record["task"]["labels"] == list(LABELS)
    assert record["task"]["name"] == "data"


def test_nobody_reads_the_folder_of_another(
    at_sites: Callable[..., Experiment], sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 can load its rows where nothing else is there; the server its own, likewise."""
    experiment = at_sites()
    alone = sites.parent / "alone"
    for place in ("1", "server"):
        (alone / place).mkdir(parents=True)
        for file in (sites / place).iterdir():
            (alone / place / file.name).write_bytes(file.read_bytes())
    there = at_sites(task__path=f"{alone}/{{site}}")
    shard = shard_of(there.task, there.partition, 0, 1)
    assert len(shard.rows) == len(shard_of(experiment.task, experiment.partition, 0, 1).rows) == 9
    [task] = load_tasks(there.task)
    assert (len(task.train), len(task.test)) == (0, 20)
    with pytest.raises(ConfigError, match=r"alone/2.*there is no such folder"):
        shard_of(there.task, there.partition, 0, 2)


def test_where_the_folder_of_folders_lies_changes_nothing(
    at_sites: Callable[..., Experiment], sites: Path
) -> None:
    [here] = simulate([at_sites()], lambda *_: None)
    (sites.parent / "elsewhere").mkdir()
    moved = at_sites(task__path=f"{sites.rename(sites.parent / 'elsewhere' / 'data')}/{{site}}")
    [there] = simulate([moved], lambda *_: None)
    assert there.outcomes.digest == here.outcomes.digest


def test_a_row_of_a_class_that_nobody_agreed_on_is_named(
    at_sites: Callable[..., Experiment], sites: Path
) -> None:
    write(sites / "1", "train", [*praise(3), ("this film", "slow")])
    with pytest.raises(FedcopraError, match=r"client 1 did not say.*row 3: label 'slow'.*dull"):
        simulate([at_sites()], lambda *_: None)


def test_a_site_without_training_rows_is_named(
    at_sites: Callable[..., Experiment], sites: Path
) -> None:
    (sites / "2" / "train.jsonl").rename(sites / "2" / "test.jsonl")
    with pytest.raises(FedcopraError, match="client 2 has no training rows"):
        simulate([at_sites()], lambda *_: None)


def test_the_server_needs_test_rows(at_sites: Callable[..., Experiment], sites: Path) -> None:
    (sites / "server" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"expected train\.jsonl"):
        simulate([at_sites()], lambda *_: None)


def test_probe_rows_are_the_server_s_own_training_rows(
    at_sites: Callable[..., Experiment], sites: Path
) -> None:
    with pytest.raises(DataError, match=r"task\.probe_examples asks for 8 rows"):
        load_tasks(at_sites(task__probe_examples=8).task)
    write(sites / "server", "train", praise(10) + blame(10))
    [task] = load_tasks(at_sites(task__probe_examples=8, task__validation_fraction=0).task)
    assert (len(task.probe), len(task.test)) == (8, 20)
    own = shard_of(at_sites(task__probe_examples=8).task, at_sites().partition, 0, 0)
    assert len(own.rows) == 20


def test_sites_with_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for place, classes in {"0/train": ["a"], "1/train": ["b", "c"], "server/test": "abc"}.items():
        for name in classes:
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("L", (28, 28)).save(tmp_path / place / name / "1.png")
    tables = {
        "task": {"path": f"{tmp_path}/{{site}}", "labels": ["a", "b", "c"], "probe_examples": 0},
        "partition": {"kind": "sites", "clients": 2},
        "backbone": {"name": "glyph-vit"},
    }
    experiment = build_experiment(tables)
    found = [shard_of(experiment.task, experiment.partition, 0, k).label_counts for k in (0, 1)]
    assert found == [[1, 0, 0], [0, 1, 1]]
    [task] = load_tasks(experiment.task)
    assert task.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition__kind": "iid"}, "go together"),
        ({"task__path": "data"}, "go together"),
        ({"task__labels": []}, "needs task.labels"),
        ({"task__labels": ["a", "a"]}, "different classes"),
        ({"partition__shots": 4}, "draws from all rows"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(
    at_sites: Callable[..., Experiment], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        at_sites(**settings)


@pytest.mark.parametrize("strategy", ["centralised", "fedsa-lora"])
def test_what_needs_rows_of_others_is_refused(
    at_sites: Callable[..., Experiment], strategy: str
) -> None:
    with pytest.raises(ConfigError, match=r"partition\.kind = 'sites'.*fedavg"):
        resolve(at_sites(strategy__name=strategy))


def test_a_count_of_other_classes_is_refused(
    at_sites: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a site would say that was given another experiment."""
    experiment = at_sites()
    monkeypatch.setattr("clients.app.pack_holding", lambda client, _: _packed(client))
    grid = LocalGrid(client_app, 3)
    nodes = find_clients(grid, 3, timeout=1.0)
    with pytest.raises(FedcopraError, match="counts rows of 5 labels; task data has 2"):
        run_federation(grid, experiment, Evaluator(experiment), nodes, lambda _: None)


def _packed(client: int) -> Any:
    from common.messages import pack_holding

    return pack_holding(client, [1] * 5)
