"""CopRA-merge: average what clients have added to the adapter, along lines that a probe may veto.

A server merge of our own, inspired by CopRA's linear mode connectivity (arXiv 2410.22911); the
papers contain no such server. With G the global delta, S_k the part of it that client k was sent
(the best of its rank), and ΔW_k what it returned,

    G⁺ = T_R( G + η Σ_k w_k D_k ),    D_k = ΔW_k - S_k,    w_k = n_k/Σn and η = 1 unless a probe
                                                           set proves other numbers better,

T_R the best approximation of rank R, all from stacked factors: no full matrix is ever formed.
Averaging increments leaves alone what a client of low rank never saw; a plain average of ΔW_k
would shrink it every round. Specification 7; the coefficients are found in `copra_weights`.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from common.candidates import packed
from common.cores import cores_here, in_pieces
from common.errors import ConfigError
from common.lowrank import (
    GAUGES,
    SVD,
    Directions,
    Span,
    Term,
    adapted_modules,
    is_factor,
    named_factors,
)
from common.rules import TURNING
from common.seeds import numpy_generator
from common.tensors import Tensors
from strategies.base import (
    Client,
    FollowUp,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    counted,
    data_weights,
    heads_of,
    merges_so_far,
    model_of,
    revive_dead_directions,
    send_prefix,
)
from strategies.copra_weights import (
    SMALLEST_COHORT,
    Chosen,
    Proposal,
    by_judges,
    choose_step,
    discount_barriers,
    dispensable,
    judged,
    lines_of,
    shorten,
    tilt,
    veto,
    without,
)

_ENOUGH_KEPT = 0.9
_TOO_LITTLE_KEPT = (
    f"of some module the rank keeps less than {_ENOUGH_KEPT:.0%} of the energy; raise server_rank"
)


class CopraMergeOptions(Options):
    """Options of copra-merge.

    Attributes:
        probe: who has labelled rows to try merges on: the `server`; `clients`, of whom a few score
            candidates on rows of their own; or `none`, and increments are weighted by data.
        probe_examples: rows of the probe: on the server, or at each judge.
        judges: how many clients score candidates, with `probe = "clients"`.
        server_rank: rank R of the global adapter; 0 takes the largest rank of any client.
        gauge: how a delta is split into factors: evenly (`balanced`), or with A like a fresh
            adapter's and all singular values in B (`lora`).
        norm_limit: increments longer than this many medians are scaled back to it.
        screening: `gradient` leaves out one by one only the two clients whose slopes make them
            the worst suspects, `none` all of them: K more evaluations.
        veto_z: leave a client out if the merge without it has a loss lower by this many paired
            standard errors.
        barrier_limit: count clients behind a loss barrier less, and veto those behind one of this
            share of the loss at the start; 0 looks for none. Costs two evaluations a client.
        shorten: shorten, to half at most, the increments of clients whose best position on the line
            to what they returned comes before the median client's. Costs two evaluations a client,
            which `barrier_limit` shares.
        tilt_steps: steps of exponentiated gradient on the weights; each costs a backward pass.
        step_lengths: other lengths of the step to try beside 1.
    """

    probe: Literal["server", "clients", "none"] = "server"
    probe_examples: int = Field(512, ge=2)
    judges: int = Field(3, ge=1)
    server_rank: int = Field(0, ge=0)
    gauge: Literal["balanced", "lora"] = "balanced"
    norm_limit: float = Field(5.0, gt=1)
    screening: Literal["gradient", "none"] = "gradient"
    veto_z: float = Field(2.0, gt=0)
    barrier_limit: float = Field(0.0, ge=0)
    shorten: bool = False
    tilt_steps: int = Field(0, ge=0)
    # Never 0: a run that once chose to stand still would stay there.
    step_lengths: tuple[float, ...] = Field((), strict=False)

    @field_validator("step_lengths")
    @classmethod
    def _real_steps(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < length <= 1.5 for length in lengths):
            raise ValueError(f"{list(lengths)}: every length is above 0 and at most 1.5")
        return lengths


def copra_merge(options: CopraMergeOptions, setting: Setting) -> Strategy:
    """Average increments, truncate to the server's rank; ranks may differ."""
    rank = options.server_rank or setting.rank
    if rank < setting.rank:
        raise ConfigError(
            f"strategy.copra-merge.server_rank = {rank}: a client has rank {setting.rank}; choose "
            "at least that, or 0 for the largest of any client"
        )
    server_scale, by_clients = setting.scale(rank), options.probe == "clients"

    def prepare(state: Tensors, updates: Sequence[Update]) -> tuple[_Merger, Proposal]:
        split = GAUGES[options.gauge]
        merger = _Merger(state, updates, rank, server_scale, setting.seed, split)
        limits = merger.length_limits(options.norm_limit)
        return merger, Proposal(tuple(data_weights(updates)), tuple(limits))

    def start(tensors: Tensors) -> Tensors:
        state = dict(heads_of(tensors))
        for module in adapted_modules(tensors):
            term = Term.of(tensors, module)
            alive = torch.ones(term.rank)
            grown = revive_dead_directions(module, term, alive, rank, setting.seed)
            state |= named_factors(module, grown)
        return state

    def send(state: Tensors, client: Client) -> Tensors:
        return send_prefix(state, client, server_scale)

    def merge(state: Tensors, updates: Iterable[Update], probe: Probe | None) -> Merged:
        updates = list(updates)
        merger, plain = prepare(state, updates)
        if options.probe == "clients":
            chosen = by_judges(_candidates(merger, plain), updates)
        elif probe is None:
            chosen = Chosen(plain, {"decision": "no probe set: weighted increments"})
        elif len(updates) < SMALLEST_COHORT:
            chosen = Chosen(plain, {"decision": "too few clients to probe: weighted increments"})
        else:
            chosen = _choose(_Probed(merger, probe, plain.limits), plain, options)
        merged = merger.candidate(chosen.proposal)
        weights = {
            str(u.client.client): w for u, w in zip(updates, chosen.proposal.weights, strict=True)
        }
        clipped = [u.client.client for u, k in zip(updates, plain.limits, strict=True) if k < 1]
        return Merged(
            {**merged.tensors, **counted(state)},
            {
                **merged.energies(),
                "clipped": clipped,
                "vetoed": [],
                **chosen.notes,
                "step": chosen.proposal.step,
                "weights": weights,
            },
        )

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), rank)]

    def ask(state: Tensors, updates: Sequence[Update]) -> Tensors:
        merger, plain = prepare(state, updates)
        return packed([merger.candidate(p).tensors for p in _candidates(merger, plain)])

    def asked(state: Tensors, updates: Sequence[Update]) -> list[int]:
        stream = numpy_generator(setting.seed, "judges", merges_so_far(state))
        clients = [update.client.client for update in updates]
        return sorted(int(k) for k in stream.permutation(clients)[: options.judges])

    return Strategy(
        start=start,
        send=send,
        merge=merge,
        serve=serve,
        rules=replace(TURNING, judge_rows=options.probe_examples if by_clients else 0),
        follow_up=FollowUp("score", ask, asked, indispensable=False) if by_clients else None,
        probe_examples=options.probe_examples if options.probe == "server" else 0,
    )


