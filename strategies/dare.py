"""DARE: drop entries of every increment at random and rescale the rest; then merge.

Yu et al., arXiv 2311.03099, section 3.2. `τ_k ← m_k τ_k / ρ` with `m_k ~ Bernoulli(ρ)`: the mean
over masks is τ_k. A mask is a function of the seed, the round, the client and the module, so that
a run can be repeated and resumed.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from common.seeds import torch_generator
from common.tensors import Tensors
from strategies.base import (
    Merged,
    Options,
    Probe,
    Setting,
    Strategy,
    Update,
    counted,
    data_weights,
    merged_heads,
    merges_so_far,
)
from strategies.increments import add_entrywise, merging_increments
from strategies.ties import disjoint_mean


class DareOptions(Options):
    """Options of DARE.

    Attributes:
        density: ρ, the share of entries that are kept, on average.
        then: how the sparse increments are merged: by their `mean` or by TIES' elected signs, in
            both cases weighted by examples; what is masked is not trimmed once more.
    """

    density: float = Field(0.5, gt=0, le=1)
    then: Literal["mean", "ties"] = "mean"


def _mean(increments: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("k,kmn->mn", weights, increments)


_THEN = {"mean": _mean, "ties": disjoint_mean}


def dare(options: DareOptions, setting: Setting) -> Strategy:
    """Mask, rescale, merge; then truncate to the largest rank. Ranks may differ."""

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        weights = torch.tensor(data_weights(updates), dtype=torch.float64)
        done = merges_so_far(state)

        def rule(module: str, increments: Tensor) -> Tensor:
            for update, increment in zip(updates, increments, strict=True):
                stream = torch_generator(setting.seed, "dare", done, update.client.client, module)
                kept = torch.rand(increment.shape, generator=stream) < options.density
                increment.mul_(kept).div_(options.density)
            return _THEN[options.then](increments, weights)

        heads = merged_heads(state, updates)
        return add_entrywise({**state, **counted(state)}, updates, setting, rule, heads)

    return merging_increments(setting, merge)
