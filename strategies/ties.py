"""TIES merging: trim, elect signs, and average what agrees with them.

Yadav et al., arXiv 2306.01708, section 3.2. Of every τ_k only the largest entries stay; each entry
elects a sign `γ = sgn(Σ p_k τ_k)`, and the merge is `λ Σ_agree p_k τ_k / Σ_agree p_k` over the
clients of that sign, `p_k = n_k/Σn`. Dividing by the number of those clients instead, as PEFT
does, shrinks the merge to about 1/K of its size where weights sum to 1.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.tensors import Tensors
from strategies.base import (
    Merged,
    Options,
    Probe,
    Setting,
    Strategy,
    Update,
    data_weights,
    merged_heads,
)
from strategies.increments import add_entrywise, merging_increments


class TiesOptions(Options):
    """Options of TIES.

    Attributes:
        density: ρ, the share of entries that are kept of each increment, in each module.
        scaling: λ, how many times the merged increment is added. Heads are averaged, not scaled.
    """

    density: float = Field(0.2, gt=0, le=1)
    scaling: float = Field(1.0, gt=0)


def ties(options: TiesOptions, setting: Setting) -> Strategy:
    """Trim, elect, average; then truncate to the largest rank. Ranks may differ."""

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        weights = torch.tensor(data_weights(updates), dtype=torch.float64)

        def rule(_: str, increments: Tensor) -> Tensor:
            kept = torch.stack([trimmed(increment, options.density) for increment in increments])
            return options.scaling * disjoint_mean(kept, weights)

        return add_entrywise(state, updates, setting, rule, merged_heads(state, updates))

    return merging_increments(setting, merge)


def trimmed(increment: Tensor, density: float) -> Tensor:
    """Return the matrix with all but the ⌈ρmn⌉ largest magnitudes zero; equal ones all stay."""
    magnitudes = increment.abs().flatten()
    # The rounding of ρmn itself must not add an entry.
    kept = math.ceil(round(density * len(magnitudes), 9))
    position = len(magnitudes) - kept
    # A partial sort: torch's own selection takes ten times as long.
    threshold = float(np.partition(magnitudes.numpy(), position)[position])
    return torch.where(increment.abs() >= threshold, increment, 0.0)


def disjoint_mean(increments: Tensor, weights: Tensor) -> Tensor:
    """Return the mean (m, n) of the entries of (K, m, n) that have the elected sign.

    `γ = sgn(Σ p_k τ_k)`; the mean over the clients that agree takes the same p_k, rescaled to
    sum to 1 among them. Where the sum vanishes nobody is elected, and nothing is added.
    """
    shares = weights[:, None, None]
    elected = (shares * increments).sum(dim=0).sign()
    agreeing = shares * (increments.sign() == elected) * (elected != 0)
    total = agreeing.sum(dim=0)
    return (agreeing * increments).sum(dim=0) / torch.where(total > 0, total, 1.0)
