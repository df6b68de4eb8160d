"""Geometric median of increments (RFA): the point with the least sum of distances to the clients.

Pillutla et al., arXiv 1912.13445: smoothed Weiszfeld iterations `β_k ∝ 1/max(ν, ‖x_k - z‖)`,
`z = Σ β_k x_k`, where x_k is the whole of what client k changed. All that they need are the K×K
inner products of the clients' increments, which come from the factors; the merge is then a weighted
mean. They start from the half of the clients around the most central one: from the mean of all, a
distant attacker would be left behind too slowly. Up to half of the clients may be malicious. Every
client counts once: the paper weights by examples, which are a client's own claim.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from common.tensors import Tensors
from strategies.base import Merged, Options, Probe, Setting, Strategy, Update
from strategies.increments import add_mean, merging_increments
from strategies.robust import inner_products


class GeometricMedianOptions(Options):
    """Options of the geometric median.

    Attributes:
        iterations: Weiszfeld steps; the paper finds three to five enough.
        smoothing: nu, relative to the median length of an increment: no client counts as nearer.
    """

    iterations: int = Field(8, ge=1)
    smoothing: float = Field(1e-6, gt=0, lt=1)


def geometric_median(options: GeometricMedianOptions, setting: Setting) -> Strategy:
    """Add the geometric median, and truncate to the largest rank; ranks may differ."""

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        shares = weiszfeld(inner_products(updates), options.iterations, options.smoothing)
        merged = add_mean(state, zip(shares, updates, strict=True), setting)
        weights = {str(u.client.client): w for u, w in zip(updates, shares, strict=True)}
        return Merged(merged.state, {**merged.diagnostics, "weights": weights})

    return merging_increments(setting, merge)


def weiszfeld(products: Tensor, iterations: int, smoothing: float) -> list[float]:
    """Return β (K,), summing to 1, from the inner products (K, K) of the points."""
    squares = products.diagonal().clamp_min(0)
    # Not so small that its inverse would overflow, where nobody has moved.
    nearest = max(smoothing * float(squares.median().sqrt()), 1e-100)
    shares = _central_half(products, squares)
    for _ in range(iterations):
        apart = squares - 2 * products @ shares + shares @ products @ shares
        inverse = 1 / apart.clamp_min(0).sqrt().clamp_min(nearest)
        shares = inverse / inverse.sum()
    return [float(share) for share in shares]


def _central_half(products: Tensor, squares: Tensor) -> Tensor:
    """Return equal shares (K,) for the half of the points that is nearest to the medoid."""
    apart = (squares[:, None] + squares - 2 * products).clamp_min(0).sqrt()
    medoid = int(apart.sum(dim=1).argmin())
    half = apart[medoid].argsort(stable=True)[: (len(squares) + 1) // 2]
    shares = torch.zeros_like(squares)
    shares[half] = 1 / len(half)
    return shares
