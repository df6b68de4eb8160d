"""How good every way to choose a source prompt would have been, once every source was tried.

Needs what nobody has beforehand: finished runs of the transfer of every source of a bank to one
target. Their test rows say which source was best; the selectors see none of them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config import Experiment, build_experiment
from common.errors import ConfigError
from common.nemesis import vector_norms
from common.prompt_bank import BankEntry
from common.source_ranking import Scores, best_first, ranking_quality
from server.analysis.gaps import measure_gaps
from server.folders import CHOOSING
from server.plans import PlannedRun
from server.reporting.report import read_records

METHOD = (
    "outcome: accuracy on test rows after the last round, mean over seeds, of the transfer of each "
    "source. Each selector scores the sources for every seed by what a client of that seed has; "
    "no test row is among it. Kendall's tau-a and Spearman's rho hold its scores against the "
    "outcomes; regret is the outcome of the best source less that of the one it puts first; all "
    "three are means over seeds, and then over comparisons. gap: less is better; prior: "
    "-z(gap) + z(log rows); rows: the source's training rows, more is better; norm: the mean norm "
    "of its vectors, larger is better; own score: its accuracy on its own task; probe: a quarter "
    "of the run's rounds (one at least), scored on validation rows, ties by loss; random: what "
    "drawing a source gives on average. A selector stands only where every source has what it goes "
    "by. another seed: a whole run of each source, scored on test rows, against the mean of the "
    "other seeds: no selector, but about as well as outcomes can be foretold at all. seconds: of "
    "the choice, all sources together, a seed; those of the gap cover random vectors of the same "
    "norms, which are measured beside. bytes: what a client must be given of the bank before it "
    "can choose: all prompts, or a number for each."
)
NUMBER = 8  # bytes of one number a source

# From planned runs to their records, in order.
RunAll = Callable[[Sequence[PlannedRun]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Tried:
    """One comparison in which every source of a bank was transferred, by one kind of transfer.

    Attributes:
        name: of the comparison's folder.
        experiments: by seed and source.
        accuracies: on test rows, by seed and source.
    """

    name: str
    kind: str
    experiments: Mapping[int, Mapping[str, Experiment]]
    accuracies: Mapping[int, Scores]

    @property
    def outcomes(self) -> dict[str, float]:
        """Return the mean over seeds, by source."""
        seeds = list(self.accuracies.values())
        return {source: fmean(of[source] for of in seeds) for source in seeds[0]}


@dataclass(frozen=True)
class Scored:
    """What a selector says of every source, and what that took.

    Attributes:
        scores: higher for the better source.
        size: bytes that a client must be given.
    """

    scores: Scores
    seconds: float
    size: int


@dataclass
class _Selector:
    """A selector's scores and quality over the seeds of a comparison."""

    name: str
    seconds: list[float] = field(default_factory=list)
    size: int = 0
    chosen: dict[int, str] = field(default_factory=dict)
    scores: dict[int, Scores] = field(default_factory=dict)
    qualities: list[Mapping[str, float | None]] = field(default_factory=list)


