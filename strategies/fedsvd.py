"""FedSVD: clients train B alone; the server averages it and turns the basis by an SVD of `B̄·A`.

Lee et al., arXiv 2505.12805. `B̄ = Σ w_k B_k`, `w_k = n_k/Σn`; `B̄·A = U·S·Vᵀ`; `A ← Vᵀ`,
`B ← U·S`. The product stays as it is, so the mean is exact, and A with orthonormal rows bounds the
gradient of B. The row space of A never grows: what is served stays in that of the common start.
"""

from collections.abc import Iterable, Sequence

from common.lowrank import Span, Term, adapted_modules, named_factors, orthonormal_factors
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
    for_task,
    mean_of_parts,
    model_of,
)

_TRAINED = ("lora_B", "head")


class FedSVDOptions(Options):
    """FedSVD has no options."""


def fedsvd(_: FedSVDOptions, setting: Setting) -> Strategy:
    """Average B and heads, then refactor every module. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        merged = {**state, **mean_of_parts(updates, _TRAINED)}
        for module in adapted_modules(model_of(state)):
            term = Term.of(merged, module)
            # Nothing learned, nothing to turn: A stays as it was drawn. Where some singular values
            # vanish A still gets unit rows, so that no direction is dead.
            if term.B.any():
                merged |= named_factors(module, orthonormal_factors(Span([term]).svd([1.0]), 1.0))
        return Merged(merged)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(
        start=dict,
        send=send,
        merge=merge,
        serve=serve,
        trains=lambda _: _TRAINED,
        # The basis turns in every round.
        rules=TURNING,
    )
