"""FedEx-LoRA: average the factors, and add to the base what that misses.

Singhal et al., arXiv 2410.09432, equation 8. The residual `s(Σ p_k B_k A_k - B̄Ā)` is the weighted
covariance of the factors, `s Σ p_k (B_k - B̄)(A_k - A_K)`, whose last block vanishes: it travels as
`X = [s p_k (B_k - B̄)]_{k<K}` and `Y = [A_k - A_K]_{k<K}`, of rank (K-1)r, or densely where that is
smaller. The pretrained weights are never written to. Truncated to its best rank it is cheaper, and
the merge no longer exact: the energy that was kept is reported.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field

from common.lowrank import Span, Term, adapted_modules, balanced_factors, kept_energy
from common.residuals import change_base
from common.tensors import Tensors
from strategies.base import (
    EVERYTHING,
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    data_weights,
    for_task,
    mean_of_parts,
    model_of,
)


class FedExLoRAOptions(Options):
    """Options of FedEx-LoRA.

    Attributes:
        residual_rank: the rank that each round's residual is truncated to; 0 keeps it whole.
    """

    residual_rank: int = Field(0, ge=0)


def fedex_lora(options: FedExLoRAOptions, setting: Setting) -> Strategy:
    """Average A, B and heads by examples; change the base by the rest. One rank for all clients."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        # Deviations need the means first, so that all updates have to be held.
        updates = list(updates)
        averaged = {**state, **mean_of_parts(updates, EVERYTHING)}
        if len(updates) == 1:
            return Merged(averaged)
        residual = {
            module: _residual(updates, Term.of(averaged, module), module, setting)
            for module in adapted_modules(model_of(state))
        }
        if not options.residual_rank:
            return Merged(change_base(averaged, residual))
        svds = {module: Span([term]).svd([1.0]) for module, term in residual.items()}
        best = {
            module: balanced_factors(svd.truncated(options.residual_rank), 1.0)
            for module, svd in svds.items()
        }
        kept = kept_energy(svds.values(), options.residual_rank)
        return Merged(change_base(averaged, best), {"residual_kept_energy": kept})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)


def _residual(updates: Sequence[Update], mean: Term, module: str, setting: Setting) -> Term:
    """Return (X, Y): X (m, (K-1)r), Y ((K-1)r, n), with `X·Y = s(Σ p_k B_k A_k - B̄Ā)`."""
    *others, last = (Term.of(update.tensors, module) for update in updates)
    shares = [setting.scale(setting.rank) * weight for weight in data_weights(updates)]
    X = [c * (t.B.double() - mean.B.double()) for c, t in zip(shares, others, strict=False)]
    Y = [t.A.double() - last.A.double() for t in others]
    return Term(torch.cat(X, dim=1), torch.cat(Y))
