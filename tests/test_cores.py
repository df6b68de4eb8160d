"""Work in pieces: the same results on any number of cores, one thread a piece."""

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  # its BLAS is one of those that must be limited
import torch
from threadpoolctl import threadpool_info

from common.cores import in_pieces


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_results_come_in_the_order_of_the_pieces(cores: int) -> None:
    assert in_pieces(lambda piece: piece**2, range(7), cores) == [0, 1, 4, 9, 16, 25, 36]


def test_a_piece_has_one_thread_and_the_process_gets_its_own_back() -> None:
    np.ones((2, 2)) @ np.ones((2, 2))
    before = blas_threads(), torch.get_num_threads()

    def threads(nested: bool) -> tuple[set[int], int]:
        if nested:
            in_pieces(threads, [False, False], 2)
        return blas_threads(), torch.get_num_threads()

    # Where pieces are cut in pieces themselves, the inner end must not lift the outer limit.
    assert in_pieces(threads, [True, True, False], 2) == [({1}, 1)] * 3
    assert (blas_threads(), torch.get_num_threads()) == before


def test_a_failing_piece_is_reported_and_lifts_the_limit() -> None:
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        in_pieces(lambda piece: 1 // piece, [1, 0], 2)
    assert blas_threads() == before
