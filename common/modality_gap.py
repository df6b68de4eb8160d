"""The modality gap: how far the vectors of a soft prompt are from the patch embeddings of pictures.

Squared maximum mean discrepancies (Gretton et al., JMLR 2012) between X, the rows of a prompt,
and Y, batches of patch embeddings, as algorithm 1 of cross-modality prompt transfer (Zhang et al.,
ICLR 2025, OpenReview SYnIf4LxAG). Every statistic is a function of squared distances within X,
across, and within Y; those within a batch of patches serve all prompts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from common.errors import ConfigError
from common.tensors import Tensors

# From squared distances within X (pairs,), across (..., n, m) and within Y (..., pairs), each pair
# of different points once, to MMD² (...).
Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]

_SQUARINGS = 4  # kernels of widths 4s, 2s, s, s/2, s/4
_BATCHES_AT_ONCE = 32  # bounds the memory; what is made of one prompt stays in the cache


def multi_kernel(within_x: Tensor, across: Tensor, within_y: Tensor) -> Tensor:
    """Return the paper's `MMD² = mean K_XX + mean K_YY - 2 mean K_XY`, diagonals included.

    `k(a, b) = Σ_u exp(-‖a - b‖²/b_u)`, `b_u = s·2^u`, u = -2..2, with s the mean squared distance
    of different points of X ∪ Y: it does not change when all points are scaled, and it is 0 if X
    and Y are the same points. Since s depends on the pair, values rank prompts but are no metric.
    Where all points are one, it is 0.
    """
    n, m = across.shape[-2:]
    crossing = across.flatten(-2)
    total = within_x.sum() + crossing.sum(dim=-1) + within_y.sum(dim=-1)
    width = (total / ((n + m) * (n + m - 1) / 2))[..., None]
    # Where all points are one every distance is 0, and so is the statistic.
    inverse = torch.where(width > 0, -1 / (4 * width), 0.0)
    # Of a point and itself each of the five kernels is 1.
    itself = _SQUARINGS + 1
    of_x = (itself * n + 2 * _kernels(within_x * inverse)) / n**2
    of_y = (itself * m + 2 * _kernels(within_y * inverse)) / m**2
    between: Tensor = _kernels(crossing * inverse) / (n * m)
    return of_x + of_y - 2 * between


def _kernels(exponents: Tensor) -> Tensor:
    """Return `Σ_j exp(2^j·e)`, j = 0..4, summed over the last axis; the exponents are spent."""
    kernel = exponents.exp_()
    total = kernel.sum(dim=-1)
    # The widths halve: each kernel is the square of the next wider one.
    for _ in range(_SQUARINGS):
        total += kernel.square_().sum(dim=-1)
    return total


def gaussian(sigma: float, estimator: str = "unbiased") -> Statistic:
    """Return the MMD² of one kernel, `exp(-‖a - b‖²/(2σ²))`.

    With σ fixed, values of different prompts can be compared. Estimators, of n rows and m patches:

    - `biased`: the V-statistic, diagonals included; never below 0;
    - `unbiased`: `Σ_{i≠j} K_XX/(n(n-1)) + Σ_{i≠j} K_YY/(m(m-1)) - 2 mean K_XY`. Of independent
      samples of one distribution its mean is 0; if X and Y are the same points it is below 0;
    - `paired`: the same without i = j across, for n = m; 0 if X and Y are the same points.

    Raises:
        ConfigError: σ is not above 0, or there is no such estimator.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"sigma = {sigma} must be a number above 0")
    if estimator not in _ESTIMATORS:
        choices = ", ".join(_ESTIMATORS)
        raise ConfigError(f"estimator {estimator!r} is not known; choose one of {choices}")
    combine = _ESTIMATORS[estimator]

    def statistic(within_x: Tensor, across: Tensor, within_y: Tensor) -> Tensor:
        blocks = (within_x, across, within_y)
        return combine(*(torch.exp(block / (-2 * sigma**2)) for block in blocks))

    return statistic


def _biased(of_x: Tensor, between: Tensor, of_y: Tensor) -> Tensor:
    n, m = between.shape[-2:]
    within = (n + 2 * of_x.sum()) / n**2 + (m + 2 * of_y.sum(dim=-1)) / m**2
    return within - 2 * between.mean(dim=(-2, -1))


def _unbiased(of_x: Tensor, between: Tensor, of_y: Tensor) -> Tensor:
    return of_x.mean() + of_y.mean(dim=-1) - 2 * between.mean(dim=(-2, -1))


def _paired(of_x: Tensor, between: Tensor, of_y: Tensor) -> Tensor:
    n, m = between.shape[-2:]
    if n != m:
        raise ConfigError(f"estimator 'paired' needs as many patches as rows, not {m} and {n}")
    others = between.sum(dim=(-2, -1)) - between.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return of_x.mean() + of_y.mean(dim=-1) - 2 * others / (n * (n - 1))


_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "biased": _biased,
    "unbiased": _unbiased,
    "paired": _paired,
}


def mmd(X: Tensor, Y: Tensor, statistic: Statistic = multi_kernel) -> float:
    """Return the statistic of all points X (n, d) and Y (m, d), in float64.

    Raises:
        ConfigError: fewer than one point, other widths, or a number that is not finite.
    """
    _check_points("X", X, X.shape[-1], least=1)
    _check_points("Y", Y, X.shape[-1], least=1)
    X, Y = X.double(), Y.double()
    # By differences: points that are one have the distance 0, not what rounding leaves.
    across = torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist")
    return float(statistic(torch.pdist(X).square(), across.square(), torch.pdist(Y).square()))


