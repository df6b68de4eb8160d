"""LoRA-FAIR: average the factors, then correct B̄ towards the mean of the deltas.

Bian et al., arXiv 2411.14961, who minimise `-cos(ΔW*, (B̄+ΔB)·Ā) + λ·‖ΔB‖` by gradient descent.
Here it is the regularised least-squares problem instead, `‖ΔW* - (B̄+ΔB)·Ā‖² + λ'·‖ΔB‖²`, whose
solution is closed: `ΔB = (ΔW* - B̄·Ā)·Āᵀ·(Ā·Āᵀ + λ'·I)⁻¹` (aggregation specification, A.1). It
removes the part of the error that lies in the row space of Ā, and no more.

`ΔW* - B̄·Ā = Σ w_k (B_k - B̄)·A_k` is never formed: `A_k·Āᵀ` is (r, r). One rank has one scale s,
which cancels. `λ' = λ·tr(Ā·Āᵀ)/r`: relative to Ā, for its size is arbitrary (`cB·A/c` is `B·A`).
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field

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
    data_weights,
    for_task,
    model_of,
)


class LoRAFAIROptions(Options):
    """Options of LoRA-FAIR.

    Attributes:
        regularisation: λ, relative to the mean of the diagonal of `Ā·Āᵀ`; large is FedAvg.
    """

    regularisation: float = Field(0.01, ge=0)


def lora_fair(options: LoRAFAIROptions, setting: Setting) -> Strategy:
    """Average factors and heads, then correct B. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)  # the means come first
        merged = {**state, **weighted_mean((u.num_examples, u.tensors) for u in updates)}
        weights = data_weights(updates)
        for module in adapted_modules(model_of(state)):
            terms = [Term.of(update.tensors, module) for update in updates]
            term = corrected(Term.of(merged, module), weights, terms, options.regularisation)
            merged |= named_factors(module, term)
        return Merged(merged)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)


def corrected(
    mean: Term, weights: Sequence[float], terms: Sequence[Term], regularisation: float
) -> Term:
    """Return `(B̄ + ΔB, Ā)`, in float64."""
    B, A = mean.B.double(), mean.A.double()
    error = torch.zeros_like(B)
    for weight, term in zip(weights, terms, strict=True):
        error += weight * (term.B.double() - B) @ (term.A.double() @ A.T)
    gram = A @ A.T
    ridge = regularisation * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    # The pseudo-inverse leaves B̄ alone along directions that Ā does not have.
    return Term(B + error @ torch.linalg.pinv(gram + ridge, hermitian=True), A)