def _choose(trial: "_Probed", plain: Proposal, options: CopraMergeOptions) -> Chosen:
    """Go through the steps of 7.4; the judging half of the probe rows has the last word."""
    steps: list[Callable[[Proposal], Chosen]] = [
        lambda at: veto(trial, at, options.veto_z, options.screening == "gradient")
    ]
    if options.barrier_limit or options.shorten:
        steps.append(lambda at: _along_lines(trial, at, options))
    if options.tilt_steps:
        steps.append(lambda at: tilt(trial, at, plain.weights, options.tilt_steps))
    if options.step_lengths:
        steps.append(lambda at: choose_step(trial, at, options.step_lengths))
    proposal, notes = plain, dict[str, Any]()
    for step in steps:
        found = step(proposal)
        proposal, notes = found.proposal, notes | found.notes
        if not any(proposal.weights):
            return Chosen(plain, notes | {"decision": "nobody is left: weights by data"})
    if proposal == plain:
        return Chosen(plain, notes | {"decision": "nothing better was found: weights by data"})
    z = judged(trial, plain, proposal)
    left_out = [k for k, w in zip(trial.clients, proposal.weights, strict=True) if w == 0]
    if z > 1:
        said = f"proposal accepted: the judging half gains {z:.1f} standard errors"
        return Chosen(proposal, notes | {"vetoed": left_out, "judged_z": z, "decision": said})
    said = f"proposal dropped: the judging half gains only {z:.1f} standard errors"
    return Chosen(plain, notes | {"judged_z": z, "decision": said})


