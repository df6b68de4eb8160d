"""Work in pieces, on as many cores as there are, with sums that do not depend on how many.

Every piece is computed on one thread, whoever computes it; torch lets go of Python's lock
meanwhile.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores_here() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(work: Callable[[Piece], Result], pieces: Iterable[Piece], cores: int) -> list[Result]:
    """Return `work` of every piece, in order, done by `cores` threads; one does it here and now."""
    if cores == 1:
        return [work(piece) for piece in pieces]
    with (
        _blas_on_one_thread,
        ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(work, pieces))


class _BlasOnOneThread:
    """Keeps the BLAS of numpy and scipy from taking all cores, while anybody works in pieces.

    Its threads are the process's: whoever comes first limits them, the last one lets go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limiter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._limiter = _controller().limit(limits=1, user_api="blas")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._limiter.restore_original_limits()


_controller = functools.cache(ThreadpoolController)
_blas_on_one_thread = _BlasOnOneThread()
