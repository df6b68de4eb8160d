"""Straight lines, and planes, through adapters; and the barrier that a line meets.

Two ways lead from one adapter to another. The factor path mixes A and B apart, the delta path their
products:

    factors:  Σ c_i B_i · Σ c_i A_i           rank r, as one who averages what clients send
    deltas:   Σ c_i s_i B_i A_i               rank at most Σ r_i

On a line, with c = (1-λ, λ) and one s, `ΔW_f = ΔW_m - s·λ(1-λ)·(B_2 - B_1)(A_2 - A_1)`. All that is
no factor (heads, residuals) is mixed entry by entry on both; what only some ends hold, as the head
of one task among several, is mixed over these. Source: copra specification 3.1, 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.errors import ConfigError
from common.lowrank import (
    Span,
    Term,
    adapted_modules,
    balanced_factors,
    factor_names,
    is_factor,
    named_factors,
)
from common.tensors import Tensors


@dataclass(frozen=True)
class End:
    """One adapter that a path leads to: its tensors, rank r and scale s."""

    tensors: Tensors
    rank: int
    scale: float


class Mixture(Protocol):
    """Adapters mixed by coefficients that sum to 1; `rank` is that of every mixture."""

    rank: int

    def at(self, coefficients: Sequence[float]) -> dict[str, Tensor]:
        """Return the mixture `Σ c_i θ_i`, one coefficient an end."""


class FactorMixture:
    """Mixtures of A and B apart.

    Raises:
        ConfigError: the ends differ in rank or scale, so that their factors do not correspond.
    """

    def __init__(self, ends: Sequence[End]) -> None:
        kinds = sorted({(end.rank, end.scale) for end in ends})
        if len(kinds) > 1:
            raise ConfigError(
                f"factors of unlike rank or scale do not correspond: (r, s) = {kinds[0]} and "
                f"{kinds[1]}; mix their deltas"
            )
        self.rank = ends[0].rank
        self._ends = ends

    def at(self, coefficients: Sequence[float]) -> dict[str, Tensor]:
        """Return the mixture, factors and all else entry by entry."""
        return _entrywise(coefficients, [end.tensors for end in self._ends])


class DeltaMixture:
    """Mixtures of the deltas, factored: one QR a module serves every point.

    `scale` is s of what is returned, at any rank.
    """

    def __init__(self, ends: Sequence[End], scale: float) -> None:
        self._ends, self._scale = ends, scale
        modules = adapted_modules(ends[0].tensors)
        self._spans = {m: Span([Term.of(end.tensors, m) for end in ends]) for m in modules}
        # A mixture has no more directions than its smallest module could hold.
        sizes = [min(_size(ends[0].tensors, module)) for module in modules]
        self.rank = min(sum(end.rank for end in ends), *sizes)

    def at(self, coefficients: Sequence[float]) -> dict[str, Tensor]:
        """Return the mixture, exact but for rounding to float32."""
        others = [{n: t for n, t in end.tensors.items() if not is_factor(n)} for end in self._ends]
        mixed = _entrywise(coefficients, others)
        scaled = [c * end.scale for c, end in zip(coefficients, self._ends, strict=True)]
        for module, span in self._spans.items():
            best = span.svd(scaled).truncated(self.rank)
            mixed |= named_factors(module, balanced_factors(best, self._scale))
        return mixed

    def distance(self, coefficients: Sequence[float]) -> float:
        """Return `‖Σ c_i s_i B_i A_i‖` over all modules, for any coefficients."""
        scaled = [c * end.scale for c, end in zip(coefficients, self._ends, strict=True)]
        return float(sum(span.norm(scaled) ** 2 for span in self._spans.values()) ** 0.5)


def _size(tensors: Tensors, module: str) -> tuple[int, int]:
    name_B, name_A = factor_names(module)
    return tensors[name_B].shape[0], tensors[name_A].shape[1]


def _entrywise(coefficients: Sequence[float], members: Sequence[Tensors]) -> dict[str, Tensor]:
    mixed = {}
    for name in sorted({name for member in members for name in member}):
        held = [(c, m[name]) for c, m in zip(coefficients, members, strict=True) if name in m]
        if len(held) == 1:
            mixed[name] = held[0][1]
            continue
        share = sum(c for c, _ in held) if len(held) < len(members) else 1.0
        total = torch.stack([c * tensor.double() for c, tensor in held]).sum(dim=0)
        mixed[name] = (total / share).to(held[0][1].dtype)
    return mixed


@dataclass(frozen=True)
class Barrier:
    """The highest bump over the straight line between the losses of the ends.

    Attributes:
        height: `max_λ [L(λ) - (1-λ)·L(0) - λ·L(1)]`, in nats; 0 at the ends, so never below it.
        error: the standard error of that difference, paired over rows, at this λ.
        at: the λ of the maximum.
    """

    height: float
    error: float
    at: float


def barrier(positions: Sequence[float], losses: Tensor) -> Barrier:
    """Return the barrier of losses (points, rows) at ascending λ from 0 to 1.

    The tilted baseline of Entezari et al. (arXiv 2110.06296). A barrier of 0 does not say that the
    middle is better than the ends, only that there is no bump.
    """
    if positions[0] != 0 or positions[-1] != 1:
        raise ValueError(f"a path goes from 0 to 1, not from {positions[0]} to {positions[-1]}")
    share = torch.tensor(positions, dtype=torch.float64)[:, None]
    over = losses.double() - (1 - share) * losses[0].double() - share * losses[-1].double()
    means = over.mean(dim=1)
    # At the ends the difference is zero by definition; rounding must not decide where the top is.
    means[0] = means[-1] = 0.0
    top = int(means.argmax())
    return Barrier(float(means[top]), standard_error(over[top]), positions[top])


def standard_error(differences: Tensor) -> float:
    """Return `sd/√n` of paired differences (n,); 0 for a single row, which has no spread."""
    count = len(differences)
    return float(differences.double().std()) / count**0.5 if count > 1 else 0.0
