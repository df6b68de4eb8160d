"""FedRot-LoRA: turn every client's factors towards what it was sent, then average them.

arXiv 2602.23638. `B·A = (B·R)(Rᵀ·A)` for every rotation R, so clients that learned the same may
return factors that cancel in the mean. With rounds counted from 0, as the paper does, odd rounds
take `M = A_ref·A_kᵀ` and even rounds `M = B_refᵀ·B_k`; `M = U·S·Vᵀ` gives the rotation that brings
the factor nearest to its reference, `R* = V·diag(1, …, det(U·Vᵀ))·Uᵀ`. Of it a share is applied,
`R = proj_SO((1-λ)·I + λ·R*)`. The reference is the model that the client was sent, so that round 0
turns nothing: B_ref is still zero. The mean has less of the error of averaging factors, and is
still not exact.

The paper turns at the client, before upload; here the server does, from what was sent and what came
back: the same sums and the same bytes, but the server needs every client's factors.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from common.lowrank import Term, adapted_modules, named_factors
from common.tensors import Tensors, weighted_mean
from strategies.base import (
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    counted,
    for_task,
    merges_so_far,
    model_of,
)


class FedRotLoRAOptions(Options):
    """Options of FedRot-LoRA.

    Attributes:
        strength: λ, how much of the rotation is applied: 0 is FedAvg, 1 all of it.
    """

    strength: float = Field(0.5, ge=0, le=1)


def fedrot_lora(options: FedRotLoRAOptions, setting: Setting) -> Strategy:
    """Average turned factors, weighted by examples. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        turn, modules = merges_so_far(state), adapted_modules(model_of(state))

        def turned(update: Update) -> Tensors:
            tensors = dict(update.tensors)
            for module in modules:
                term = Term.of(update.tensors, module)
                M = _overlap(Term.of(update.sent, module), term, by_A=turn % 2 == 1)
                R = rotation(M, options.strength)
                tensors |= named_factors(module, Term(term.B.double() @ R, R.T @ term.A.double()))
            return tensors

        means = weighted_mean((update.num_examples, turned(update)) for update in updates)
        return Merged({**state, **means, **counted(state)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)


def _overlap(reference: Term, term: Term, *, by_A: bool) -> Tensor:
    if by_A:
        return reference.A.double() @ term.A.double().T
    return reference.B.double().T @ term.B.double()


def rotation(M: Tensor, strength: float) -> Tensor:
    """Return R (r, r) of an overlap M (r, r), float64: the identity where nothing has turned."""
    eye = torch.eye(M.shape[0], dtype=M.dtype)
    size = torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)
    # A hair of the identity decides what M leaves open: directions that the reference does not
    # have stay where they are, instead of wherever the SVD puts its null space.
    nearest = _nearest_rotation(M.T / size + 1e-8 * eye)
    return _nearest_rotation((1 - strength) * eye + strength * nearest)


def _nearest_rotation(X: Tensor) -> Tensor:
    """Return the rotation (determinant 1) nearest to X, in the Frobenius norm."""
    U, _, Vh = torch.linalg.svd(X)
    signs = torch.ones(X.shape[0], dtype=X.dtype)
    signs[-1] = torch.linalg.det(U @ Vh).sign()
    R: Tensor = (U * signs) @ Vh
    return R
