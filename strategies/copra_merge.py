"""CopRA-merge: average what clients have added to the adapter, and let a probe set only veto.

A server merge of our own, inspired by CopRA's linear mode connectivity (arXiv 2410.22911); the
papers contain no such server. With G the global delta, S_k the part of it that client k was sent
(the best of its rank), and ΔW_k what it returned,

    G⁺ = T_R( G + Σ_k w_k (ΔW_k - S_k) ),    w_k = n_k/Σn,

T_R the best approximation of rank R, all from stacked factors: no full matrix is ever formed.
Averaging increments leaves alone what a client of low rank never saw; a plain average of ΔW_k
would shrink it every round. Specification 7.1 to 7.4: steps 1, 2 and 6 of 7.4.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from common.errors import ConfigError
from common.lowrank import Span, Term, adapted_modules, balanced_factors, kept_energy, named_factors
from common.rules import TURNING
from common.tensors import Tensors
from strategies.base import (
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    data_weights,
    heads_of,
    model_of,
    revive_dead_directions,
    send_prefix,
)

# The probe set is split: one half chooses whom to veto, the other judges whether that helped.
_SMALLEST_COHORT = 3  # at most a third of the clients may be vetoed
_CHOOSE, _JUDGE = slice(0, None, 2), slice(1, None, 2)


class CopraMergeOptions(Options):
    """Options of copra-merge.

    Attributes:
        probe_examples: probe rows used; 0 merges by weighted increments alone.
        server_rank: rank R of the global adapter; 0 takes the largest rank of any client.
        veto_z: leave a client out if the merge without it has a loss lower by this many paired
            standard errors.
        norm_limit: increments longer than this many medians are scaled back to it.
    """

    probe_examples: int = Field(512, ge=0)
    server_rank: int = Field(0, ge=0)
    veto_z: float = Field(2.0, gt=0)
    norm_limit: float = Field(5.0, gt=1)


def copra_merge(options: CopraMergeOptions, setting: Setting) -> Strategy:
    """Average increments, truncate to the server's rank; ranks may differ."""
    rank = options.server_rank or setting.rank
    if rank < setting.rank:
        raise ConfigError(
            f"strategy.copra-merge.server_rank = {rank}: a client has rank {setting.rank}; choose "
            "at least that, or 0 for the largest of any client"
        )
    server_scale = setting.scale(rank)

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
        merger = _Merger(state, updates, rank, server_scale, setting.seed)
        by_data = data_weights(updates)
        limits = merger.length_limits(by_data, options.norm_limit)
        plain = merger.candidate(by_data, limits)
        diagnostics: dict[str, Any] = {
            "kept_energy": plain.kept_energy,
            "clipped": [
                u.client.client for u, limit in zip(updates, limits, strict=True) if limit < 1
            ],
        }
        chosen, weights = plain, by_data
        if probe is None or options.probe_examples == 0:
            veto: dict[str, Any] = {"vetoed": [], "decision": "no probe set: weighted increments"}
        elif len(updates) < _SMALLEST_COHORT:
            veto = {"vetoed": [], "decision": "too few clients for a veto: weighted increments"}
        else:
            clients = [u.client.client for u in updates]
            proposed, veto = _veto(merger, clients, by_data, limits, probe, options.veto_z)
            if not veto["vetoed"]:
                veto["decision"] = "no client's absence would lower the probe loss: all kept"
            else:
                without = merger.candidate(proposed, limits)
                if _helps(plain.tensors, without.tensors, probe, veto):
                    chosen, weights = without, proposed
        diagnostics |= veto
        diagnostics["weights"] = {
            str(u.client.client): w for u, w in zip(updates, weights, strict=True)
        }
        return Merged(chosen.tensors, diagnostics)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), rank)]

    return Strategy(
        start=start,
        send=send,
        merge=merge,
        serve=serve,
        rules=TURNING,
        probe_examples=options.probe_examples,
    )


@dataclass(frozen=True)
class _Candidate:
    tensors: Tensors
    kept_energy: float


