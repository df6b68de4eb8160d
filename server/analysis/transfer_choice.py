"""Which transfer a client starts from, chosen on validation rows; or none, if none is worth it.

Section 7 of our specification of cross-modality transfer. A prior ranks the sources (`gaps`); the
first few are probed in short runs, of which the better half goes on (successive halving, Jamieson
and Talwalkar, AISTATS 2016). Plain tuning and sources without language run beside them at every
length. A transfer is taken only if it beats the best plain tuning by more than one standard error
on the same validation rows. Test rows are never looked at.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from common.config import Experiment, load_experiment
from common.errors import ConfigError
from server.folders import CHOOSING
from server.plans import PlannedRun

KINDS = ("frozen", "projection", "attention")
PROBED_CONTROLS = ("unrelated", "norm-matched")

METHOD = (
    "Every probe trains this client alone, from the seed of the final run, and is scored on "
    "validation rows, which no probe is trained on. Of the transfers the better half, by accuracy "
    "and then by loss, goes on to the next length; plain tuning and the controls always do. The "
    "decision is the paired difference, row by row, between the best transfer and the best plain "
    "tuning of the last length: more than one standard error above zero takes the transfer. One "
    "standard error is a low bar, and the best of several is compared: a transfer that is nothing "
    "but noise passes it more often than one time in six. controls: the transfer of the first "
    "source with random vectors in its place, of norm 1 (unrelated) or with the source's own norms "
    "(norm-matched). A transfer that does not beat these says nothing about language. Test rows "
    "were not looked at."
)


@dataclass(frozen=True)
class Candidate:
    """One way to train: plain, a transfer of a source, or the same of a control."""

    label: str
    role: Literal["plain", "transfer", "control"]
    settings: Mapping[str, Any]
    source: str = ""
    kind: str = "none"


@dataclass(frozen=True)
class Probe:
    """What a candidate reached at one length."""

    candidate: Candidate
    run: PlannedRun
    accuracy: float
    loss: float
    seconds: float
    hits: Tensor

    @property
    def order(self) -> tuple[float, float]:
        """Return what probes are sorted by, the best last."""
        return self.accuracy, -self.loss


@dataclass(frozen=True)
class Choice:
    """What a client chose, and all that it was chosen by, ready for JSON."""

    client: int
    candidate: Candidate
    plain: Candidate
    told: Mapping[str, Any]


# From planned runs to their records, in order; from a finished run to which rows it got right.
RunAll = Callable[[Sequence[PlannedRun]], Sequence[Mapping[str, Any]]]
HitsOf = Callable[[PlannedRun], Tensor]


def plain_candidates(experiment: Experiment) -> list[Candidate]:
    """Return linear probe and visual prompt tuning, with as many vectors as the file says."""
    vectors = experiment.adapter.prompt.visual or experiment.adapter.transfer.length
    return [
        Candidate("linear probe", "plain", {**_NO_TRANSFER, "adapter.prompt.visual": 0}),
        Candidate(
            "visual prompt tuning", "plain", {**_NO_TRANSFER, "adapter.prompt.visual": vectors}
        ),
    ]


_NO_TRANSFER = {
    "adapter.transfer.kind": "none",
    "adapter.transfer.sources": [],
    "adapter.transfer.travels": "projector",
}


def transfer_candidate(
    experiment: Experiment, kind: str, source: str, file: Path, control: str = "none"
) -> Candidate:
    """Return one transfer of one source, or of a control of it."""
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: choose from {', '.join(KINDS)}, or auto")
    of = source if control == "none" else f"{control} vectors"
    travels = experiment.adapter.transfer.travels if kind == "projection" else "projector"
    settings = {
        "adapter.prompt.length": 0,
        "adapter.prompt.visual": 0,
        "adapter.prompt.visual_blocks": 1,
        "adapter.transfer.kind": kind,
        "adapter.transfer.sources": [str(file)],
        "adapter.transfer.control": control,
        "adapter.transfer.travels": travels,
    }
    role: Literal["transfer", "control"] = "transfer" if control == "none" else "control"
    return Candidate(f"{kind} of {of}", role, settings, source, kind)


def lengths_of(rounds: int) -> list[int]:
    """Return the rounds that probes are given: a quarter and a half of a whole run's."""
    return sorted({max(1, rounds // 4), max(1, rounds // 2)})


def choose(
    plan: Callable[[Candidate, int, str], PlannedRun],
    candidates: Sequence[Candidate],
    lengths: Sequence[int],
    client: int,
    run_all: RunAll,
    hits_of: HitsOf,
) -> Choice:
    """Probe the candidates at every length, and decide.

    Args:
        plan: from a candidate, its rounds and the name of the length to the run.
        candidates: plain ones and transfers at least.
    """
    racing, rungs = list(candidates), []
    probes: list[Probe] = []
    for number, rounds in enumerate(lengths):
        cell = f"{CHOOSING}/client{client}-{rounds}-rounds"
        runs = [plan(candidate, rounds, cell) for candidate in racing]
        probes = [
            Probe(
                candidate,
                run,
                float(record["final"]["accuracy"] or 0.0),
                _finite(record["final"]["loss"]),
                sum(row["seconds"]["training"] for row in record["rounds"]),
                hits_of(run),
            )
            for candidate, run, record in zip(racing, runs, run_all(runs), strict=True)
        ]
        rungs.append({"rounds": rounds, "probes": [_told(probe) for probe in probes]})
        if number + 1 < len(lengths):
            transfers = _best_first(probes, "transfer")
            kept = {probe.candidate.label for probe in transfers[: math.ceil(len(transfers) / 2)]}
            racing = [c for c in racing if c.role != "transfer" or c.label in kept]
    best, plain = (_best_first(probes, role)[0] for role in ("transfer", "plain"))
    controls = _best_first(probes, "control")
    difference, error = paired_difference(best.hits, plain.hits)
    taken = best if is_above(difference, error) else plain
    told = {
        "client": client,
        "rows": len(best.hits),
        "rungs": rungs,
        "best_transfer": best.candidate.label,
        "best_plain": plain.candidate.label,
        "difference": difference,
        "error": error,
        "against_control": _against(best, controls[0]) if controls else None,
        "chosen": taken.candidate.label,
    }
    return Choice(client, taken.candidate, plain.candidate, told)


def _best_first(probes: Sequence[Probe], role: str) -> list[Probe]:
    mine = [probe for probe in probes if probe.candidate.role == role]
    return sorted(mine, key=lambda probe: probe.order, reverse=True)


def _against(best: Probe, control: Probe) -> dict[str, Any]:
    difference, error = paired_difference(best.hits, control.hits)
    return {"label": control.candidate.label, "difference": difference, "error": error}


def paired_difference(hits: Tensor, others: Tensor) -> tuple[float, float]:
    """Return the mean difference of two models on the same rows, and its standard error."""
    differences = hits.double() - others.double()
    if len(differences) < 2:
        raise ConfigError(
            f"{len(differences)} validation rows cannot choose between probes; raise "
            "task.validation_fraction"
        )
    return float(differences.mean()), float(differences.std() / len(differences) ** 0.5)


def is_above(difference: float, error: float) -> bool:
    """Say whether a difference is more than one standard error.

    One row of all makes the two equal, which rounding must not decide.
    """
    return difference > error * (1 + 1e-9)


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else float(loss)


def _told(probe: Probe) -> dict[str, Any]:
    return {
        "label": probe.candidate.label,
        "role": probe.candidate.role,
        "accuracy": probe.accuracy,
        "loss": probe.loss,
        "training_seconds": probe.seconds,
    }


def probe_plan(
    file: Path, overrides: Mapping[str, Any], client: int
) -> Callable[[Candidate, int, str], PlannedRun]:
    """Return how a candidate is probed: this client alone, on validation rows."""

    def plan(candidate: Candidate, rounds: int, cell: str) -> PlannedRun:
        settings = {
            **overrides,
            **candidate.settings,
            "strategy.name": "promptfl",
            "federation.only": [client],
            "federation.fraction": 1.0,
            "federation.rounds": rounds,
            "federation.evaluate_every": rounds,
            "task.evaluate_on": "validation",
            "task.include_validation": False,
        }
        return PlannedRun(candidate.label, load_experiment(file, settings), cell)

    return plan


def whole_settings(
    candidate: Candidate, experiment: Experiment, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is laid over the file for a whole run of a candidate.

    Where nothing but heads is trained and heads are local, clients share nothing.
    """
    plain_head = candidate.kind == "none" and not candidate.settings["adapter.prompt.visual"]
    heads_alone = plain_head or candidate.kind == "frozen"
    local = heads_alone and experiment.strategy_name == "local-heads"
    return {
        **overrides,
        **candidate.settings,
        **({"strategy.name": "local-only"} if local else {}),
    }


def final_runs(
    file: Path,
    experiment: Experiment,
    overrides: Mapping[str, Any],
    choices: Sequence[Choice],
) -> list[PlannedRun]:
    """Return a run for every group of clients that chose alike, and one of plain tuning for each.

    A group is of one source, kind and length. Its clients train together, by the file's strategy,
    and share nothing with other groups.
    """
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.candidate.label, []).append(choice)
    runs: dict[str, PlannedRun] = {}
    for members in groups.values():
        only = [choice.client for choice in members]
        for candidate in (members[0].plain, members[0].candidate):
            label = candidate.label
            if len(groups) > 1:
                label += f", clients {' '.join(map(str, only))}"
            settings = whole_settings(candidate, experiment, overrides)
            settings["federation.only"] = only
            runs.setdefault(label, PlannedRun(label, load_experiment(file, settings)))
    return list(runs.values())


def sentence(told: Mapping[str, Any]) -> str:
    """Say what a client chose, and on what."""
    beat = "above" if is_above(told["difference"], told["error"]) else "not above"
    said = (
        f"client {told['client']}: {told['chosen']}. The best transfer, {told['best_transfer']}, "
        f"is {100 * told['difference']:+.1f} points from {told['best_plain']} on "
        f"{told['rows']} validation rows, {beat} one standard error "
        f"({100 * told['error']:.1f} points)"
    )
    if control := told["against_control"]:
        said += (
            f"; from {control['label']} it is {100 * control['difference']:+.1f} "
            f"({100 * control['error']:.1f})"
        )
    return said + "."