def median_distance(points: Tensor, generator: torch.Generator, most: int = 2000) -> float:
    """Return σ: the median distance between different points of a fixed pooled reference (n, d).

    Of `most` points drawn from them, if there are more.

    Raises:
        ConfigError: fewer than two points, or half of the pairs are one point.
    """
    _check_points("the reference", points, points.shape[-1], least=2)
    if len(points) > most:
        points = points[torch.randperm(len(points), generator=generator)[:most]]
    found = float(torch.pdist(points.double()).median())
    if not found > 0:
        raise ConfigError("most points of the reference are one; their median distance is 0")
    return found


@dataclass(frozen=True)
class Gap:
    """The mean of a statistic over batches of patches.

    Attributes:
        value: the mean.
        standard_error: of the mean, over the draws of batches from these very patches; what other
            pictures would give is not in it. None of a single batch.
        batches: how many.
    """

    value: float
    standard_error: float | None
    batches: int


def modality_gaps(
    prompts: Tensors,
    patches: Tensor,
    generator: torch.Generator,
    *,
    statistic: Statistic = multi_kernel,
    batch: int = 100,
    batches: int | None = 200,
    passes: int = 5,
) -> dict[str, Gap]:
    """Return the gap of every prompt to the patches; lower is nearer.

    Each pass shuffles the patches and cuts them into batches; what is left over is dropped. The
    paper takes all batches of 5 passes, and as many patches a batch as the prompt has rows. All
    prompts see the same batches. Computed in float32, from a common origin.

    Args:
        prompts: by name, each (l, d); rows that mean nothing are to be dropped before.
        patches: (points, d), all patches of all pictures, or one mean a picture.
        generator: of the shuffles, on the CPU.
        statistic: `multi_kernel`, or one of `gaussian`.
        batch: patches of a batch.
        batches: stop after that many; None for all of all passes.
        passes: the most passes over the patches.

    Raises:
        ConfigError: no prompt, other widths than the patches', fewer patches than a batch, or a
            number that is not finite.
    """
    if not prompts:
        raise ConfigError("there is no prompt whose gap could be measured")
    if batch < 2 or passes < 1 or (batches is not None and batches < 1):
        raise ConfigError(
            f"batch = {batch}, batches = {batches}, passes = {passes}: batches need two patches, "
            "and there must be one batch and one pass at least"
        )
    _check_points("the patches", patches, patches.shape[-1], least=batch)
    for name, prompt in prompts.items():
        _check_points(f"the prompt {name!r}", prompt, patches.shape[-1], least=1)
    # Distances are of differences: from a point among them on, large common offsets cost no digits.
    origin = patches[0].float()
    rows = [prompt.float().to(origin.device) - origin for prompt in prompts.values()]
    sizes = [len(prompt) for prompt in rows]
    stacked = torch.cat(rows)
    within = [_different(_squared_distances(prompt, prompt)) for prompt in rows]
    available = passes * (len(patches) // batch)
    wanted = available if batches is None else min(batches, available)
    found: list[Tensor] = []
    for chosen in _batches(len(patches), batch, wanted, generator):
        points = patches[chosen.flatten()].float() - origin
        across = _squared_distances(stacked, points).view(-1, len(chosen), batch)
        of_batches = points.view(len(chosen), batch, -1)
        within_patches = _different(_squared_distances(of_batches, of_batches))
        values = [
            statistic(within[at], part.movedim(1, 0), within_patches)
            for at, part in enumerate(torch.split(across, sizes))
        ]
        found.append(torch.stack(values).cpu())
    by_prompt = torch.cat(found, dim=1).double()
    return {name: _gap(values) for name, values in zip(prompts, by_prompt.tolist(), strict=True)}


def _batches(points: int, batch: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield positions of `count` batches, (k, batch), a few batches at a time."""
    a_pass = points // batch
    while count > 0:
        order = torch.randperm(points, generator=generator)[: min(a_pass, count) * batch]
        yield from torch.split(order.view(-1, batch), _BATCHES_AT_ONCE)
        count -= a_pass


def _squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    """Return (..., n, m), by inner products."""
    of_x, of_y = X.square().sum(dim=-1), Y.square().sum(dim=-1)
    found = (X @ Y.transpose(-2, -1)).mul_(-2).add_(of_x[..., :, None]).add_(of_y[..., None, :])
    return found.clamp_min_(0)


def _different(distances: Tensor) -> Tensor:
    """Return each pair of different points once: (..., n, n) gives (..., n(n-1)/2)."""
    n = distances.shape[-1]
    first, second = torch.triu_indices(n, n, offset=1, device=distances.device)
    return distances[..., first, second]


def _gap(values: list[float]) -> Gap:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Gap(fmean(values), error, len(values))


def _check_points(which: str, points: Tensor, width: int, least: int) -> None:
    if points.ndim != 2 or points.shape[1] != width or len(points) < least:
        raise ConfigError(
            f"{which} of shape {tuple(points.shape)} must be vectors of width {width}, {least} of "
            "them at least"
        )
    # One pass, and nothing of their size is made; both pass NaN on.
    lowest, highest = points.aminmax()
    if not -math.inf < float(lowest) <= float(highest) < math.inf:
        raise ConfigError(f"{which} holds NaN or infinity")
