"""Task arithmetic: add a multiple of the mean of what clients have added.

Ilharco et al., arXiv 2212.04089: `θ + λ Σ_k τ_k`. Here `G + λ Σ p_k τ_k` with `p_k = n_k/Σn`, so
that at λ = 1 it is the mean of the increments; from stacked factors, no full matrix is formed.
"""

from collections.abc import Iterable

from pydantic import Field

from common.tensors import Tensors
from strategies.base import Merged, Options, Probe, Setting, Strategy, Update
from strategies.increments import add_mean, merging_increments


class TaskArithmeticOptions(Options):
    """Options of task arithmetic.

    Attributes:
        scaling: λ, how many times the mean increment is added. Heads are averaged and not scaled.
    """

    scaling: float = Field(1.0, gt=0)


def task_arithmetic(options: TaskArithmeticOptions, setting: Setting) -> Strategy:
    """Add `λ Σ p_k τ_k` and truncate to the largest rank; ranks may differ."""

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        by_data = ((float(u.num_examples), u) for u in updates)
        return add_mean(state, by_data, setting, options.scaling)

    return merging_increments(setting, merge)
