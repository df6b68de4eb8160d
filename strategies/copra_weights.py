"""Coefficients of a merge, found on a probe set and never trusted further than it can tell.

A proposal says how much of every client's increment is merged. It starts from the data's weights
`w⁰_k = n_k/Σn`; each step below may change it on one half of the probe rows, and the other half
judges: unless the whole proposal gains more than one standard error there, w⁰ is merged after all.
Losses are compared row by row. Source: copra specification 7.3 and 7.4.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from common.candidates import ERRORS, GAINS
from common.paths import standard_error
from strategies.base import Update

# One half of the probe rows proposes, the other judges.
CHOOSE, JUDGE = slice(0, None, 2), slice(1, None, 2)
SMALLEST_COHORT = 3  # at most a third of the clients may be vetoed
# A slope that says that a client hurts, by this share of the veto's standard errors, makes it a
# suspect: slopes are exact for small weights only.
_SUSPECT = 0.75
_MOST_TRIED = 2  # a trial costs half of what all slopes cost together
_TILT_RATE, _TILT_ANCHOR = 2.0, 0.1  # a and ρ of 7.4, step 4
_MOST_OF_BY_DATA = 3.0
_SHORTEST = 0.5  # an increment is shortened to half at most


@dataclass(frozen=True)
class Proposal:
    """What to merge.

    Attributes:
        weights: w_k, one a client, summing to 1.
        limits: factors of at most 1 on the increments, from their lengths and barriers.
        step: η, on the mean increment.
    """

    weights: tuple[float, ...]
    limits: tuple[float, ...]
    step: float = 1.0

    @property
    def coefficients(self) -> list[float]:
        """Return what each client's increment is multiplied by."""
        return [self.step * w * limit for w, limit in zip(self.weights, self.limits, strict=True)]


class Trial(Protocol):
    """The models that a round's updates could be merged into, scored on probe rows."""

    @property
    def clients(self) -> Sequence[int]:
        """Return the numbers of the clients, in the order of weights."""

    @property
    def tasks(self) -> Sequence[str]:
        """Return the task of each client."""

    def losses(self, proposal: Proposal, rows: slice) -> Tensor:
        """Return the losses (n,) of the model that a proposal gives."""

    def slopes(self, proposal: Proposal, rows: slice) -> Tensor:
        """Return (n, K): their derivatives along each client's increment."""

    def along(self, client: int, position: float, rows: slice) -> Tensor:
        """Return the losses (n,) at `G + λ·D_k`, at the position λ; D_k within its length limit."""


@dataclass(frozen=True)
class Chosen:
    """A proposal, and what was found on the way to it."""

    proposal: Proposal
    notes: dict[str, Any] = field(default_factory=dict)


def paired_z(losses: Tensor, others: Tensor) -> float:
    """Return how many standard errors the mean loss falls from `losses` to `others`."""
    return _z(losses.double() - others.double())


def _z(gains: Tensor) -> float:
    error = standard_error(gains)  # 0 for one row, which therefore has no say
    return float(gains.mean()) / error if error > 0 else 0.0


def suspects(slopes: Tensor, proposal: Proposal, threshold: float) -> dict[int, float]:
    """Return by position the z of every client whose slope says that it hurts.

    To first order the merge without client k has a loss lower by `w_k/(1-w_k)·(g_k - Σ w_j g_j)`
    with `g_k` the slope along its increment: K leave-one-out evaluations for one backward pass.

    Arguments:
        slopes: of the rows that choose along the increments, (n, K).
        threshold: of the veto; suspects begin at a part of it.
    """
    weights = torch.tensor(proposal.weights, dtype=torch.float64)
    limited = slopes.double() * torch.tensor(proposal.limits, dtype=torch.float64)
    excess = limited - (limited @ weights)[:, None]
    z = {k: _z(excess[:, k]) for k, weight in enumerate(proposal.weights) if 0 < weight < 1}
    return {k: value for k, value in z.items() if value >= _SUSPECT * threshold}


