"""The Low-Norm Effect: trained prompts with some of their vectors corrupted, and what that counts.

A prompt's last axis is a vector and its last but one the position, as in `common.nemesis`. Source:
Nemesis (arXiv 2408.13979); its public code for this does not run, and how the paper counts is not
known, so that each function says what is done here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from scipy import special
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.nemesis import vector_norms


def _replace(vectors: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    draw = torch.empty(vectors.shape, device=generator.device)
    return draw.normal_(0.0, deviation, generator=generator)


def _rescale(vectors: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    return factor * vectors


def _rotate(vectors: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn each vector by this angle, in the plane that it spans with a uniform direction."""
    wide = vectors.double()
    draw = torch.empty(vectors.shape, dtype=wide.dtype, device=generator.device)
    draw = draw.normal_(generator=generator).to(wide.device)
    along = functional.normalize(wide, dim=-1)
    across = functional.normalize(draw - (draw * along).sum(-1, keepdim=True) * along, dim=-1)
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    angle = math.radians(degrees)
    turned: Tensor = lengths * (math.cos(angle) * along + math.sin(angle) * across)
    return turned


Effect = Literal["lowers", "keeps", "raises", "mixed"]


@dataclass(frozen=True)
class CorruptionKind:
    """What is done to the vectors, and to which amounts; `keeps_norms` up to rounding."""

    change: Callable[[Tensor, float, torch.Generator], Tensor]
    lowest: float = -math.inf
    keeps_norms: bool = False


CORRUPTIONS: Mapping[str, CorruptionKind] = {
    "replace": CorruptionKind(_replace, lowest=0.0),
    "rescale": CorruptionKind(_rescale),
    "rotate": CorruptionKind(_rotate, keeps_norms=True),
}


@dataclass(frozen=True)
class Corruption:
    """A change of some vectors of a trained prompt, all else frozen.

    Attributes:
        kind: `replace`: v <- z, z ~ N(0, s²·I); `rescale`: v <- g·v; `rotate`, a control that is
            not the paper's: v turned by an angle towards a uniformly random direction across it.
        amount: the standard deviation s >= 0, the factor g, or the angle in degrees. At 90° in a
            high dimension the new direction is all but uniformly random; `2·||v||·sin(angle/2)` is
            how far v moves, by which an angle can be matched to a `rescale`'s `|1 - g|·||v||`.
        positions: which, distinct and from 0; of several prompts, those of all of them.
    """

    kind: str
    amount: float
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise ConfigError(
                f"corruption {self.kind!r} is not known; choose one of {', '.join(CORRUPTIONS)}"
            )
        lowest = CORRUPTIONS[self.kind].lowest
        if not (math.isfinite(self.amount) and self.amount >= lowest):
            raise ConfigError(f"{self.kind} {self.amount}: the amount must be finite, >= {lowest}")
        if not self.positions or len(set(self.positions)) < len(self.positions):
            raise ConfigError(f"positions {self.positions} must be one or more, each once")

    @property
    def operation(self) -> str:
        """Return what it does, wherever: `rescale 0.5`."""
        return f"{self.kind} {self.amount:g}"


