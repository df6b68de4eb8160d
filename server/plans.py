"""Plans of comparisons: which runs there are, which of them only choose settings, and suites.

Pure: experiments go in, experiments come out; nothing runs here.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config import Experiment, load_experiment, parse_assignments, split_alternatives
from common.errors import ConfigError
from server.folders import CHOOSING

# Settings are chosen at a seed that no comparison reports, on validation rows.
TUNING_SEED = 1000


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: its cell, its method's label, and its experiment."""

    label: str
    experiment: Experiment
    cell: str = ""

    @property
    def folder(self) -> str:
        """Return a folder name: the cell, the label and the seed."""
        name = f"{_slug(self.label)}-seed{self.experiment.federation.seed}"
        return f"{_slug(self.cell)}/{name}" if self.cell else name


@dataclass(frozen=True)
class Subject:
    """What is compared: a strategy with settings of its own, under a label."""

    label: str
    strategy: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One federation of a suite: settings laid over the experiment file, for all subjects alike."""

    name: str
    settings: Mapping[str, Any]
    tuned_like: str = ""


@dataclass(frozen=True)
class Suite:
    """A standard grid.

    Attributes:
        summary: what it is, in a line.
        strategies: what is compared, the first being what others are held to.
        axes: by the name of the axis, and of the value, the settings that stand for it.
        tuning: the axes' values at which settings are chosen, for the axes that do not need a
            choice of their own.
        grid: the settings to choose from.
    """

    summary: str
    strategies: tuple[str, ...]
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    tuning: Mapping[str, str]
    grid: Mapping[str, tuple[Any, ...]]


SUITES: Mapping[str, Suite] = {
    "federated-lora": Suite(
        "LoRA on one task: label skew 0.5, 0.1, 0.01; rank 8, 1; all or three in ten clients",
        (
            "fedavg",
            "ffa-lora",
            "rolora",
            "flora",
            "flexlora",
            "fedex-lora",
            "fedsvd",
            "lora-fair",
            "fedrot-lora",
            "copra-merge",
            "fedsa-lora",
            "local-only",
            "centralised",
            "dense-oracle",
        ),
        {
            "alpha": {
                value: {"partition.kind": "dirichlet-labels", "partition.alpha": float(value)}
                for value in ("0.5", "0.1", "0.01")
            },
            # The scale s = alpha/r stays what it is.
            "rank": {
                value: {"adapter.rank": int(value), "adapter.alpha": 2.0 * int(value)}
                for value in ("8", "1")
            },
            "cohort": {
                "all": {"federation.fraction": 1.0},
                "3-in-10": {"federation.fraction": 0.3},
            },
        },
        {"alpha": "0.1", "cohort": "all"},
        {"train.learning_rate": (3e-3, 1e-2, 3e-2, 1e-1)},
    )
}


def subjects_of(
    strategies: Sequence[str], alternatives: Mapping[str, Sequence[Any]]
) -> list[Subject]:
    """Return strategies x settings, in that order.

    A strategy is written `name`, or `name+key=value+key=value` for settings that it alone has.
    """
    varied = [key for key, values in alternatives.items() if len(values) > 1]
    subjects = []
    for strategy in strategies:
        name, *own = strategy.strip().split("+")
        mine = parse_assignments(own)
        for values in itertools.product(*alternatives.values()):
            settings = dict(zip(alternatives, values, strict=True)) | mine
            shown = [*varied, *(key for key in mine if key not in varied)]
            label = " · ".join([name, *(f"{key}={_shown(settings[key])}" for key in shown)])
            subjects.append(Subject(label, name, settings))
    labels = [subject.label for subject in subjects]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"the comparison has {repeated[0]} more than once")
    return subjects


def named_subjects(
    strategy: str,
    named: Mapping[str, Mapping[str, Any]],
    alternatives: Mapping[str, Sequence[Any]],
) -> list[Subject]:
    """Return the subjects that an experiment file names x settings; `strategy` is the file's."""
    subjects = []
    for label, own in named.items():
        mine = {key: value for key, value in own.items() if key != "strategy.name"}
        open_ = {key: values for key, values in alternatives.items() if key not in mine}
        varied = [key for key, values in open_.items() if len(values) > 1]
        for values in itertools.product(*open_.values()):
            settings = dict(zip(open_, values, strict=True)) | mine
            shown = [f"{key}={_shown(settings[key])}" for key in varied]
            name = str(own.get("strategy.name", strategy))
            subjects.append(Subject(" · ".join([label, *shown]), name, settings))
    return subjects