def veto(trial: Trial, start: Proposal, threshold: float, screened: bool) -> Chosen:
    """Leave out, worst first, clients whose absence lowers the loss beyond doubt (7.4, step 2).

    At most a third of the cohort, and never the last one of a task: other tasks may well be better
    off without it, and its own would be lost. With `screened` only the two worst suspects are left
    out one by one to see, and again the two worst after every removal; the slopes stay those at the
    start, so that a round takes one backward pass.
    """
    proposal, vetoed = start, list[int]()
    notes: dict[str, Any] = {}
    most = len(trial.clients) // 3
    slopes = trial.slopes(start, CHOOSE) if screened and most else None
    losses = None
    for _ in range(most):
        tried = dispensable(trial.tasks, proposal)
        if slopes is not None:
            found = suspects(slopes, proposal, threshold)
            notes.setdefault("suspects", {str(trial.clients[k]): z for k, z in found.items()})
            worst_first = sorted(tried & set(found), key=lambda k: (-found[k], k))
            tried = set(worst_first[:_MOST_TRIED])
        if not tried:
            break
        losses = trial.losses(proposal, CHOOSE) if losses is None else losses
        left = {k: trial.losses(without(proposal, k), CHOOSE) for k in sorted(tried)}
        z = {k: paired_z(losses, others) for k, others in left.items()}
        notes.setdefault("leave_one_out_z", {str(trial.clients[k]): v for k, v in z.items()})
        worst = max(z, key=lambda k: z[k])
        if z[worst] < threshold:
            break
        proposal, losses = without(proposal, worst), left[worst]
        vetoed.append(trial.clients[worst])
    return Chosen(proposal, notes | ({"proposed": vetoed} if vetoed else {}))


def dispensable(tasks: Sequence[str], proposal: Proposal) -> set[int]:
    """Return the positions of clients that are merged, as is another one of their task."""
    merged = [k for k, weight in enumerate(proposal.weights) if weight > 0]
    holders = Counter(tasks[k] for k in merged)
    return {k for k in merged if holders[tasks[k]] > 1}


def without(proposal: Proposal, *clients: int) -> Proposal:
    """Return the proposal without the clients at these positions."""
    rest = 1 - sum(proposal.weights[k] for k in clients)
    weights = tuple(0.0 if k in clients else w / rest for k, w in enumerate(proposal.weights))
    return replace(proposal, weights=weights)


@dataclass(frozen=True)
class Bump:
    """What three points of a line tell: losses at λ = 0, ½ and 1."""

    height: float
    error: float
    best: float


def bump(start: Tensor, middle: Tensor, end: Tensor) -> Bump:
    """Return height, standard error and best λ of a line from the losses (n,) at 0, ½ and 1.

    `max(0, f½ - (f0 + f1)/2)`; where the parabola through the points opens upwards its minimum is
    at `(3f0 - 4f½ + f1) / (4(f0 - 2f½ + f1))`, cut to [0, 1.5]; else the better end (7.4, step 3).
    """
    over = middle.double() - (start.double() + end.double()) / 2
    f0, f1, f2 = (float(losses.double().mean()) for losses in (start, middle, end))
    bend = f0 - 2 * f1 + f2
    best = min(max((3 * f0 - 4 * f1 + f2) / (4 * bend), 0.0), 1.5) if bend > 0 else float(f2 < f0)
    return Bump(max(0.0, float(over.mean())), standard_error(over), best)


@dataclass(frozen=True)
class Lines:
    """The lines from the start to each client that still counts.

    Attributes:
        start: the mean loss at λ = 0, which they share.
        bumps: by position, what a client's line tells.
    """

    start: float
    bumps: Mapping[int, Bump]