class _Merger:
    """The merge of one round at any weights: one QR a module serves every candidate."""

    def __init__(
        self, state: Tensors, updates: Sequence[Update], rank: int, scale: float, seed: int
    ) -> None:
        self._state, self._updates = state, updates
        self._rank, self._scale, self._seed = rank, scale, seed
        self._modules = adapted_modules(state)
        self._spans = {
            module: Span([Term.of(state, module), *(Term.of(u.tensors, module) for u in updates)])
            for module in self._modules
        }
        # (K, R): which directions of G each client was sent.
        self._was_sent = torch.stack(
            [(torch.arange(rank) < u.client.rank).double() for u in updates]
        )

    def length_limits(self, weights: Sequence[float], limit: float) -> list[float]:
        """Return for each client the factor (at most 1) that brings its increment to the limit."""
        lengths = [self._increment_norm(k) for k in range(len(weights))]
        # Of those that trained: if most are idle, the others are no outliers. An idle client's
        # increment is the rounding of what it was sent.
        idle = 1e-6 * self._sent_norm()
        active = [length for length in lengths if length > idle]
        bound = limit * statistics.median(active or [0.0])
        return [min(1.0, bound / length) if length > 0 else 1.0 for length in lengths]

    def _sent_norm(self) -> float:
        nothing = [0.0] * len(self._updates)
        norms = (span.norm([self._scale, *nothing]) for span in self._spans.values())
        return float(sum(norm**2 for norm in norms) ** 0.5)

    def _increment_norm(self, client: int) -> float:
        coefficients: list[float | Tensor] = [0.0] * len(self._updates)
        coefficients[client] = self._updates[client].client.scale
        minus_sent = -self._scale * self._was_sent[client]
        return float(
            sum(span.norm([minus_sent, *coefficients]) ** 2 for span in self._spans.values()) ** 0.5
        )

    def candidate(self, weights: Sequence[float], limits: Sequence[float]) -> _Candidate:
        """Return `T_R(G + Σ c_k (ΔW_k - S_k))` and heads, `c_k = w_k·limit_k`."""
        steps = torch.tensor(
            [w * limit for w, limit in zip(weights, limits, strict=True)], dtype=torch.float64
        )
        # The sent parts lie in the span of G: they only lower its coefficients.
        remaining = self._scale * (1 - steps @ self._was_sent)
        scaled = [float(c) * u.client.scale for c, u in zip(steps, self._updates, strict=True)]
        merged = self._heads(steps.tolist(), weights)
        svds = {m: span.svd([remaining, *scaled]) for m, span in self._spans.items()}
        for module, svd in svds.items():
            best = svd.truncated(self._rank)
            term = balanced_factors(best, self._scale)
            term = revive_dead_directions(module, term, best.S, self._rank, self._seed)
            merged |= named_factors(module, term)
        return _Candidate(merged, kept_energy(svds.values(), self._rank))

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


def _veto(
    merger: _Merger,
    clients: Sequence[int],
    by_data: Sequence[float],
    limits: Sequence[float],
    probe: Probe,
    threshold: float,
) -> tuple[list[float], dict[str, Any]]:
    """Leave out, worst first, the clients whose absence lowers the loss beyond doubt (7.4, 2).

    At most a third of the cohort; all are tried again after every removal.
    """

    def losses_at(weights: Sequence[float]) -> Tensor:
        return probe(merger.candidate(weights, limits).tensors, _CHOOSE)

    weights, vetoed = list(by_data), list[int]()
    first_z: Mapping[str, float] = {}
    for _ in range(len(clients) // 3):
        losses = losses_at(weights)
        z = {
            k: _paired_z(losses, losses_at(_without(weights, k)))
            for k, weight in enumerate(weights)
            if 0 < weight < 1
        }
        first_z = first_z or {str(clients[k]): value for k, value in z.items()}
        worst = max(z, key=lambda k: z[k])
        if z[worst] < threshold:
            break
        weights = _without(weights, worst)
        vetoed.append(clients[worst])
    return weights, {"vetoed": vetoed, "leave_one_out_z": dict(first_z)}


def _without(weights: Sequence[float], client: int) -> list[float]:
    rest = 1 - weights[client]
    return [0.0 if k == client else w / rest for k, w in enumerate(weights)]


def _paired_z(losses: Tensor, others: Tensor) -> float:
    """Return how many standard errors the mean loss falls from `losses` to `others`."""
    gain = losses.double() - others.double()
    if len(gain) < 2:
        return 0.0  # one row has no standard error
    error = float(gain.std()) / len(gain) ** 0.5
    return float(gain.mean()) / error if error > 0 else 0.0


def _helps(plain: Tensors, chosen: Tensors, probe: Probe, veto: dict[str, Any]) -> bool:
    """Accept the vetoes only if the judging half gains more than one standard error (7.4, 6)."""
    z = _paired_z(probe(plain, _JUDGE), probe(chosen, _JUDGE))
    veto["judged_z"] = z
    accepted = z > 1
    veto["proposed"] = veto["vetoed"]
    veto["vetoed"] = veto["vetoed"] if accepted else []
    veto["decision"] = (
        f"vetoes accepted: the judging half gains {z:.1f} standard errors"
        if accepted
        else f"vetoes dropped: the judging half gains only {z:.1f} standard errors"
    )
    return accepted