def _along_lines(trial: "_Probed", start: Proposal, options: CopraMergeOptions) -> Chosen:
    """Do what the lines to the clients suggest: discount barriers, shorten increments, or both."""
    lines = lines_of(trial, start)
    found = Chosen(start)
    if options.barrier_limit:
        found = discount_barriers(trial, start, lines, options.barrier_limit)
    if not options.shorten or not any(found.proposal.weights):
        return found
    shortened = shorten(trial, found.proposal, lines)
    return Chosen(shortened.proposal, found.notes | shortened.notes)


def _candidates(merger: "_Merger", plain: Proposal) -> list[Proposal]:
    """Return what judges compare: weights by data, and these without who agrees least.

    A client agrees by the cosine between its increment and the others' mean; without data on the
    server nothing else is known of it. Left out are the last one, and the last third, but never
    the only one of a task.
    """
    count = len(plain.weights)
    if count < SMALLEST_COHORT:
        return [plain]
    agreement = merger.agreement(plain)
    found = [plain]
    for k in sorted(range(count), key=lambda k: agreement[k]):
        if k in dispensable(merger.tasks, found[-1]) and len(found) <= count // 3:
            found.append(without(found[-1], k))
    # The first two, and the one without the last third.
    return [found[k] for k in sorted({0, min(1, len(found) - 1), len(found) - 1})]


class _Probed:
    """The models of a round, scored on probe rows; a model is merged once for several questions."""

    def __init__(self, merger: "_Merger", probe: Probe, limits: tuple[float, ...]) -> None:
        self._merger, self._probe, self._limits = merger, probe, limits
        self._merged: dict[Proposal, Tensors] = {}
        self._known: tuple[Proposal, slice, Tensor] | None = None

    @property
    def clients(self) -> Sequence[int]:
        return self._merger.clients

    @property
    def tasks(self) -> Sequence[str]:
        return self._merger.tasks

    def losses(self, proposal: Proposal, rows: slice) -> Tensor:
        if self._known and self._known[:2] == (proposal, rows):
            return self._known[2]
        return self._probe.losses(self._model(proposal), rows)

    def slopes(self, proposal: Proposal, rows: slice) -> Tensor:
        model = self._model(proposal)
        losses, found = self._probe.slopes(model, self._merger.increments(), rows)
        self._known = proposal, rows, losses
        return found

    def along(self, client: int, position: float, rows: slice) -> Tensor:
        one = tuple(float(k == client) for k in range(len(self.clients)))
        return self.losses(Proposal(one, self._limits, position), rows)

    def _model(self, proposal: Proposal) -> Tensors:
        if proposal not in self._merged:
            self._merged = {proposal: self._merger.candidate(proposal).tensors}
        return self._merged[proposal]


_T = TypeVar("_T")


def _at_once(work: Callable[[str], _T], modules: Sequence[str]) -> dict[str, _T]:
    """Return the work on every module, done on all cores."""
    return dict(zip(modules, in_pieces(work, modules, cores_here()), strict=True))


