"""Work in pieces, on as many cores as there are, with sums that do not depend on how many.

Every piece is computed on one thread, whoever computes it; torch lets go of Python's lock
meanwhile.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores_here() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(work: Callable[[Piece], Result], pieces: Iterable[Piece], cores: int) -> list[Result]:
    """Return `work` of every piece, in order, done by `cores` threads; one does it here and now."""
    if cores == 1:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(max_workers=cores) as pool:
        return list(pool.map(work, pieces))
