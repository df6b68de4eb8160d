"""A global prompt that is averaged, and a local one that never leaves its client.

After FedOTP (Li et al., arXiv 2403.00041), in spirit: each client works with both prompts, and only
the global one travels. Not here is what the paper matches prompts to image patches with, unbalanced
optimal transport: the model averages the logits of the two. `local.text` starts as a copy of
`prompt.text`, so that the start is that of every other method; visual prompts are global only.
"""

from collections.abc import Iterable, Sequence

from common.errors import ConfigError
from common.rules import LocalRules
from common.tensors import Tensors
from strategies.base import (
    EVERYTHING,
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

SHARED, LOCAL = "prompt.text", "local.text"


class GlobalLocalPromptsOptions(Options):
    """global-local-prompts has no options."""


def global_local_prompts(_: GlobalLocalPromptsOptions, setting: Setting) -> Strategy:
    """Average all but the local prompts, weighted by examples; each client keeps its own.

    `start` raises `ConfigError` where there is no shared text prompt.
    """

    def start(tensors: Tensors) -> Tensors:
        if SHARED not in tensors:
            raise ConfigError(
                "strategy.name = 'global-local-prompts': there is no shared text prompt to have a "
                "local one beside; set adapter.prompt.length above 0 and "
                "adapter.prompt.class_specific = false"
            )
        return {**tensors, LOCAL: tensors[SHARED].clone()}

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        return Merged({**state, **mean_of_parts(updates, EVERYTHING)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(
        start=start,
        send=send,
        merge=merge,
        serve=serve,
        trains=lambda _: (*EVERYTHING, "local"),
        rules=LocalRules(keeps=("local",)),
        personalised=True,
    )