@dataclass(frozen=True)
class _Spectrum:
    """Squares of a module's singular values: the largest, those that are kept, and all of them."""

    largest: float
    kept: float
    whole: float

    @property
    def kept_energy(self) -> float:
        return self.kept / self.whole if self.whole > 0 else 1.0

    @property
    def stable_rank(self) -> float | None:
        return self.whole / self.largest if self.largest > 0 else None


@dataclass(frozen=True)
class _Candidate:
    tensors: Tensors
    spectra: Mapping[str, _Spectrum]

    def energies(self) -> dict[str, Any]:
        """Return what truncation keeps, of all and by module, with an alarm where that is little.

        `kept_energy` is `Σ_{i<=R} σ_i² / Σ σ_i²`, `stable_rank` `Σ σ_i² / σ_1²` (7.1).
        """
        spectra = self.spectra.values()
        together = _Spectrum(0.0, sum(s.kept for s in spectra), sum(s.whole for s in spectra))
        least = min(s.kept_energy for s in spectra)
        alarm = {"alarm": _TOO_LITTLE_KEPT} if least < _ENOUGH_KEPT else {}
        return {
            "kept_energy": together.kept_energy,
            "least_kept_energy": least,
            "energy": {
                module: {"kept_energy": s.kept_energy, "stable_rank": s.stable_rank}
                for module, s in self.spectra.items()
            },
            **alarm,
        }


