"""FFA-LoRA: A stays at its common random start, only B (and the head) is trained and averaged.

Sun et al., arXiv 2403.12313. Exact, since `Σ w_k B_k A_0 = B̄ A_0`, at half the bytes; the price is
capacity.
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
    for_task,
    mean_of_parts,
    model_of,
)

_TRAINED = ("lora_B", "head")


class FFALoRAOptions(Options):
    """FFA-LoRA has no options."""


def ffa_lora(_: FFALoRAOptions, setting: Setting) -> Strategy:
    """Average B and heads, weighted by examples. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        return Merged({**state, **mean_of_parts(updates, _TRAINED)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, trains=lambda _: _TRAINED)
