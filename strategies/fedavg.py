"""FedAvg on factors (FedIT): `Ā = Σ w_k A_k`, `B̄ = Σ w_k B_k`, `w_k = n_k/Σn`.

McMahan et al., arXiv 1602.05629; for LoRA, Zhang et al., arXiv 2305.05644. The served delta
`s·B̄·Ā` is not the mean of the clients' deltas: it differs by their weighted covariance,
`s·Σ w_k (B_k - B̄)(A_k - Ā)`.
"""

from collections.abc import Iterable, Sequence

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
    counted_by_examples,
    for_task,
    model_of,
)


class FedAvgOptions(Options):
    """FedAvg has no options."""


def fedavg(_: FedAvgOptions, setting: Setting) -> Strategy:
    """Average every tensor, weighted by examples. All clients need the same rank."""

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        means = weighted_mean(counted_by_examples(updates))
        return Merged({**state, **means})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)
