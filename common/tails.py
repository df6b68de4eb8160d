"""The trailing directions of an adapter: HetLoRA's penalty on them, and its pruning.

Cho et al., arXiv 2401.06432. With t = floor(γ·r), the tail of a module is `B[:, t:]` and `A[t:]`,
and its size `‖B[:, t:]‖_F·‖A[t:]‖_F`, summed over modules.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from common.lowrank import adapted_modules, factor_names
from common.tensors import Tensors


def kept_directions(rank: int, share: float) -> int:
    """Return t = floor(share rank), but at least one."""
    return max(1, math.floor(share * rank))


def tail_size(tensors: Tensors, kept: int) -> Tensor:
    """Return the size (scalar) of what lies behind the first `kept` directions of all modules."""
    sizes = []
    for module in adapted_modules(tensors):
        name_B, name_A = factor_names(module)
        B, A = tensors[name_B], tensors[name_A]
        sizes.append(B[:, kept:].norm() * A[kept:].norm())
    return torch.stack(sizes).sum() if sizes else torch.zeros(())


def padded(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """Return the tensors with every factor padded by zeros to `rank`: pruned directions.

    Both factors of such a direction are zero, so that no gradient ever reaches it.
    """
    full = dict(tensors)
    for module in adapted_modules(tensors):
        name_B, name_A = factor_names(module)
        missing = rank - tensors[name_A].shape[0]
        full[name_B] = functional.pad(tensors[name_B], (0, missing))
        full[name_A] = functional.pad(tensors[name_A], (0, 0, 0, missing))
    return full
