"""CopRA training: blocks dropped at random, ever less often, as training goes on.

One switch a transformer block. Block l computes `h = W0·x + δ_l·s·B·A·x`; only the LoRA branch is
skipped, never the frozen layer. The keep probability rises linearly over the first `ramp` of all
steps, then stays at 1. There is no inverse scaling, and evaluation ignores the switches. This is
the schedule of CoTo (arXiv 2506.05713), the successor of CopRA (arXiv 2410.22911).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from common.config import Copra

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def block_of(name: str) -> tuple[str, int]:
    """Return where a module's transformer block is: the stack that holds it, and its position."""
    found = _BLOCK.match(name)
    stack, _, position = found.group().rpartition(".") if found else (name, "", "0")
    return stack, int(position)


def keep_probability(step: int, total_steps: int, copra: Copra) -> float:
    """Return p(t) = min(1, p0 + (1 - p0)·t/T1), T1 = ceil(ramp·T), for the 0-based global step."""
    ramp_steps = math.ceil(copra.ramp * total_steps)
    if step >= ramp_steps:
        return 1.0
    return min(1.0, copra.initial + (1 - copra.initial) * step / ramp_steps)


def draw_switches(blocks: int, probability: float, generator: torch.Generator) -> list[bool]:
    """Draw δ ~ Bernoulli(p) for each block; if all are off, switch one random block on.

    Unlike rejection sampling this ends for every p, 0 included; as p goes to 0 it has the same law
    (specification 1.2.2).
    """
    switches: list[bool] = (torch.rand(blocks, generator=generator) < probability).tolist()
    if not any(switches):
        switches[int(torch.randint(blocks, (1,), generator=generator))] = True
    return switches


def group_by_block(modules: Mapping[str, Any]) -> list[list[Any]]:
    """Group adapted modules by the block in their name: all up to its first number.

    >>> group_by_block({"vit.layers.0.q": 1, "vit.layers.1.q": 2, "vit.layers.0.v": 3})
    [[1, 3], [2]]
    """
    blocks: dict[str, list[Any]] = {}
    for name, module in modules.items():
        found = _BLOCK.match(name)
        blocks.setdefault(found.group() if found else name, []).append(module)
    return list(blocks.values())


@contextmanager
def switched(blocks: Sequence[Sequence[Any]], switches: Sequence[bool]) -> Iterator[None]:
    """Skip the LoRA branches of the blocks that are off, while a training step runs.

    A skipped branch costs nothing, its factors get no gradient (None, so that AdamW leaves them
    alone), and backward ends at the lowest active block. On leaving, every branch is on again, so
    no evaluation can see a switch.
    """
    off = [m for block, on in zip(blocks, switches, strict=True) if not on for m in block]
    try:
        for module in off:
            # PEFT's forward reads this flag; its public setter would also touch requires_grad.
            module._disable_adapters = True
        yield
    finally:
        for module in off:
            module._disable_adapters = False