def corrupt(prompt: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
    """Return a corrupted copy of the prompt (..., M, d); each vector gets a draw of its own.

    Raises:
        ConfigError: a position is not one of the prompt's.
    """
    count = prompt.shape[-2]
    if outside := [i for i in corruption.positions if not 0 <= i < count]:
        raise ConfigError(f"position {outside[0]} is not among the prompt's 0..{count - 1}")
    corrupted = prompt.detach().clone()
    places = (..., list(corruption.positions), slice(None))
    change = CORRUPTIONS[corruption.kind].change
    corrupted[places] = change(corrupted[places], corruption.amount, generator).to(corrupted)
    return corrupted


def norm_effect(prompt: Tensor, corrupted: Tensor, corruption: Corruption) -> Effect:
    """Return what was done to the Euclidean norms at the corruption's positions.

    Judged by the norms obtained: a draw may be longer or shorter than what it replaces, and a zero
    vector times 0.5 is no shorter. `mixed` where the vectors do not agree. Only a rotation keeps
    norms by construction, whatever rounding left of that.
    """
    if CORRUPTIONS[corruption.kind].keeps_norms:
        return "keeps"
    places = (..., list(corruption.positions))
    before, after = vector_norms(prompt)[places], vector_norms(corrupted)[places]
    effects: Mapping[Effect, Tensor] = {
        "lowers": after < before,
        "keeps": after == before,
        "raises": after > before,
    }
    return next((effect for effect, holds in effects.items() if holds.all()), "mixed")


def agreed(effects: Iterable[Effect]) -> Effect:
    """Return the one effect that all of these are, or `mixed`."""
    first, *others = effects
    return first if all(other == first for other in others) else "mixed"


@dataclass(frozen=True)
class Cell:
    """One corruption of the prompts of several runs, an entry a seed.

    Attributes:
        effects: on the norms, of `norm_effect`.
        original_hits, hits: rows right before and after.
        rows: how many rows were judged.
    """

    corruption: Corruption
    effects: tuple[Effect, ...]
    original_hits: tuple[int, ...]
    hits: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def effect(self) -> Effect:
        """Return the effect on norms that all seeds share, or `mixed`."""
        return agreed(self.effects)

    @property
    def rises(self) -> bool:
        """Return whether the mean accuracy over seeds rises, strictly; without rounding."""
        pairs = zip(self.original_hits, self.hits, self.rows, strict=True)
        return sum(Fraction(after - before, rows) for before, after, rows in pairs) > 0


@dataclass(frozen=True)
class RiseCount:
    """In how many cells accuracy rises, and of how many."""

    rises: int
    of: int


def rise_counts(cells: Iterable[Cell], effect: Effect = "lowers") -> dict[str, RiseCount]:
    """Count the cells with this effect on norms in which mean accuracy rises; by operation too.

    With `lowers` this is the frequency of the Low-Norm Effect, by a rule of ours (the paper's and
    its denominator are not known). A count alone is no evidence: on a small test set a strict rise
    is often noise, which the same counts for `raises` and `keeps` show.

    Returns:
        The count and its denominator by `Corruption.operation`, and over all of them as `all`.
        An operation without such a cell is left out.
    """
    matching = [cell for cell in cells if cell.effect == effect]
    by_operation: dict[str, list[Cell]] = {"all": matching}
    for cell in matching:
        by_operation.setdefault(cell.corruption.operation, []).append(cell)
    return {
        operation: RiseCount(sum(cell.rises for cell in group), len(group))
        for operation, group in by_operation.items()
    }


@dataclass(frozen=True)
class PairedTest:
    """How many pairs rise and fall, and the two-sided p that both are equally likely."""

    rises: int
    falls: int
    p_value: float


def sign_test(differences: Sequence[float]) -> PairedTest:
    """Return the exact sign test of paired differences, such as hits after less before, by seed.

    Ties count for nothing. With n pairs p is at least `2^(1-n)`: three seeds cannot go below 1/4.

    Raises:
        ValueError: a difference is NaN.
    """
    if any(math.isnan(difference) for difference in differences):
        raise ValueError(f"a difference is NaN: {list(differences)}")
    return _binomial_test(sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def mcnemar_test(original: Tensor, corrupted: Tensor) -> PairedTest:
    """Return McNemar's exact test on whether each row was right before and after.

    Both are bool, (rows,). The rows of one run are one sample: those of several seeds on the same
    test set are not independent, and must not be put together.

    Raises:
        ValueError: they are not of the same rows, or not bool.
    """
    if original.shape != corrupted.shape:
        raise ValueError(f"{tuple(original.shape)} and {tuple(corrupted.shape)} are not paired")
    if original.dtype != torch.bool or corrupted.dtype != torch.bool:
        raise ValueError(f"hits are bool, not {original.dtype} and {corrupted.dtype}")
    return _binomial_test(int((corrupted & ~original).sum()), int((original & ~corrupted).sum()))


def _binomial_test(rises: int, falls: int) -> PairedTest:
    """Return `p = min(1, 2·P(X <= min(rises, falls)))`, X ~ Binomial(rises + falls, 1/2)."""
    tail = float(special.bdtr(min(rises, falls), rises + falls, 0.5))
    return PairedTest(rises, falls, min(1.0, 2 * tail))
