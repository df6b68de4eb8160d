"""From a bank and an experiment of vision clients to the runs that `fedcopra transfer` makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Experiment, load_experiment
from common.errors import ConfigError
from common.prompt_bank import ENDING, BankEntry, load_bank
from common.source_ranking import best_first
from server.analysis.gaps import measure_gaps
from server.analysis.stored_run import Scorer, open_run
from server.analysis.transfer_choice import (
    KINDS,
    METHOD,
    PROBED_CONTROLS,
    Candidate,
    Choice,
    choose,
    final_runs,
    lengths_of,
    plain_candidates,
    probe_plan,
    sentence,
    transfer_candidate,
    whole_settings,
)
from server.plans import PlannedRun


@dataclass(frozen=True)
class Wish:
    """What is asked for: a bank, an experiment file and what is laid over it, and how to choose."""

    bank: Path
    file: Path
    overrides: Mapping[str, Any]
    experiment: Experiment
    kind: str
    source: str
    shortlist: int


@dataclass(frozen=True)
class Selected:
    """The runs to make, and what they were selected on, ready for JSON."""

    runs: list[PlannedRun]
    found: Mapping[str, Any]


RunIn = Callable[[Sequence[PlannedRun], Path], Sequence[Mapping[str, Any]]]


def select(wish: Wish, folder: Path, run_in: RunIn) -> Selected:
    """Choose what clients start from; probes are run in `folder`.

    Raises:
        ConfigError: there is no such source, or the experiment is not one of pictures and prompts.
    """
    bank = load_bank(wish.bank)
    if wish.source and wish.source not in bank:
        raise ConfigError(f"--source {wish.source}: choose from {', '.join(bank)}")
    if wish.experiment.adapter.kind != "prompt":
        raise ConfigError(
            f"{wish.file}: adapter.kind = {wish.experiment.adapter.kind!r}; prompts are "
            "transferred to clients that train one: set it to 'prompt'"
        )
    clients = wish.experiment.members
    sources = {wish.source: bank[wish.source]} if wish.source else bank
    ranked = {client: _ranked(sources, wish.experiment, client) for client in clients}
    if wish.kind != "auto":
        return _one_for_all(wish, ranked)
    choices = [_probed(wish, client, ranked[client], folder, run_in) for client in clients]
    return Selected(
        final_runs(wish.file, wish.experiment, wish.overrides, choices),
        {
            "kind": "auto",
            "sentences": [sentence(choice.told) for choice in choices],
            "ranks": ranked,
            "clients": [choice.told for choice in choices],
            "method": METHOD,
        },
    )


def _ranked(bank: Mapping[str, BankEntry], experiment: Experiment, client: int) -> list[str]:
    """Return the sources, what to try first in front, by this client's own pictures."""
    if len(bank) == 1:
        return list(bank)
    found = measure_gaps(bank, experiment, [client])
    return best_first({source["name"]: source["prior"] for source in found["sources"]})


def _one_for_all(wish: Wish, ranked: Mapping[int, Sequence[str]]) -> Selected:
    """Let one source serve all clients: the wanted one, or the first by the sum of their ranks."""
    names = next(iter(ranked.values()))
    ranks = {name: sum(order.index(name) for order in ranked.values()) for name in names}
    chosen = min(names, key=lambda name: (ranks[name], name))
    candidate = _candidate(wish, wish.kind, chosen)
    plain = plain_candidates(wish.experiment)
    choices = [Choice(client, candidate, plain[1], {}) for client in ranked]
    how = (
        "as asked for"
        if wish.source
        else f"first of {len(names)} by -z(gap) + z(log rows), summed over ranks of "
        f"{len(ranked)} clients; no row was used to choose, and training may show it to be bad"
    )
    settings = whole_settings(plain[0], wish.experiment, wish.overrides)
    linear = PlannedRun(plain[0].label, load_experiment(wish.file, settings))
    return Selected(
        [linear, *final_runs(wish.file, wish.experiment, wish.overrides, choices)],
        {
            "kind": wish.kind,
            "sentences": [f"{candidate.label}: {how}."],
            "ranks": ranked,
            "clients": [],
            "method": "No probe was run; the kind was given.",
        },
    )


def _candidate(wish: Wish, kind: str, name: str, control: str = "none") -> Candidate:
    file = wish.bank / (name + ENDING)
    return transfer_candidate(wish.experiment, kind, name, file, control)


def _probed(wish: Wish, client: int, ranked: Sequence[str], folder: Path, run_in: RunIn) -> Choice:
    tried = ranked[: wish.shortlist]
    candidates = [
        *plain_candidates(wish.experiment),
        *(_candidate(wish, kind, name) for name in tried for kind in KINDS),
        *(_candidate(wish, "projection", tried[0], control) for control in PROBED_CONTROLS),
    ]

    def hits_of(run: PlannedRun) -> Tensor:
        return Scorer(run.experiment, "validation")(open_run(folder / run.folder).one_model()).hits

    return choose(
        probe_plan(wish.file, wish.overrides, client),
        candidates,
        lengths_of(wish.experiment.federation.rounds),
        client,
        lambda runs: run_in(runs, folder),
        hits_of,
    )
