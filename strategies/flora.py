"""FLoRA: add the stacked adapters of the round to the base, and start new ones.

Wang et al., arXiv 2409.05976, equation 6. `ΔW = [p_1 s_1 B_1 … p_K s_K B_K]·[A_1; …; A_K]` is the
mean of the deltas itself, whatever the ranks; the scales stand inside, since unequal ranks have
unequal ones. Then A is drawn anew and B is zero: a cold start every round. Clients draw the new A
themselves, so that only the stack travels; never written into the pretrained weights.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.lowrank import Term, adapted_modules
from common.residuals import change_base
from common.rules import TURNING
from common.tensors import RunningMean, Tensors
from strategies.base import (
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    heads_of,
    model_of,
    restarted,
    send_prefix,
)


class FLoRAOptions(Options):
    """FLoRA has no options."""


def flora(_: FLoRAOptions, setting: Setting) -> Strategy:
    """Change the base by the mean of `s·B·A` and restart the adapters; ranks may differ."""

    def send(state: Tensors, client: Client) -> Tensors:
        return send_prefix(state, client, setting.scale(setting.rank))

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        modules = adapted_modules(model_of(state))
        blocks_B: dict[str, list[Tensor]] = {module: [] for module in modules}
        blocks_A: dict[str, list[Tensor]] = {module: [] for module in modules}
        held, examples = RunningMean(), 0
        for update in updates:
            examples += update.num_examples
            held.add(update.num_examples, heads_of(update.tensors))
            share = update.num_examples * update.client.scale
            for module in modules:
                term = Term.of(update.tensors, module)
                blocks_B[module].append(share * term.B.double())
                blocks_A[module].append(term.A)
        change = {
            module: Term(torch.cat(blocks_B[module], dim=1) / examples, torch.cat(blocks_A[module]))
            for module in modules
        }
        changed = change_base(state, change)
        return Merged({**changed, **held.mean(), **restarted(state, setting)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, rules=TURNING)