def checked_alternatives(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """Return the settings to compare, without those that have an option of their own.

    Raises:
        ConfigError: seeds or strategies among them.
    """
    alternatives = split_alternatives(assignments)
    for key, option in {"federation.seed": "--seeds", "strategy.name": "--strategies"}.items():
        if key in alternatives:
            raise ConfigError(f"--set {key}: in a comparison, say {option} instead")
    return alternatives


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Return the seeds.

    Raises:
        ConfigError: one of them is no whole number.
    """
    for text in texts:
        if not text.strip().isdigit():
            raise ConfigError(f"--seeds {text!r}: seeds are whole numbers from 0, as in 0,1,2")
    return [int(text) for text in texts]


def cells_of(suite: Suite, only: Sequence[str]) -> list[Cell]:
    """Return the cells of a suite, or those with `axis=value` for every axis in `only`.

    Raises:
        ConfigError: no such axis or value.
    """
    chosen = {axis: list(values) for axis, values in suite.axes.items()}
    for text in only:
        axis, _, wanted = text.partition("=")
        known = suite.axes.get(axis, {})
        if not known or not set(wanted.split(",")) <= set(known):
            axes = "; ".join(f"{name}={','.join(there)}" for name, there in suite.axes.items())
            raise ConfigError(f"--only {text}: choose among {axes}")
        chosen[axis] = wanted.split(",")
    cells = []
    for values in itertools.product(*chosen.values()):
        place = dict(zip(chosen, values, strict=True))
        settings: dict[str, Any] = {}
        for axis, value in place.items():
            settings |= suite.axes[axis][value]
        cells.append(Cell(_cell_name(place), settings, _cell_name(place | dict(suite.tuning))))
    return cells


def tuning_cells(suite: Suite, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells at which settings are chosen for these cells."""
    everywhere = {cell.name: cell for cell in cells_of(suite, ())}
    return [everywhere[name] for name in dict.fromkeys(cell.tuned_like for cell in cells)]


def plan_runs(
    file: Path, subjects: Sequence[Subject], cells: Sequence[Cell], seeds: Sequence[int]
) -> list[PlannedRun]:
    """Return every run of cells x subjects x seeds, in that order.

    Raises:
        ConfigError: any of them could not be meant.
    """
    return [
        PlannedRun(
            subject.label,
            load_experiment(
                file,
                {
                    **cell.settings,
                    **subject.settings,
                    "strategy.name": subject.strategy,
                    "federation.seed": seed,
                },
            ),
            cell.name,
        )
        for cell in cells
        for subject in subjects
        for seed in seeds
    ]


ONE_CELL = (Cell("", {}),)


# --- choosing settings ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A point of the grid for a subject in some cells: a run at every seed that chooses."""

    subject: Subject
    settings: Mapping[str, Any]
    runs: Sequence[PlannedRun]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a subject, and of what."""

    subject: str
    cell: str
    settings: Mapping[str, Any]
    tried: list[dict[str, Any]] = field(default_factory=list)


def plan_trials(
    file: Path,
    subjects: Sequence[Subject],
    cells: Sequence[Cell],
    grid: Mapping[str, Sequence[Any]],
    count: int = 1,
) -> list[Trial]:
    """Return runs on validation rows for every subject, cell and point of the grid.

    Arguments:
        count: seeds that choose together; none of them is one that is reported.

    Raises:
        ConfigError: any of them could not be meant.
    """
    trials = []
    for cell, subject in itertools.product(cells, subjects):
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            shown = [f"{key}={_shown(value)}" for key, value in settings.items()]
            tried = Subject(
                " · ".join([subject.label, *shown]),
                subject.strategy,
                {**subject.settings, **settings},
            )
            place = Cell(
                f"{CHOOSING}/{cell.name}" if cell.name else CHOOSING,
                {**cell.settings, "task.evaluate_on": "validation"},
            )
            seeds = range(TUNING_SEED, TUNING_SEED + count)
            trials.append(Trial(subject, settings, plan_runs(file, [tried], [place], seeds)))
    return trials


def choose(trials: Sequence[Trial], records: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """Return the best settings of every subject and cell by the last round's validation score.

    By accuracy (on its clients' own labels, for a personalised method), then by loss, both means
    over the seeds that choose, then the earlier in the grid.

    Arguments:
        records: of the trials' runs, in order.
    """
    choices: dict[tuple[str, str], Choice] = {}
    best: dict[tuple[str, str], tuple[float, float]] = {}
    finished = iter(records)
    for trial in trials:
        own = [next(finished) for _ in trial.runs]
        place = trial.runs[0].cell
        key = (place, trial.subject.label)
        accuracies, losses = zip(*(_score(record["final"]) for record in own), strict=True)
        score = (fmean(accuracies), fmean(losses))
        rows = [row for record in own for row in record["rounds"]]
        tried = choices[key].tried if key in choices else []
        tried.append(
            {
                "settings": dict(trial.settings),
                "runs": len(own),
                "accuracy": score[0],
                "loss": -score[1],
                "bytes": sum(row["bytes"][way]["total"] for row in rows for way in ("up", "down")),
                "seconds": sum(row["seconds"]["training"] for row in rows),
            }
        )
        if key not in best or score > best[key]:
            best[key] = score
            cell = place.removeprefix(CHOOSING).removeprefix("/")
            choices[key] = Choice(trial.subject.label, cell, trial.settings, tried)
    return list(choices.values())


def with_choices(
    file: Path,
    subjects: Sequence[Subject],
    cells: Sequence[Cell],
    seeds: Sequence[int],
    choices: Sequence[Choice],
) -> list[PlannedRun]:
    """Return the runs of the comparison, every subject with what was chosen for it."""
    chosen = {(choice.cell, choice.subject): choice.settings for choice in choices}
    runs = []
    for cell in cells:
        there = [
            Subject(s.label, s.strategy, {**s.settings, **chosen[cell.tuned_like, s.label]})
            for s in subjects
        ]
        runs += plan_runs(file, there, [cell], seeds)
    return runs


def _score(final: Mapping[str, Any]) -> tuple[float, float]:
    single = final["accuracy"] is not None
    accuracy, loss = (
        (final["accuracy"], final["loss"])
        if single
        else (
            final["own_accuracy"],
            final["own_loss"],
        )
    )
    finite = accuracy is not None and loss is not None
    return (float(accuracy), -float(loss)) if finite else (-1.0, float("-inf"))


def _cell_name(place: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in place.items())


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=/-]+", "-", text).strip("-")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
