"""FFA-LoRA: A stays at its common random start, only B (and the head) is trained and averaged.

Sun et al., arXiv 2403.12313. Exact, since `Σ w_k B_k A_0 = B̄ A_0`, at half the bytes; the price is
capacity.
"""

from collections.abc import Sequence

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
    for_task,
)


class FFALoRAOptions(Options):
    """FFA-LoRA has no options."""


def ffa_lora(_: FFALoRAOptions, setting: Setting) -> Strategy:
    """Average B and heads, weighted by examples. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Sequence[Update], _: Probe | None) -> Merged:
        trained = [
            {name: t for name, t in u.tensors.items() if not name.endswith(".lora_A.weight")}
            for u in updates
        ]
        return Merged({**state, **weighted_mean([u.num_examples for u in updates], trained)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(state, setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, trains=("lora_B", "head"))
