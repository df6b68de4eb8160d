"""Plans of comparisons and suites, and how settings are chosen: no run is made here."""

from pathlib import Path
from typing import Any

import pytest

from common.config import load_subjects
from common.errors import ConfigError
from server.plans import (
    ONE_CELL,
    SUITES,
    TUNING_SEED,
    cells_of,
    choose,
    named_subjects,
    plan_runs,
    plan_trials,
    subjects_of,
    tuning_cells,
    with_choices,
)
from strategies import STRATEGIES, resolve

DIGITS = Path(__file__).parent.parent / "experiments" / "digits.toml"
SUITE = SUITES["federated-lora"]


def test_every_run_of_a_suite_can_be_meant() -> None:
    cells = cells_of(SUITE, ())
    runs = plan_runs(DIGITS, subjects_of(SUITE.strategies, {}), cells, [0, 1])
    assert len(cells) == 3 * 2 * 2
    assert len(runs) == 12 * len(SUITE.strategies) * 2
    for run in runs:
        resolve(run.experiment)
    assert len({run.folder for run in runs}) == len(runs)
    assert set(SUITE.strategies) <= set(STRATEGIES)


def test_cells_lay_the_same_settings_over_every_strategy() -> None:
    cells = cells_of(SUITE, ["alpha=0.01", "cohort=3-in-10"])
    assert [cell.name for cell in cells] == [
        "alpha=0.01, rank=8, cohort=3-in-10",
        "alpha=0.01, rank=1, cohort=3-in-10",
    ]
    for run in plan_runs(DIGITS, subjects_of(["fedavg", "flora"], {}), cells, [0]):
        experiment = run.experiment
        assert experiment.partition.alpha == 0.01
        assert experiment.federation.fraction == 0.3
        assert experiment.adapter.scale(experiment.adapter.rank) == 2.0


@pytest.mark.parametrize("only", ["alpha=0.2", "beta=1", "alpha"])
def test_an_unknown_cell_is_refused_with_the_choices(only: str) -> None:
    with pytest.raises(ConfigError, match=r"alpha=0\.5,0\.1,0\.01"):
        cells_of(SUITE, [only])


def test_settings_are_chosen_on_validation_rows_at_a_seed_that_is_not_reported() -> None:
    cells = cells_of(SUITE, ())
    places = tuning_cells(SUITE, cells)
    # The rank has a choice of its own; label skew and cohort take over what was chosen.
    assert [cell.name for cell in places] == [
        "alpha=0.1, rank=8, cohort=all",
        "alpha=0.1, rank=1, cohort=all",
    ]
    trials = plan_trials(DIGITS, subjects_of(["fedavg", "flora"], {}), places, SUITE.grid)
    assert len(trials) == 2 * 2 * 4
    for trial in trials:
        [run] = trial.runs
        assert run.experiment.task.evaluate_on == "validation"
        assert run.experiment.federation.seed == TUNING_SEED


def finished(
    accuracy: float | None, loss: float | None, own: float | None = None
) -> dict[str, Any]:
    row = {"bytes": {"up": {"total": 10}, "down": {"total": 5}}, "seconds": {"training": 2.0}}
    final = {"accuracy": accuracy, "loss": loss, "own_accuracy": own, "own_loss": loss}
    return {"final": final, "rounds": [row, row]}


@pytest.mark.parametrize(
    ("records", "best"),
    [
        ([finished(0.5, 1.0), finished(0.7, 1.0), finished(0.6, 1.0)], 2),
        ([finished(0.7, 1.0), finished(0.7, 0.8), finished(0.6, 0.1)], 2),
        ([finished(0.7, 1.0), finished(0.7, 1.0), finished(0.7, 1.0)], 1),
        ([finished(0.7, None), finished(0.2, 2.0), finished(0.1, 1.0)], 2),
        ([finished(None, 1.0, 0.3), finished(None, 1.0, 0.2), finished(None, 1.0, 0.4)], 3),
    ],
)
def test_the_best_setting_is_that_of_the_last_round(
    records: list[dict[str, Any]], best: int
) -> None:
    subjects = subjects_of(["fedavg"], {})
    grid = {"train.local_steps": (1, 2, 3)}
    trials = plan_trials(DIGITS, subjects, ONE_CELL, grid)
    [choice] = choose(trials, records)
    assert choice.settings == {"train.local_steps": best}
    assert [trial["bytes"] for trial in choice.tried] == [30] * 3
    runs = with_choices(DIGITS, subjects, ONE_CELL, [0, 1], [choice])
    assert [run.experiment.train.local_steps for run in runs] == [best, best]
    assert {run.experiment.task.evaluate_on for run in runs} == {"test"}
    assert {run.label for run in runs} == {"fedavg"}


def test_several_seeds_choose_by_their_mean() -> None:
    trials = plan_trials(
        DIGITS, subjects_of(["fedavg"], {}), ONE_CELL, {"train.local_steps": (1, 2)}, count=2
    )
    seeds = [[run.experiment.federation.seed for run in trial.runs] for trial in trials]
    assert seeds == [[TUNING_SEED, TUNING_SEED + 1]] * 2
    # The first alone is best at the first seed.
    records = [finished(0.9, 0.1), finished(0.3, 2.0), finished(0.7, 0.5), finished(0.6, 0.5)]
    [choice] = choose(trials, records)
    assert choice.settings == {"train.local_steps": 2}
    assert [trial["accuracy"] for trial in choice.tried] == pytest.approx([0.6, 0.65])
    assert [(trial["runs"], trial["bytes"]) for trial in choice.tried] == [(2, 60)] * 2


# --- subjects that a file names -------------------------------------------------------------------

TRANSFER = DIGITS.with_name("transfer.toml")


def test_a_file_names_what_is_compared() -> None:
    named = load_subjects(TRANSFER)
    assert next(iter(named)) == "visual prompt tuning"
    assert named["attention, norms alone"] == {
        "adapter.transfer.kind": "attention",
        "adapter.transfer.control": "norm-matched",
    }
    subjects = named_subjects("promptfl", named, {})
    runs = plan_runs(TRANSFER, subjects, ONE_CELL, [0, 1])
    assert len(runs) == 2 * len(named)
    by_label = {run.label: run.experiment.adapter for run in runs}
    assert by_label["linear probe"].transfer.kind == "none"
    assert by_label["visual prompt tuning"].prompt.visual == 20
    assert by_label["frozen"].transfer.kind == "frozen"
    # A control is drawn anew for every seed.
    assert [r.experiment.adapter.transfer.draw for r in runs if r.label == "frozen"] == [0, 1]


def test_settings_are_laid_under_those_of_a_subject() -> None:
    named = {"a": {"train.learning_rate": 0.5}, "b": {"strategy.name": "fedprox"}}
    found = named_subjects("fedavg", named, {"train.learning_rate": [0.1, 0.2]})
    assert [(s.label, s.strategy, s.settings["train.learning_rate"]) for s in found] == [
        ("a", "fedavg", 0.5),
        ("b · train.learning_rate=0.1", "fedprox", 0.1),
        ("b · train.learning_rate=0.2", "fedprox", 0.2),
    ]


def test_subjects_are_tables(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("subjects = 3\n")
    with pytest.raises(ConfigError, match="subjects are tables"):
        load_subjects(tmp_path / "x.toml")
    assert load_subjects(DIGITS) == {}
