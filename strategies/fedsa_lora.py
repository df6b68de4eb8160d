"""FedSA-LoRA: train both factors, share A alone; B and the head stay where they were trained.

Guo et al., arXiv 2410.01463. `Ā = Σ p_k A_k`; client k works with `s·B_k·Ā`, so that there is no
one model to score: every client scores its own. A client that has never trained has B = 0 and the
head of the common start.
"""

from collections.abc import Iterable, Sequence

from common.rules import LocalRules
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


class FedSALoRAOptions(Options):
    """FedSA-LoRA has no options."""


def fedsa_lora(_: FedSALoRAOptions, setting: Setting) -> Strategy:
    """Average A, weighted by examples; serve it with the B and heads that clients start from."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        return Merged({**state, **mean_of_parts(updates, ("lora_A",))})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(
        start=dict,
        send=send,
        merge=merge,
        serve=serve,
        rules=LocalRules(keeps=("lora_B", "head")),
        personalised=True,
    )