def lines_of(trial: Trial, proposal: Proposal) -> Lines:
    """Score the lines at λ = 0, ½ and 1: two evaluations a client, and one (7.3a)."""
    start = trial.along(0, 0.0, CHOOSE)
    bumps = {
        k: bump(start, trial.along(k, 0.5, CHOOSE), trial.along(k, 1.0, CHOOSE))
        for k, weight in enumerate(proposal.weights)
        if weight > 0
    }
    return Lines(float(start.double().mean()), bumps)


def discount_barriers(trial: Trial, start: Proposal, lines: Lines, limit: float) -> Chosen:
    """Count less those clients behind a barrier, `β_k = exp(-max(0, b_k - ε)/τ)` (7.4, step 3).

    `ε = max(0.01, 2 SE)` and `τ = 0.05·f(0)`. Vetoed is who stands behind one above `limit·f(0)`
    and would best stay where it started; at most a third of the cohort, the highest first. All
    weights are 0 if every β vanishes.
    """
    f0, found = lines.start, lines.bumps
    notes: dict[str, Any] = {
        "barriers": {str(trial.clients[k]): b.height for k, b in found.items()}
    }
    factors = {
        k: math.exp(-max(0.0, b.height - max(0.01, 2 * b.error)) / (0.05 * f0)) if f0 > 0 else 1.0
        for k, b in found.items()
    }
    stuck = [k for k, b in found.items() if b.height > limit * f0 and b.best == 0]
    left, vetoed = start, list[int]()
    for k in sorted(stuck, key=lambda k: -found[k].height):
        room = len(trial.clients) // 3 - sum(w == 0 for w in left.weights)
        if room > 0 and k in dispensable(trial.tasks, left):
            left, factors[k] = without(left, k), 0.0
            vetoed.append(trial.clients[k])
    notes["behind_barriers"] = vetoed
    weights = [w * factors.get(k, 0.0) for k, w in enumerate(start.weights)]
    total = sum(weights) or 1.0
    return Chosen(replace(start, weights=tuple(w / total for w in weights)), notes)


def shorten(trial: Trial, start: Proposal, lines: Lines) -> Chosen:
    """Shorten increments that go too far, by `clip(λ*_k / median_j λ*_j, ½, 1)` (7.4, step 3).

    Against the median, because under label skew every honest client does best before the end of
    its own line. Where the median stays at the start, nobody is shortened.
    """
    best = {k: b.best for k, b in lines.bumps.items() if start.weights[k] > 0}
    median = statistics.median(best.values())
    factors = {
        k: min(max(at / median, _SHORTEST), 1.0) if median else 1.0 for k, at in best.items()
    }
    limits = tuple(limit * factors.get(k, 1.0) for k, limit in enumerate(start.limits))
    notes = {
        "best_positions": {str(trial.clients[k]): at for k, at in best.items()},
        "shortened": {str(trial.clients[k]): f for k, f in factors.items() if f < 1},
    }
    return Chosen(replace(start, limits=limits), notes)


def tilt(trial: Trial, start: Proposal, by_data: Sequence[float], steps: int) -> Chosen:
    """Turn weights towards clients whose increments lower the loss (7.4, step 4).

    Exponentiated gradient, `w <- normalise(w^(1-aρ)·(w⁰)^(aρ)·exp(-a(g - wᵀg)))`, which minimises
    `L + ρ·KL(w‖w⁰)`; a = 2, ρ = 0.1. Slopes are taken anew at every step. No weight exceeds three
    times the data's, nor does the effective number of clients 1/Σw² fall below a third of them.
    """
    anchor = torch.tensor(
        [w if kept > 0 else 0.0 for w, kept in zip(by_data, start.weights, strict=True)],
        dtype=torch.float64,
    )
    anchor = anchor / anchor.sum()
    proposal = start
    for _ in range(steps):
        w = torch.tensor(proposal.weights, dtype=torch.float64)
        g = trial.slopes(proposal, CHOOSE).double().mean(dim=0)
        g = g * torch.tensor(proposal.limits, dtype=torch.float64)
        anchored = w ** (1 - _TILT_RATE * _TILT_ANCHOR) * anchor ** (_TILT_RATE * _TILT_ANCHOR)
        turned = anchored * (-_TILT_RATE * (g - w @ g)).exp()
        proposal = replace(proposal, weights=tuple(_capped(turned / turned.sum(), anchor).tolist()))
    return Chosen(proposal, {"tilted": dict(_by_client(trial, proposal.weights))} if steps else {})


