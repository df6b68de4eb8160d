"""Runs that differ on the server alone train once, and end where they would have ended anyway."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from clients.repeats import Kept, Training
from clients.training import Trained
from common.config import Experiment
from common.messages import Outcome
from server.simulation import simulate

Build = Callable[..., Experiment]

SERVER_ONLY: Sequence[dict[str, Any]] = (
    {"strategy__name": "fedavg"},
    {"strategy__name": "flexlora"},
    {"strategy__name": "copra-merge"},
    {"strategy__name": "ties"},
)
OTHER_TRAINING: Sequence[dict[str, Any]] = (
    {"train__learning_rate": 0.01},
    {"train__local_steps": 3},
    {"copra__enabled": True},
    {"federation__seed": 1},
    {"federation__start": "own"},
    {"federation__rounds": 3},
    {"adapter__dropout": 0.1},
    {"adapter__alpha": 5.0},
    {"partition__kind": "dirichlet"},
    {"strategy__name": "ffa-lora"},
    {"strategy__name": "fedprox"},
    {"strategy__name": "centralised"},
    {"harm": {"kind": "random-labels", "clients": [0, 1, 2]}},
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """What this process keeps of trainings, for one test."""
    kept = Kept(room=2**24)
    monkeypatch.setattr("clients.app.kept_trainings", lambda: kept)
    return kept


def outcomes(experiments: Sequence[Experiment]) -> list[tuple[str, list[bool]]]:
    """Return of each run its digest, and which trainings of its first round were reused."""
    return [
        (
            done.outcomes.digest,
            [client["reused"] for client in done.outcomes.rounds[0]["clients"]],
        )
        for done in simulate(experiments, lambda *_: None)
    ]


def test_server_rules_share_the_first_round_and_end_where_they_did(
    digits_experiment: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = [digits_experiment(**settings) for settings in SERVER_ONLY]
    afresh = outcomes(experiments)
    assert not any(any(reused) for _, reused in afresh)
    kept = Kept(room=2**24)
    monkeypatch.setattr("clients.app.kept_trainings", lambda: kept)
    first, *others = outcomes(experiments)
    assert not any(first[1])
    assert all(all(reused) for _, reused in others)
    assert [digest for digest, _ in (first, *others)] == [digest for digest, _ in afresh]


@pytest.mark.parametrize("settings", OTHER_TRAINING, ids=str)
def test_what_trains_otherwise_is_trained(
    digits_experiment: Build, kept: Kept, settings: dict[str, Any]
) -> None:
    _, (_, reused) = outcomes([digits_experiment(), digits_experiment(**settings)])
    assert not any(reused)


@pytest.mark.parametrize(
    "settings",
    [{"copra__initial": 0.3}, {"nemesis__strength": 0.1}, {"harm__factor": 2.0}],
    ids=str,
)
def test_what_is_switched_off_makes_no_other_training(
    digits_experiment: Build, kept: Kept, settings: dict[str, Any]
) -> None:
    """A grid of strengths for a loss that has none trains once."""
    (first, _), (again, reused) = outcomes([digits_experiment(), digits_experiment(**settings)])
    assert all(reused)
    assert again == first


def test_harm_done_to_the_outcome_shares_the_training(digits_experiment: Build, kept: Kept) -> None:
    harm = {"kind": "scaled-update", "clients": [0], "factor": -1.0}
    healthy, harmed = outcomes([digits_experiment(), digits_experiment(harm=harm)])
    assert all(harmed[1])
    assert harmed[0] != healthy[0]


def training(fill: float) -> Training:
    return Training({"x": torch.full((4,), fill)}, Trained(0.0, 0.0), Outcome(0, 1, 0.0, 1.0))


def test_what_is_kept_is_bounded_and_the_longest_unused_goes_first() -> None:
    kept, made = Kept(room=32), list[str]()

    def ask(key: str) -> Training:
        def make() -> Training:
            made.append(key)
            return training(1.0)

        return kept.get_or_make(key, make)

    for key in ("a", "b", "a", "c", "a", "b"):
        ask(key)
    assert made == ["a", "b", "c", "b"]


def test_what_is_kept_is_not_what_the_caller_goes_on_to_change() -> None:
    kept = Kept(room=32)
    first = kept.get_or_make("a", lambda: training(1.0))
    first.state["x"].zero_()
    again = kept.get_or_make("a", lambda: training(2.0))
    assert again.state["x"].tolist() == [1.0] * 4
    assert again.outcome.reused
    assert not first.outcome.reused
