"""FlexLoRA: average the deltas, then give every client the best adapter of its own rank.

Bai et al., arXiv 2402.11505. `T = Σ w_k s_k B_k A_k = U·S·Vᵀ`; a client of rank r gets
`B = U_r S_r / s_r`, `A = V_rᵀ`. The published code forms T and its SVD densely; here both come
from the stacked factors, with the same product. `s_k` stands inside the sum: unequal ranks have
unequal scales.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.lowrank import Span, Term, adapted_modules, kept_energy, orthonormal_factors
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
    for_task,
    merged_heads,
    named_factors,
)


class FlexLoRAOptions(Options):
    """FlexLoRA has no options."""


def flexlora(_: FlexLoRAOptions, setting: Setting) -> Strategy:
    """Average `s·B·A` and truncate to the largest rank; ranks may differ."""
    server_scale = setting.scale(setting.rank)

    def send(state: Tensors, client: Client) -> Tensors:
        sent = dict(for_task(state, client.task))
        for module in adapted_modules(state):
            term = Term.of(state, module)
            B = term.B[:, : client.rank] * (server_scale / client.scale)
            sent |= named_factors(module, Term(B, term.A[: client.rank]))
        return sent

    def merge(state: Tensors, updates: Sequence[Update], _: Probe | None) -> Merged:
        weights = data_weights(updates)
        coefficients = [w * u.client.scale for w, u in zip(weights, updates, strict=True)]
        merged: dict[str, Tensor] = merged_heads(state, updates)
        svds = {
            module: Span([Term.of(u.tensors, module) for u in updates]).svd(coefficients)
            for module in adapted_modules(state)
        }
        for module, svd in svds.items():
            term = orthonormal_factors(svd.truncated(setting.rank), server_scale)
            merged |= named_factors(module, _filled(term, Term.of(state, module)))
        return Merged(merged, {"kept_energy": kept_energy(svds.values(), setting.rank)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(state, setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)


def _filled(term: Term, before: Term) -> Term:
    """Keep the last A (and B zero) for directions that a cohort of low rank cannot fill."""
    missing = before.rank - term.rank
    if not missing:
        return term
    B = torch.cat([term.B, torch.zeros(term.B.shape[0], missing, dtype=term.B.dtype)], dim=1)
    return Term(B, torch.cat([term.A, before.A[-missing:].to(term.A.dtype)]))
