"""FedASK: merge deltas from sums of sketches; the server never sees a client's factors.

arXiv 2507.09990. In a round's first exchange clients send `Y_k = ΔW_k·Ω` (m, q), with one random Ω
for all, and `Q = qr(Σ w_k Y_k)`, `w_k = n_k/Σn`; in the second they send `P_k = ΔW_kᵀ·Q` (n, q).
Then `Q·Σ w_k P_kᵀ = Q·Qᵀ·ΔW*`, whose SVD gives the factors. `ΔW_k = s_k·B_k·A_k` is sketched with
its own scale, so that ranks may differ, where the paper has one rank.

Exact before its last truncation if and only if `q ≥ rank(ΔW*)`, which may be as large as the sum of
the clients' ranks; with the paper's q = r and clients that have drifted apart most of ΔW* is lost.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from common.lowrank import Span, Term, adapted_modules, balanced_factors, named_factors
from common.rules import LocalRules
from common.sketches import basis_name, projection_name, sketch_name
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
    everyone,
    mean_of_parts,
    model_of,
    revive_dead_directions,
    send_prefix,
)


class FedASKOptions(Options):
    """Options of FedASK.

    Attributes:
        sketch: q, the width of the sketches; 0 for the largest rank of any client, as in the paper.
    """

    sketch: int = Field(0, ge=0)


def fedask(options: FedASKOptions, setting: Setting) -> Strategy:
    """Sketch, project, and truncate to the largest rank; ranks may differ."""
    width = options.sketch or setting.rank
    server_scale = setting.scale(setting.rank)

    def send(state: Tensors, client: Client) -> Tensors:
        return send_prefix(state, client, server_scale)

    def bases(state: Tensors, updates: Sequence[Update]) -> Tensors:
        sums = mean_of_parts(updates, ("sketch",))
        return {
            basis_name(module): _basis(sums[sketch_name(module)], width)
            for module in adapted_modules(model_of(state))
        }

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        # The basis is that of the question, and so the same in every update: of those that were
        # asked, not all may have answered.
        means = mean_of_parts(updates, ("basis", "projection", "head"))
        merged = dict(state)
        for module in adapted_modules(model_of(state)):
            Q, P = means.pop(basis_name(module)), means.pop(projection_name(module))
            best = Span([Term(Q, P.T)]).svd([1.0]).truncated(setting.rank)
            if best.S.any():
                term = balanced_factors(best, server_scale)
                term = revive_dead_directions(module, term, best.S, setting.rank, setting.seed)
            else:
                before = Term.of(state, module)
                term = Term(torch.zeros_like(before.B), before.A)
            merged |= named_factors(module, term)
        return Merged({**merged, **means})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(
        start=dict,
        send=send,
        merge=merge,
        serve=serve,
        rules=LocalRules(sketch=width, steady=False),
        follow_up=FollowUp("project", bases, everyone, indispensable=True),
    )


def _basis(sketch: Tensor, width: int) -> Tensor:
    """Return the orthonormal basis (m, q) of a sketch, with zero columns where q is above m."""
    Q, _ = torch.linalg.qr(sketch.double())
    return functional.pad(Q, (0, width - Q.shape[1])).float().contiguous()
