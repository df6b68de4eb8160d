"""Factored merge against a dense SVD: `python -m bench.merge`.

Baseline: form `Σ w_k s_k B_k A_k` as a full matrix and take its full SVD, as FlexLoRA's published
code does. Both give the same rank-r matrix; the ratio of their times is the claim.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from common.lowrank import SVD, Span, Term
from common.seeds import torch_generator

CLIENTS, RANK = 10, 8
REPEATS = {768: 5, 2048: 3}


def main() -> None:
    """Print one line of JSON a size."""
    torch.set_num_threads(1)
    for size, repeats in REPEATS.items():
        print(json.dumps(measure(size, repeats)), flush=True)


def measure(size: int, repeats: int) -> dict[str, float | int]:
    """Time both at (size, size), `CLIENTS` clients of rank `RANK`, in turn; return the ratio."""
    generator = torch_generator(0, "bench", size)
    terms = [
        Term(
            torch.randn(size, RANK, generator=generator, dtype=torch.float64),
            torch.randn(RANK, size, generator=generator, dtype=torch.float64),
        )
        for _ in range(CLIENTS)
    ]
    weights = [1 / CLIENTS] * CLIENTS
    pairs = [
        (_seconds(lambda: dense_svd(terms, weights)), _seconds(lambda: Span(terms).svd(weights)))
        for _ in range(repeats)
    ]
    factored = Span(terms).svd(weights).truncated(RANK).dense()
    dense = dense_svd(terms, weights).truncated(RANK).dense()
    difference = torch.linalg.matrix_norm(factored - dense) / torch.linalg.matrix_norm(dense)
    return {
        "size": size,
        "clients": CLIENTS,
        "rank": RANK,
        "dense_seconds": statistics.median(slow for slow, _ in pairs),
        "factored_seconds": statistics.median(fast for _, fast in pairs),
        "times_faster": statistics.median(slow / fast for slow, fast in pairs),
        "relative_difference": float(difference),
    }


def dense_svd(terms: list[Term], weights: list[float]) -> SVD:
    """Return the SVD of the sum by way of the full matrix."""
    full = sum(
        (w * term.B @ term.A for w, term in zip(weights, terms, strict=True)), torch.zeros(())
    )
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    return SVD(U, S, Vh.T)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
