"""Prompts are averaged, or what makes them; every client keeps its own head.

After section 7 of our specification of cross-modality transfer (Zhang et al., ICLR 2025, OpenReview
SYnIf4LxAG, have one client). Of a projection `Σ w_k (S W_kᵀ + 1 b_kᵀ) = S W̄ᵀ + 1 b̄ᵀ`: the mean map
makes the mean prompt. An attention is not linear: what is shared is how it reads the source (W_k,
W_v, the gain); each client keeps what it asks for, its queries Q, and its own vectors T. A client
that has never trained has those of the common start.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from common.errors import ConfigError
from common.rules import LocalRules
from common.tensors import Tensors, part_of
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


class LocalHeadsOptions(Options):
    """Options of local-heads.

    Attributes:
        queries: whether an attention's queries and own vectors stay at the client, too.
    """

    queries: Literal["local", "shared"] = "local"


def local_heads(options: LocalHeadsOptions, setting: Setting) -> Strategy:
    """Average all but what clients keep, weighted by examples.

    `start` raises `ConfigError` where nothing would be shared.
    """
    keeps = ("head", "own") if options.queries == "local" else ("head",)
    shared = tuple(part for part in EVERYTHING if part not in keeps)

    def start(tensors: Tensors) -> Tensors:
        if not any(part_of(name) in shared for name in tensors):
            raise ConfigError(
                "strategy.name = 'local-heads': nothing but heads is trained, so that clients "
                "would share nothing; train a prompt that tasks have in common, or choose "
                "'local-only'"
            )
        return dict(tensors)

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        return Merged({**state, **mean_of_parts(updates, shared)})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(
        start=start,
        send=send,
        merge=merge,
        serve=serve,
        rules=LocalRules(keeps=keeps),
        personalised=True,
    )
