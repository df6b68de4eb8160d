"""Merging increments: what every client has added to the adapter that it was sent.

With G the global delta, S_k the part of it that client k was sent and `ΔW_k = s_k B_k A_k` what it
returned,

    τ_k = ΔW_k - S_k,    G⁺ = T_R( G + merge(τ_1, ..., τ_K) ),

T_R the best approximation of rank R: what it truncates is lost, and `kept_energy` says how much is
left. In the first round, and so in one-shot merging, S_k = 0 and τ_k is the whole delta. A rule
that looks at single entries needs full matrices: float64, and those of one module at a time.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from common.lowrank import (
    SVD,
    RunningSum,
    Term,
    adapted_modules,
    balanced_factors,
    best_of_dense,
    kept_energy,
    named_factors,
)
from common.rules import TURNING
from common.tensors import RunningMean, Tensors
from strategies.base import (
    Client,
    Merged,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    heads_of,
    model_of,
    revive_dead_directions,
    send_prefix,
)

# From the name of a module and its increments (K, m, n), in the order of updates, to one (m, n).
Rule = Callable[[str, Tensor], Tensor]


def merging_increments(
    setting: Setting, merge: Callable[[Tensors, Iterable[Update], Probe | None], Merged]
) -> Strategy:
    """Return the strategy that sends prefixes of one global adapter and merges increments."""
    server_scale = setting.scale(setting.rank)

    def send(state: Tensors, client: Client) -> Tensors:
        return send_prefix(state, client, server_scale)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, rules=TURNING)


def add_mean(
    state: Tensors, weighted: Iterable[tuple[float, Update]], setting: Setting, scaling: float = 1.0
) -> Merged:
    """Merge by `λ Σ w_k τ_k / Σ w_k`, in one pass and factored; heads by their weighted mean."""
    sums = {module: RunningSum() for module in adapted_modules(model_of(state))}
    held, total = RunningMean(), 0.0
    for weight, update in weighted:
        total += weight
        held.add(weight, heads_of(update.tensors))
        share = weight * update.client.scale
        for module, running in sums.items():
            running.add(share, Term.of(update.tensors, module))
            running.add(-share, Term.of(update.sent, module))
    for module, running in sums.items():
        # Counted so that the common factor below leaves G as it was.
        running.add(setting.scale(setting.rank) * total / scaling, Term.of(state, module))
    svds = {module: running.svd(scaling / total) for module, running in sums.items()}
    kept = kept_energy(svds.values(), setting.rank)
    return Merged(_truncated({**state, **held.mean()}, svds, setting), {"kept_energy": kept})


def add_entrywise(
    state: Tensors, updates: Sequence[Update], setting: Setting, rule: Rule, heads: Tensors
) -> Merged:
    """Merge by a rule on full matrices, module after module; `heads` are the merged ones."""
    svds, whole = {}, 0.0
    for module in adapted_modules(model_of(state)):
        G = setting.scale(setting.rank) * _product(state, module)
        increments = torch.stack(
            [
                u.client.scale * (_product(u.tensors, module) - _product(u.sent, module))
                for u in updates
            ]
        )
        svds[module], energy = best_of_dense(G + rule(module, increments), setting.rank)
        whole += energy
    merged = _truncated({**state, **heads}, svds, setting)
    kept = sum(float(svd.S.square().sum()) for svd in svds.values())
    return Merged(merged, {"kept_energy": kept / whole if whole > 0 else 1.0})


def _product(tensors: Tensors, module: str) -> Tensor:
    term = Term.of(tensors, module)
    return term.B.double() @ term.A.double()


def _truncated(
    state: dict[str, Tensor], svds: dict[str, SVD], setting: Setting
) -> dict[str, Tensor]:
    """Put the best of the server's rank into balanced factors, every direction trainable."""
    for module, svd in svds.items():
        best = svd.truncated(setting.rank)
        term = balanced_factors(best, setting.scale(setting.rank))
        term = revive_dead_directions(module, term, best.S, setting.rank, setting.seed)
        state |= named_factors(module, term)
    return state
