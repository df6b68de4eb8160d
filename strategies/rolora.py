"""RoLoRA: train and average B in one round and A in the next, in turn.

Chen et al., arXiv 2502.01755. The factor at rest is the same at every client, so that averaging
the other is exact in every round: `Σ w_k B_k A = B̄ A`, then `Σ w_k B A_k = B Ā`, `w_k = n_k/Σn`.
B comes first: while B is zero the gradient of A is zero too, and a round of A would be wasted.
A round in which nobody answered does not count.
"""

from collections.abc import Iterable, Sequence

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
    counted,
    for_task,
    mean_of_parts,
    merges_so_far,
    model_of,
)

_TURNS = (("lora_B", "head"), ("lora_A", "head"))


class RoLoRAOptions(Options):
    """RoLoRA has no options."""


def rolora(_: RoLoRAOptions, setting: Setting) -> Strategy:
    """Average the factor whose turn it is, and heads. All clients need the same rank."""

    def trains(state: Tensors) -> tuple[str, ...]:
        return _TURNS[merges_so_far(state) % len(_TURNS)]

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        return Merged({**state, **mean_of_parts(updates, trains(state)), **counted(state)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, trains=trains)