def tried_sources(folder: Path, bank: Mapping[str, BankEntry], kind: str = "") -> Tried:
    """Return what a comparison has found of every source; controls and plain tuning are left out.

    Args:
        kind: of transfer; empty for the only one there is.

    Raises:
        ConfigError: a source was not transferred at every seed, there are transfers of several
            kinds, twice the same, or some that were not scored on test rows.
        DataError: there are no records.
    """
    records = [r for r in read_records(folder) if _of_one_source(r["experiment"])]
    kinds = sorted({_transfer(record)["kind"] for record in records})
    if kind and kind not in kinds:
        raise ConfigError(
            f"{folder}: --kind {kind}: the sources were transferred by {', '.join(kinds) or 'none'}"
        )
    if not kind and len(kinds) != 1:
        there = f"choose --kind from {', '.join(kinds)}" if kinds else "no source was transferred"
        raise ConfigError(f"{folder}: {there}; sources are ranked by one kind of transfer")
    experiments: dict[int, dict[str, Experiment]] = {}
    accuracies: dict[int, dict[str, float]] = {}
    for record in records:
        if _transfer(record)["kind"] != (kind or kinds[0]):
            continue
        source, seed = Path(_transfer(record)["sources"][0]).stem, int(record["seed"])
        if source in experiments.setdefault(seed, {}):
            raise ConfigError(f"{folder}: {source} was transferred twice at seed {seed}")
        if record["task"]["evaluated_on"] != "test" or record["final"]["accuracy"] is None:
            raise ConfigError(
                f"{folder}: {record['label']}, seed {seed}, has no accuracy of one model on test "
                "rows to rank sources by"
            )
        experiments[seed][source] = build_experiment(record["experiment"], origin=str(folder))
        accuracies.setdefault(seed, {})[source] = float(record["final"]["accuracy"])
    for seed, of in experiments.items():
        if missing := sorted(bank.keys() ^ of.keys()):
            raise ConfigError(
                f"{folder}: at seed {seed} {missing[0]} is in the bank, or was transferred, but "
                "not both; a ranking needs every source"
            )
    return Tried(folder.resolve().name, kind or kinds[0], experiments, accuracies)


