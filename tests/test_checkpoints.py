"""Checkpoints: a run that was cut off, and goes on, ends where it would have ended."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from clients.app import app as client_app
from common.config import Experiment
from server.checkpoints import Checkpoints
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, find_clients, run_federation
from server.local_grid import LocalGrid

Build = Callable[..., Experiment]


class CutError(Exception):
    """The server dies."""


def run(experiment: Experiment, folder: Path, cut_after: int = 0) -> Outcomes:
    """Run with clients that know nothing of an earlier run; die after that round."""
    grid = LocalGrid(client_app, experiment.partition.clients)
    nodes = find_clients(grid, experiment.partition.clients, timeout=1.0)

    def on_round(row: Mapping[str, Any]) -> None:
        if row["round"] == cut_after:
            raise CutError

    checkpoints = Checkpoints(folder, experiment)
    return run_federation(
        grid, experiment, Evaluator(experiment), nodes, on_round, checkpoints=checkpoints
    )


def rows_of(outcomes: Outcomes) -> list[tuple[int, float, float]]:
    return [(row["round"], row["accuracy"], row["loss"]) for row in outcomes.rounds]


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy__name": "fedavg", "copra__enabled": True},
        {"strategy__name": "copra-merge", "adapter__ranks": [2, 4]},
        {"strategy__name": "fedex-lora"},
        {"strategy__name": "flora"},
        {"strategy__name": "rolora"},
        {"strategy__name": "fedadam"},
        {"strategy__name": "local-only"},
        {"strategy__name": "fedavg", "federation__fraction": 0.67, "wire__down": "float16"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_what_was_cut_off_goes_on_to_the_same_end(
    digits_experiment: Build, tmp_path: Path, settings: dict[str, Any]
) -> None:
    experiment = digits_experiment(federation__rounds=4, **settings)
    whole = run(experiment, tmp_path / "whole")
    with pytest.raises(CutError):
        run(experiment, tmp_path / "cut", cut_after=2)
    rest = run(experiment, tmp_path / "cut")
    assert rest.digest == whole.digest
    assert rows_of(rest) == rows_of(whole)
    assert rest.start == whole.start


def test_a_checkpoint_is_of_one_experiment(digits_experiment: Build, tmp_path: Path) -> None:
    with pytest.raises(CutError):
        run(digits_experiment(), tmp_path, cut_after=1)
    assert Checkpoints(tmp_path, digits_experiment()).load() is not None
    assert Checkpoints(tmp_path, digits_experiment(federation__seed=1)).load() is None
    Checkpoints(tmp_path, digits_experiment()).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"strategy__name": "fedsa-lora"}, {"wire__up": "int8"}], ids=str
)
def test_where_clients_keep_something_a_run_starts_anew(
    digits_experiment: Build, tmp_path: Path, settings: dict[str, Any]
) -> None:
    experiment = digits_experiment(federation__rounds=3, **settings)
    with pytest.raises(CutError):
        run(experiment, tmp_path, cut_after=1)
    assert list(tmp_path.iterdir()) == []
    assert run(experiment, tmp_path).digest == run(experiment, tmp_path / "other").digest
