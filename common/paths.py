"""Straight lines, and planes, through adapters; and the barrier that a line meets.

Two ways lead from one adapter to another. The factor path mixes A and B apart, the delta path their
products:

    factors:  Σ c_i B_i · Σ c_i A_i           rank r, as one who averages what clients send
    deltas:   Σ c_i s_i B_i A_i               rank at most Σ r_i

On a line, with c = (1-λ, λ) and one s, `ΔW_f = ΔW_m - s·λ(1-λ)·(B_2 - B_1)(A_2 - A_1)`. All that is
no factor is mixed entry by entry on both: a residual that an end lacks is zero there, and a head
that only some ends hold, as those of several tasks, is mixed over these. Source: copra
specification 3.1, 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.lowrank import (
    SVD,
    Span,
    Term,
    adapted_modules,
    balanced_factors,
    factor_names,
    is_factor,
    named_factors,
)
from common.residuals import is_residual
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
    """Mixtures of A and B apart, at the scale of the ends.

    Raises:
        ConfigError: the ends differ in rank or scale, so that their factors do not correspond, or
            in the modules that they adapt.
    """

    def __init__(self, ends: Sequence[End]) -> None:
        _common_modules(ends)
        kinds = sorted({(end.rank, end.scale) for end in ends})
        if len(kinds) > 1:
            (r, s), (other_r, other_s) = kinds[0], kinds[-1]
            raise ConfigError(
                f"factors of rank {r} at scale {s:g} and of rank {other_r} at scale {other_s:g} "
                "do not correspond; their deltas can be mixed"
            )
        self.rank = ends[0].rank
        self._ends = ends

    def at(self, coefficients: Sequence[float]) -> dict[str, Tensor]:
        """Return the mixture, factors and all else entry by entry."""
        return _entrywise(coefficients, [end.tensors for end in self._ends])


class DeltaMixture:
    """Mixtures of the deltas, factored: one QR a module serves every point.

    `scale` gives s of what is returned, by its rank. That is the sum of the ends' ranks, or the
    most that any module can have; a smaller module is filled up with zeros.

    Raises:
        ConfigError: the ends differ in the modules that they adapt.
    """

    def __init__(self, ends: Sequence[End], scale: Callable[[int], float]) -> None:
        self._ends = ends
        modules = _common_modules(ends)
        self._spans = {m: Span([Term.of(end.tensors, m) for end in ends]) for m in modules}
        sizes = [min(_size(ends[0].tensors, module)) for module in modules]
        self.rank = min(sum(end.rank for end in ends), max(sizes))
        self._scale = scale(self.rank)

    def at(self, coefficients: Sequence[float]) -> dict[str, Tensor]:
        """Return the mixture, exact but for rounding to float32."""
        others = [{n: t for n, t in end.tensors.items() if not is_factor(n)} for end in self._ends]
        mixed = _entrywise(coefficients, others)
        for module in self._spans:
            term = balanced_factors(self.delta(module, coefficients), self._scale)
            missing = self.rank - term.rank
            B, A = functional.pad(term.B, (0, missing)), functional.pad(term.A, (0, 0, 0, missing))
            mixed |= named_factors(module, Term(B, A))
        return mixed

    def delta(self, module: str, coefficients: Sequence[float]) -> SVD:
        """Return `Σ c_i s_i B_i A_i` of a module, for any coefficients, in float64."""
        return self._spans[module].svd(self._scaled(coefficients))

    def inner(self, first: Sequence[float], second: Sequence[float]) -> float:
        """Return the inner product of two mixtures' deltas over all modules.

        Of any coefficients: with those of differences, (-1, 1, 0), differences are measured
        without the rounding of what the ends share.
        """
        pairs = (
            span.core(self._scaled(first)) * span.core(self._scaled(second))
            for span in self._spans.values()
        )
        return float(sum(pair.sum() for pair in pairs))

    def _scaled(self, coefficients: Sequence[float]) -> list[float]:
        return [c * end.scale for c, end in zip(coefficients, self._ends, strict=True)]


def _common_modules(ends: Sequence[End]) -> list[str]:
    """Return the modules that every end adapts."""
    first, *others = ({*adapted_modules(end.tensors)} for end in ends)
    if differing := sorted({module for modules in others for module in first ^ modules}):
        raise ConfigError(
            f"{differing[0]} has an adapter at some ends only; a path needs it at all"
        )
    return sorted(first)


def _size(tensors: Tensors, module: str) -> tuple[int, int]:
    name_B, name_A = factor_names(module)
    return tensors[name_B].shape[0], tensors[name_A].shape[1]


def _entrywise(coefficients: Sequence[float], members: Sequence[Tensors]) -> dict[str, Tensor]:
    mixed = {}
    for name in sorted({name for member in members for name in member}):
        held = [(c, m[name]) for c, m in zip(coefficients, members, strict=True) if name in m]
        everywhere = len(held) == len(members) or is_residual(name)
        if len(held) == 1 and not everywhere:
            mixed[name] = held[0][1]
            continue
        total = torch.stack([c * tensor.double() for c, tensor in held]).sum(dim=0)
        if not everywhere:
            total /= _positive(sum(c for c, _ in held), name)
        mixed[name] = total.to(held[0][1].dtype)
    return mixed


def _positive(share: float, name: str) -> float:
    """Return the share of the ends that hold `name`, by which their mean is divided."""
    if share <= 0:
        raise ValueError(f"only some ends hold {name}, and their coefficients sum to {share:g}")
    return share


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


class Plane:
    """The plane through three adapters, in coordinates in which distances are those of deltas.

    The first adapter is the origin, and the second lies on the first axis. Coordinates are
    orthonormal by the inner product of the deltas, as in Garipov et al. (arXiv 1802.10026); what
    is no factor follows the same coefficients, and does not count in distances.

    Attributes:
        corners: where the three are, (x, y) each, in units of the norm `‖s·B·A‖` over all modules.

    Raises:
        ConfigError: the three lie on a line.
    """

    def __init__(self, mixture: DeltaMixture) -> None:
        base = self._base = mixture.inner(_TO_SECOND, _TO_SECOND) ** 0.5
        self._lean = mixture.inner(_TO_SECOND, _TO_THIRD) / base if base else 0.0
        side = mixture.inner(_TO_THIRD, _TO_THIRD) ** 0.5
        height = max(side**2 - self._lean**2, 0.0) ** 0.5
        # A difference of squares keeps half of float64's digits.
        if min(base, height) <= 1e-6 * max(base, side):
            raise ConfigError("the three adapters lie on a line, so there is no plane through them")
        self._height = height
        self.corners = ((0.0, 0.0), (base, 0.0), (self._lean, height))

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """Return the shares of the three adapters at a point; they sum to 1, some may be < 0."""
        third = y / self._height
        second = (x - third * self._lean) / self._base
        return 1.0 - second - third, second, third

    def foot(self, of: DeltaMixture) -> tuple[float, float, float]:
        """Return where a fourth adapter is projected to, (x, y), and how far off the plane it is.

        `of` mixes the three of the plane and, last, the fourth.
        """
        second, third, fourth = (*_TO_SECOND, 0.0), (*_TO_THIRD, 0.0), (-1.0, 0.0, 0.0, 1.0)
        x = of.inner(fourth, second) / self._base
        y = (of.inner(fourth, third) - self._lean * x) / self._height
        return x, y, max(of.inner(fourth, fourth) - x**2 - y**2, 0.0) ** 0.5


_TO_SECOND, _TO_THIRD = (-1.0, 1.0, 0.0), (-1.0, 0.0, 1.0)