class _Merger:
    """The merge of one round at any weights: one QR a module serves every candidate."""

    def __init__(
        self,
        state: Tensors,
        updates: Sequence[Update],
        rank: int,
        scale: float,
        seed: int,
        split: Callable[[SVD, float], Term],
    ) -> None:
        self._state, self._updates, self._split = state, updates, split
        self._rank, self._scale, self._seed = rank, scale, seed
        self._modules = adapted_modules(state)
        # What was rounded on its way down is no part of G any more: it is stacked by itself.
        self._apart = _sent_otherwise(state, updates, scale)
        sent = [updates[k].sent for k in self._apart]
        self._stacked = [state, *(update.tensors for update in updates), *sent]
        self._spans = _at_once(lambda module: Span(self._terms(module)), self._modules)
        # (K, R): which directions of G each client was sent.
        shares = [0 if k in self._apart else u.client.rank for k, u in enumerate(updates)]
        self._was_sent = torch.stack([(torch.arange(rank) < share).double() for share in shares])
        # (R + Σ r_k, K), and more rows for what is apart: every increment as a sum over the stack.
        rows = [-scale * self._was_sent.T]
        rows += [_column(u.client, u.client.scale, k, len(updates)) for k, u in enumerate(updates)]
        rows += [
            _column(updates[k].client, -updates[k].client.scale, k, len(updates))
            for k in self._apart
        ]
        self._mixing = torch.cat(rows)

    @property
    def clients(self) -> list[int]:
        """Return the clients' numbers."""
        return [update.client.client for update in self._updates]

    @property
    def tasks(self) -> list[str]:
        """Return the clients' tasks."""
        return [update.client.task for update in self._updates]

    def length_limits(self, limit: float) -> list[float]:
        """Return for each client the factor (at most 1) that brings its increment to the limit."""
        gram, sent = self._gram
        lengths = gram.diagonal().clamp_min(0).sqrt().tolist()
        # Of those that trained: if most are idle, the others are no outliers. An idle client's
        # increment is the rounding of what it was sent.
        active = [length for length in lengths if length > 1e-6 * sent]
        bound = limit * statistics.median(active) if active else math.inf
        return [min(1.0, bound / length) if length > 0 else 1.0 for length in lengths]

    @functools.cached_property
    def _gram(self) -> tuple[Tensor, float]:
        """Return the inner products of increments (K, K), and the length of G; over all modules."""
        # Increments, and G itself as one more mixture.
        own = torch.zeros(len(self._mixing), 1, dtype=torch.float64)
        own[: self._rank] = self._scale
        mixing = torch.cat([self._mixing, own], dim=1)
        by_module = _at_once(lambda module: self._spans[module].gram(mixing), self._modules)
        gram = torch.stack(list(by_module.values())).sum(dim=0)
        return gram[:-1, :-1], float(gram[-1, -1].clamp_min(0).sqrt())

    def agreement(self, plain: Proposal) -> list[float]:
        """Return the cosine of each client's increment with the weighted mean of the others'."""
        gram, _ = self._gram
        c = torch.tensor(plain.coefficients, dtype=torch.float64)
        lengths = gram.diagonal().clamp_min(0).sqrt()
        found = []
        for k in range(len(c)):
            others = c.clone()
            others[k] = 0
            size = float((others @ gram @ others).clamp_min(0).sqrt() * lengths[k])
            found.append(float(gram[k] @ others) / size if size > 0 else 0.0)
        return found

    def candidate(self, proposal: Proposal) -> _Candidate:
        """Return `T_R(G + Σ c_k (ΔW_k - S_k))` and heads, c the proposal's coefficients."""
        steps = torch.tensor(proposal.coefficients, dtype=torch.float64)
        # The sent parts lie in the span of G: they only lower its coefficients.
        remaining = self._scale * (1 - steps @ self._was_sent)
        scaled = [float(c) * u.client.scale for c, u in zip(steps, self._updates, strict=True)]
        scaled += [-scaled[k] for k in self._apart]
        merged = self._heads(steps.tolist(), proposal.weights)
        found = _at_once(
            lambda module: self._spans[module].best([remaining, *scaled], self._rank),
            self._modules,
        )
        spectra = {}
        for module, (best, energy) in found.items():
            squares = best.S.square()
            spectra[module] = _Spectrum(float(squares[0]), float(squares.sum()), energy)
            term = self._split(best, self._scale)
            term = revive_dead_directions(module, term, best.S, self._rank, self._seed)
            merged |= named_factors(module, term)
        return _Candidate(merged, spectra)

    def _heads(self, steps: Sequence[float], weights: Sequence[float]) -> dict[str, Tensor]:
        """Average increments of heads over the clients that hold them, with the same weights."""
        heads = heads_of(self._state)
        for name, head in heads.items():
            held = [k for k, u in enumerate(self._updates) if name in u.tensors]
            share = sum(weights[k] for k in held)
            if share > 0:
                increments = (
                    steps[k] / share * (u.tensors[name].double() - u.sent[name].double())
                    for k, u in ((k, self._updates[k]) for k in held)
                )
                heads[name] = (head.double() + sum(increments)).to(head.dtype)
        return heads

    def _terms(self, module: str) -> list[Term]:
        return [Term.of(tensors, module) for tensors in self._stacked]

    def increments(self) -> Directions:
        """Return the clients' increments as directions, heads included."""
        stacks = {}
        for module in self._modules:
            terms = self._terms(module)
            stacks[module] = Term(
                torch.cat([term.B for term in terms], dim=1), torch.cat([term.A for term in terms])
            )
        heads = {
            name: torch.stack(
                [
                    u.tensors[name] - u.sent[name] if name in u.tensors else torch.zeros_like(head)
                    for u in self._updates
                ]
            )
            for name, head in heads_of(self._state).items()
        }
        return Directions(stacks, self._mixing, heads)


def _sent_otherwise(state: Tensors, updates: Sequence[Update], scale: float) -> list[int]:
    """Return the positions of clients that were sent other factors than their part of G."""
    exact: dict[tuple[int, float], Mapping[str, Tensor]] = {}
    found = []
    for k, update in enumerate(updates):
        client = update.client
        kind = client.rank, client.scale  # all that factors depend on
        if kind not in exact:
            sent = send_prefix(state, client, scale)
            exact[kind] = {name: t for name, t in sent.items() if is_factor(name)}
        if not all(torch.equal(update.sent[name], t) for name, t in exact[kind].items()):
            found.append(k)
    return found


def _column(client: Client, scale: float, position: int, count: int) -> Tensor:
    """Return (r, K): the client's factors at this scale, in its own column."""
    rows = torch.zeros(client.rank, count, dtype=torch.float64)
    rows[:, position] = scale
    return rows