def _capped(weights: Tensor, anchor: Tensor) -> Tensor:
    """Return weights of at most three times the anchor's, spread over enough clients."""
    for _ in range(len(weights)):
        most = _MOST_OF_BY_DATA * anchor
        over = weights > most
        if not bool(over.any()) or bool(over[anchor > 0].all()):
            break
        rest = weights[~over].sum()
        if rest <= 0:
            break
        weights = torch.where(over, most, weights * (1 - most[over].sum()) / rest)
    wanted = min(float((anchor > 0).sum()) / 3, _effective(anchor))
    for _ in range(8):
        if _effective(weights) >= wanted - 1e-9:
            return weights
        weights = (weights + anchor) / 2
    return anchor


def _effective(weights: Tensor) -> float:
    return 1 / float(weights.square().sum())


def choose_step(trial: Trial, start: Proposal, lengths: Sequence[float]) -> Chosen:
    """Lengthen or shorten the step where that gains more than one standard error (7.4, step 5)."""
    plain = trial.losses(start, CHOOSE)
    gains = {
        eta: paired_z(plain, trial.losses(replace(start, step=eta), CHOOSE)) for eta in lengths
    }
    notes = {"step_z": {f"{eta:g}": z for eta, z in gains.items()}}
    best = max(gains, key=lambda eta: gains[eta])
    return Chosen(replace(start, step=best) if gains[best] > 1 else start, notes)


def judged(trial: Trial, plain: Proposal, proposal: Proposal) -> float:
    """Return by how many standard errors the proposal beats plain weights on the judging half."""
    return paired_z(trial.losses(plain, JUDGE), trial.losses(proposal, JUDGE))


def by_judges(candidates: Sequence[Proposal], updates: Sequence[Update]) -> Chosen:
    """Choose among candidates, the first of them plain, by the scores of clients (7.5).

    A candidate is accepted if it gains more than one standard error for more than half of the
    judges: one who lies has one vote. Among the accepted the one of the highest median gain wins.
    """
    plain = candidates[0]
    judges = [update for update in updates if GAINS in update.tensors]
    if not judges or len(candidates) == 1:
        return Chosen(plain, {"decision": "no client has judged: weighted increments"})
    gains = torch.stack([judge.tensors[GAINS] for judge in judges]).double()
    errors = torch.stack([judge.tensors[ERRORS] for judge in judges]).double()
    votes = (gains > errors).sum(dim=0)
    medians = gains.quantile(0.5, dim=0)
    accepted = [k for k in range(1, len(candidates)) if votes[k] > len(judges) / 2]
    best = max(accepted, key=lambda k: float(medians[k]), default=0)
    left_out = [
        update.client.client
        for update, weight in zip(updates, candidates[best].weights, strict=True)
        if weight == 0
    ]
    notes = {
        "judges": [judge.client.client for judge in judges],
        "votes": votes[1:].tolist(),
        "median_gains": medians[1:].tolist(),
        "vetoed": left_out,
        "decision": f"{int(votes[best])} of {len(judges)} judges gain without {left_out}"
        if best
        else "no candidate gains for more than half of the judges: weights by data",
    }
    return Chosen(candidates[best], notes)


def _by_client(trial: Trial, values: Sequence[float]) -> list[tuple[str, float]]:
    return [(str(client), value) for client, value in zip(trial.clients, values, strict=True)]