def _transfer(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record["experiment"]["adapter"]["transfer"]
    return found


def _of_one_source(experiment: Mapping[str, Any]) -> bool:
    transfer = experiment["adapter"].get("transfer", {})
    return len(transfer.get("sources", ())) == 1 and transfer["control"] == "none"


def judge_selectors(
    bank: Mapping[str, BankEntry], tried: Sequence[Tried], run_all: RunAll
) -> dict[str, Any]:
    """Return how well every selector ranks the sources of every comparison, for JSON.

    Args:
        run_all: makes the runs of the probes.

    Raises:
        ConfigError: two comparisons have one name, or a probe has no validation rows.
    """
    names = [found.name for found in tried]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two comparisons are called {repeated[0]}; rename a folder")
    comparisons = [_judged(bank, found, run_all) for found in tried]
    kept = [[row["selector"] for row in found["selectors"]] for found in comparisons]
    return {
        "sources": sorted(bank),
        "overall": [
            {"selector": name, **_means([_row(found, name) for found in comparisons])}
            for name in kept[0]
            if all(name in there for there in kept)
        ],
        "comparisons": comparisons,
        "method": METHOD,
    }


def _judged(bank: Mapping[str, BankEntry], tried: Tried, run_all: RunAll) -> dict[str, Any]:
    outcomes = tried.outcomes
    found: dict[str, _Selector] = {}
    for seed, experiments in tried.experiments.items():
        scored = {
            **_by_numbers(bank),
            **_by_gap(bank, next(iter(experiments.values()))),
            "probe": _by_probe(bank, tried, seed, run_all),
        }
        for name, of in scored.items():
            selector = found.setdefault(name, _Selector(name, size=of.size))
            selector.seconds.append(of.seconds)
            selector.scores[seed] = of.scores
            selector.chosen[seed] = best_first(of.scores)[0]
            selector.qualities.append(asdict(ranking_quality(of.scores, outcomes)))
    rows: list[dict[str, Any]] = [
        {
            "selector": selector.name,
            **_means(selector.qualities),
            "seconds": fmean(selector.seconds),
            "bytes": selector.size,
            "chosen": selector.chosen,
            "scores": selector.scores,
        }
        for selector in found.values()
    ]
    nobody: dict[str, Any] = {"seconds": 0.0, "bytes": 0, "chosen": {}, "scores": {}}
    best = max(outcomes.values())
    drawn = {"kendall": 0.0, "spearman": 0.0, "regret": best - fmean(outcomes.values())}
    rows.append({"selector": "random", **drawn, **nobody})
    if len(tried.accuracies) > 1:
        rows.append({"selector": "another seed", **_another_seed(tried), **nobody})
    first = next(iter(next(iter(tried.experiments.values())).values()))
    return {
        "comparison": tried.name,
        "task": first.task.label,
        "kind": tried.kind,
        "seeds": list(tried.accuracies),
        "outcomes": {source: outcomes[source] for source in best_first(outcomes)},
        "accuracies": tried.accuracies,
        "selectors": rows,
    }


def _by_numbers(bank: Mapping[str, BankEntry]) -> dict[str, Scored]:
    """Return selectors that go by one number of a source, whatever the target."""
    wanted: Mapping[str, Callable[[BankEntry], float | None]] = {
        "rows": lambda entry: entry.examples,
        "norm": lambda entry: float(vector_norms(entry.rows()).mean()),
        "own score": lambda entry: entry.score,
    }
    found = {}
    for name, number in wanted.items():
        began = time.perf_counter()
        values = {source: number(entry) for source, entry in bank.items()}
        known = {source: float(value) for source, value in values.items() if value is not None}
        if len(known) == len(bank):
            found[name] = Scored(known, time.perf_counter() - began, NUMBER * len(bank))
    return found


def _by_gap(bank: Mapping[str, BankEntry], experiment: Experiment) -> dict[str, Scored]:
    measured = measure_gaps(bank, experiment, experiment.members)
    seconds, size = sum(measured["seconds"].values()), _prompts_size(bank)
    gaps = {row["name"]: -row["gap"] for row in measured["sources"]}
    found = {"gap": Scored(gaps, seconds, size)}
    # Without the rows of all of them the prior is the gap once more.
    if all(entry.examples for entry in bank.values()):
        priors = {row["name"]: row["prior"] for row in measured["sources"]}
        found["prior"] = Scored(priors, seconds, size + NUMBER * len(bank))
    return found


def _by_probe(bank: Mapping[str, BankEntry], tried: Tried, seed: int, run_all: RunAll) -> Scored:
    experiments = tried.experiments[seed]
    cell = f"{CHOOSING}/{tried.name}"
    runs = [
        PlannedRun(f"{tried.kind} of {source}", probe_of(experiment), cell)
        for source, experiment in experiments.items()
    ]
    records = dict(zip(experiments, run_all(runs), strict=True))
    # Validation rows are few and ties many; of two alike the one with less loss is better.
    order = sorted(
        records,
        key=lambda source: (
            records[source]["final"]["accuracy"] or 0.0,
            -_or_infinite(records[source]["final"]["loss"]),
        ),
    )
    seconds = sum(row["seconds"]["wall"] for record in records.values() for row in record["rounds"])
    ranks = {source: float(order.index(source)) for source in experiments}
    return Scored(ranks, seconds, _prompts_size(bank))


def probe_of(experiment: Experiment) -> Experiment:
    """Return the same training, a quarter as long and scored on validation rows."""
    rounds = max(1, experiment.federation.rounds // 4)
    changes = {
        "federation.rounds": rounds,
        "federation.evaluate_every": rounds,
        "task.evaluate_on": "validation",
        "task.include_validation": False,
    }
    return build_experiment(json.loads(experiment.model_dump_json()), changes)


def _or_infinite(loss: float | None) -> float:
    return float("inf") if loss is None else float(loss)


def _prompts_size(bank: Mapping[str, BankEntry]) -> int:
    return sum(entry.prompt.numel() * entry.prompt.element_size() for entry in bank.values())


def _another_seed(tried: Tried) -> dict[str, Any]:
    """Return how well the runs of one seed rank the sources as the other seeds do."""
    found = []
    for seed, scores in tried.accuracies.items():
        others = [of for other, of in tried.accuracies.items() if other != seed]
        outcomes = {source: fmean(of[source] for of in others) for source in scores}
        found.append(asdict(ranking_quality(scores, outcomes)))
    return _means(found)


_MEASURES = ("kendall", "spearman", "regret", "seconds", "bytes")


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of every measure over the rows that have it; None where none has."""
    found: dict[str, float | None] = {}
    for measure in (m for m in _MEASURES if m in rows[0]):
        known = [row[measure] for row in rows if row[measure] is not None]
        found[measure] = fmean(known) if known else None
    return found


def _row(comparison: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(r for r in comparison["selectors"] if r["selector"] == name)
    return found
