"""Factored algebra against the same sums made dense, in float64."""

from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.lowrank import (
    SVD,
    RunningSum,
    Span,
    Term,
    adapted_modules,
    balanced_factors,
    factor_names,
    is_factor,
    kept_energy,
    orthonormal_factors,
)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_term(seed: int, m: int, n: int, rank: int, size: float = 1.0) -> Term:
    draw = stream(seed)
    B = torch.randn(m, rank, generator=draw, dtype=torch.float64)
    return Term(size * B, torch.randn(rank, n, generator=draw, dtype=torch.float64))


def dense_sum(terms: list[Term], coefficients: list[float | Tensor]) -> Tensor:
    return sum((t.B.double() * c) @ t.A.double() for t, c in zip(terms, coefficients, strict=True))


def dense_truncation(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


MIXED = [  # ranks, coefficients; on 14x11, so that the last three have m above min(d)
    ([4, 8, 2], [0.5, 1.5, -0.75]),
    ([1, 1], [1.0, -1.0]),
    ([3], [1e-6]),
    ([16, 4, 8, 2], [2.0, -0.3, 0.7, 1e3]),
    ([11, 11], [1.0, -0.5]),
    ([5] * 9, [(-1.0) ** k * 10.0 ** (k - 4) for k in range(9)]),
]


@pytest.mark.parametrize(("ranks", "coefficients"), MIXED)
def test_qr_core_svd_equals_the_dense_truncated_svd(
    ranks: list[int], coefficients: list[float]
) -> None:
    terms = [random_term(k, 14, 11, rank) for k, rank in enumerate(ranks)]
    svd = Span(terms).svd(coefficients)
    exact = dense_sum(terms, coefficients)
    values = torch.linalg.svdvals(exact)
    kept = min(len(values), len(svd.S))
    assert relative_error(svd.S[:kept], values[:kept]) < 1e-10
    for rank in range(1, kept + 1):
        best = dense_truncation(exact, rank)
        assert relative_error(svd.truncated(rank).dense(), best) < 1e-10, rank


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_any_sum_is_reproduced_whatever_the_shapes(
    m: int, n: int, ranks: list[int], seed: int
) -> None:
    terms = [random_term(seed + k, m, n, rank) for k, rank in enumerate(ranks)]
    coefficients = (4 * torch.rand(len(ranks), generator=stream(seed)).double() - 2).tolist()
    exact = dense_sum(terms, coefficients)
    size = max(float(t.B.norm() * t.A.norm()) for t in terms)
    assert float((Span(terms).svd(coefficients).dense() - exact).norm()) < 1e-12 * size


def test_singular_vectors_are_orthonormal_and_values_descend() -> None:
    svd = Span([random_term(k, 14, 11, 3) for k in range(3)]).svd([1.0, -0.4, 2.0])
    identity = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(svd.U.T @ svd.U, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.V.T @ svd.V, identity, rtol=0, atol=1e-12)
    assert bool((svd.S.diff() <= 0).all())


def test_float32_factors_are_added_in_float64() -> None:
    terms = [random_term(k, 12, 10, 4) for k in range(3)]
    singles = [Term(t.B.float(), t.A.float()) for t in terms]
    coefficients = [0.3, -0.5, 1.2]
    svd = Span(singles).svd(coefficients)
    assert svd.U.dtype == svd.S.dtype == svd.V.dtype == torch.float64
    assert relative_error(svd.dense(), dense_sum(singles, coefficients)) < 1e-12


def test_rank_deficient_terms_are_harmless() -> None:
    full, twin = random_term(0, 14, 11, 3), random_term(1, 14, 11, 3)
    repeated = Term(full.B[:, [0, 0, 1]], full.A[[0, 0, 1]])
    terms, coefficients = [full, repeated, full, twin], [1.0, -2.0, 0.5, 0.25]
    svd = Span(terms).svd(coefficients)
    assert relative_error(svd.dense(), dense_sum(terms, coefficients)) < 1e-10
    assert bool(torch.isfinite(svd.U).all() & torch.isfinite(svd.V).all())
    assert float(svd.S[6]) < 1e-12 * float(svd.S[0])


def test_terms_that_cancel_leave_nothing() -> None:
    term = random_term(0, 14, 11, 4)
    span = Span([term, term])
    assert span.norm([1.0, -1.0]) < 1e-12 * span.norm([1.0, 0.0])


def test_zero_terms_are_harmless() -> None:
    zero = Term(torch.zeros(14, 4), torch.zeros(4, 11))
    fresh = Term(torch.zeros(14, 4), torch.randn(4, 11, generator=stream(3)))
    live = random_term(0, 14, 11, 2)
    alone = Span([zero, fresh]).svd([1.0, 1.0])
    assert torch.equal(alone.S, torch.zeros_like(alone.S))
    assert bool(torch.isfinite(alone.U).all() & torch.isfinite(alone.V).all())
    beside = Span([zero, live, fresh]).svd([1.0, -0.5, 3.0])
    assert relative_error(beside.dense(), -0.5 * live.B @ live.A) < 1e-12


def test_a_coefficient_may_weigh_every_direction_apart() -> None:
    terms = [random_term(k, 14, 11, rank) for k, rank in enumerate([4, 2])]
    weights = torch.tensor([1.0, 0.5, 0.0, -2.0], dtype=torch.float64)
    svd = Span(terms).svd([weights, 0.7])
    exact = terms[0].B @ torch.diag(weights) @ terms[0].A + 0.7 * terms[1].B @ terms[1].A
    assert relative_error(svd.dense(), exact) < 1e-12
    assert Span(terms).norm([weights, 0.7]) == pytest.approx(float(exact.norm()), rel=1e-12)


def test_one_span_serves_many_coefficient_vectors() -> None:
    terms = [random_term(k, 14, 11, 3) for k in range(3)]
    span = Span(terms)
    for coefficients in ([1.0, 0.0, 0.0], [0.2, -0.3, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]):
        exact = dense_sum(terms, coefficients)
        assert relative_error(span.svd(coefficients).dense(), exact) < 1e-12


def test_a_coefficient_too_few_or_too_many_is_refused() -> None:
    span = Span([random_term(0, 5, 4, 2), random_term(1, 5, 4, 2)])
    for coefficients in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            span.svd(coefficients)


def test_a_span_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Span([])


def test_signs_are_fixed_by_the_largest_entry_of_each_left_vector() -> None:
    svd = Span([random_term(k, 14, 11, 3) for k in range(3)]).svd([1.0, -0.4, 2.0])
    largest = svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


def test_the_same_matrix_in_other_factors_gives_the_same_svd() -> None:
    terms = [random_term(k, 14, 11, 3) for k in range(3)]
    plain = Span(terms).svd([1.0, -0.4, 2.0])
    other = Span([Term(-2 * t.B, t.A) for t in reversed(terms)]).svd([-1.0, 0.2, -0.5])
    torch.testing.assert_close(other.U, plain.U, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.V, plain.V, rtol=0, atol=1e-10)


def test_gauge_changes_nothing() -> None:
    terms = [random_term(k, 14, 11, rank) for k, rank in enumerate([4, 8, 2])]
    turned = []
    for seed, term in enumerate(terms):
        Q = torch.randn(term.rank, term.rank, generator=stream(50 + seed), dtype=torch.float64)
        turned.append(Term(term.B @ Q, torch.linalg.solve(Q, term.A)))
    coefficients = [0.5, 1.5, -0.75]
    plain, other = Span(terms).svd(coefficients), Span(turned).svd(coefficients)
    assert relative_error(other.truncated(5).dense(), plain.truncated(5).dense()) < 1e-10
    assert Span(turned).norm(coefficients) == pytest.approx(Span(terms).norm(coefficients))


@pytest.mark.parametrize(("ranks", "coefficients"), MIXED)
def test_norm_equals_the_dense_frobenius_norm(ranks: list[int], coefficients: list[float]) -> None:
    terms = [random_term(k, 14, 11, rank) for k, rank in enumerate(ranks)]
    exact = float(dense_sum(terms, coefficients).norm())
    assert Span(terms).norm(coefficients) == pytest.approx(exact, rel=1e-10)


def test_kept_energy_is_what_eckart_young_says_of_the_dense_error() -> None:
    terms = [random_term(k, 14, 11, 3) for k in range(3)]
    svd = Span(terms).svd([1.0, -0.4, 2.0])
    exact = dense_sum(terms, [1.0, -0.4, 2.0])
    for rank in range(1, 10):
        lost = (exact - svd.truncated(rank).dense()).square().sum() / exact.square().sum()
        assert kept_energy([svd], rank) == pytest.approx(1 - float(lost), abs=1e-12)
    assert kept_energy([svd], 9) == pytest.approx(1.0, abs=1e-12)


def test_kept_energy_of_nothing_is_all_of_it() -> None:
    zero = Term(torch.zeros(6, 2), torch.zeros(2, 5))
    assert kept_energy([Span([zero]).svd([1.0])], 1) == 1.0


@pytest.mark.parametrize("scale", [1.0, 0.25, 16 / 3])
def test_balanced_factors_share_the_singular_values_evenly(scale: float) -> None:
    svd = Span([random_term(k, 14, 11, 3) for k in range(2)]).svd([1.0, -0.4]).truncated(5)
    term = balanced_factors(svd, scale)
    assert relative_error(scale * term.B @ term.A, svd.dense()) < 1e-12
    gram = torch.diag(svd.S / scale)
    torch.testing.assert_close(term.B.T @ term.B, gram, rtol=0, atol=1e-11)
    torch.testing.assert_close(term.A @ term.A.T, gram, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 0.25, 16 / 3])
def test_orthonormal_factors_leave_a_with_unit_rows_and_values_in_b(scale: float) -> None:
    svd = Span([random_term(k, 14, 11, 3) for k in range(2)]).svd([1.0, -0.4]).truncated(5)
    term = orthonormal_factors(svd, scale)
    assert relative_error(scale * term.B @ term.A, svd.dense()) < 1e-12
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(term.A @ term.A.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(term.B.norm(dim=0), svd.S / scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("split", [balanced_factors, orthonormal_factors])
def test_a_prefix_of_the_factors_is_the_best_adapter_of_that_rank(split: object) -> None:
    terms = [random_term(k, 14, 11, 3) for k in range(3)]
    exact = dense_sum(terms, [1.0, -0.4, 2.0])
    term = split(Span(terms).svd([1.0, -0.4, 2.0]), 0.5)  # type: ignore[operator]
    for rank in (1, 2, 4, 8):
        prefix = 0.5 * term.B[:, :rank] @ term.A[:rank]
        assert relative_error(prefix, dense_truncation(exact, rank)) < 1e-10


def test_a_dense_matrix_is_a_term_like_any_other() -> None:
    matrix = torch.randn(14, 11, generator=stream(4), dtype=torch.float64)
    low = random_term(0, 14, 11, 2)
    term = Term.dense(matrix)
    assert torch.equal(term.B @ term.A, matrix)
    svd = Span([term, low]).svd([0.5, -1.0])
    assert relative_error(svd.dense(), 0.5 * matrix - low.B @ low.A) < 1e-12


def test_truncation_keeps_at_most_what_there_is() -> None:
    svd = Span([random_term(0, 6, 5, 2)]).svd([1.0])
    assert isinstance(svd.truncated(10), SVD)
    assert len(svd.truncated(10).S) == len(svd.S)


def test_factors_are_recognised_by_name_alone() -> None:
    """Square layers, or as many outputs as ranks, must not confuse A with B."""
    square = {
        "enc.0.q.lora_A.weight": torch.full((4, 4), 1.0),
        "enc.0.q.lora_B.weight": torch.full((4, 4), 2.0),
        "head.toy.weight": torch.zeros(4, 4),
    }
    assert adapted_modules(square) == ["enc.0.q"]
    term = Term.of(square, "enc.0.q")
    assert term.B[0, 0] == 2.0
    assert term.A[0, 0] == 1.0
    assert factor_names("enc.0.q") == ("enc.0.q.lora_B.weight", "enc.0.q.lora_A.weight")
    assert [is_factor(name) for name in square] == [True, True, False]


@pytest.mark.parametrize("terms", [3, 20])
def test_the_best_of_a_rank_is_the_truncated_svd_by_either_way(terms: int) -> None:
    draw = torch.Generator().manual_seed(1)
    span = Span(
        [
            Term(torch.randn(30, 2, generator=draw), torch.randn(2, 40, generator=draw))
            for _ in range(terms)
        ]
    )
    coefficients = torch.rand(terms, generator=draw).tolist()
    whole = span.svd(coefficients)
    best, energy = span.best(coefficients, 3)
    torch.testing.assert_close(best.S, whole.S[:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(best.dense(), whole.truncated(3).dense(), rtol=0, atol=1e-10)
    assert energy == pytest.approx(float(whole.S.square().sum()), rel=1e-12)
    assert best.U.shape == (30, 3)
    assert best.V.shape == (40, 3)


def test_inner_products_of_mixtures_are_those_of_full_matrices() -> None:
    draw = torch.Generator().manual_seed(2)
    terms = [
        Term(torch.randn(9, r, generator=draw), torch.randn(r, 7, generator=draw)) for r in (2, 3)
    ]
    mixing = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    B = torch.cat([t.B for t in terms], dim=1).double()
    A = torch.cat([t.A for t in terms]).double()
    flat = torch.stack([((B * c) @ A).flatten() for c in mixing.T])
    torch.testing.assert_close(Span(terms).gram(mixing), flat @ flat.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 6])
def test_where_a_driver_does_not_converge_another_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Rank 2 of 12 directions goes by leading eigenvectors, rank 6 by the SVD of the core."""
    span = Span([random_term(k, 14, 12, 6) for k in range(2)])
    whole, (best, energy) = span.svd([1.0, -0.4]), span.best([1.0, -0.4], rank)

    def fails(error: type[Exception]) -> Callable[..., None]:
        def driver(*_: object, **__: object) -> None:
            raise error("it did not converge")

        return driver

    monkeypatch.setattr(torch.linalg, "svd", fails(torch.linalg.LinAlgError))
    monkeypatch.setattr(scipy.linalg, "eigh", fails(scipy.linalg.LinAlgError))
    torch.testing.assert_close(span.svd([1.0, -0.4]).dense(), whole.dense(), rtol=0, atol=1e-11)
    again, same = span.best([1.0, -0.4], rank)
    torch.testing.assert_close(again.S, best.S, rtol=1e-9, atol=0)
    torch.testing.assert_close(again.dense(), best.dense(), rtol=0, atol=1e-8)
    assert same == energy


def test_bfloat16_factors_are_added_in_float64() -> None:
    terms = [random_term(k, 12, 10, 4) for k in range(3)]
    halves = [Term(t.B.bfloat16(), t.A.bfloat16()) for t in terms]
    coefficients = [0.3, -0.5, 1.2]
    svd = Span(halves).svd(coefficients)
    assert relative_error(svd.dense(), dense_sum(halves, coefficients)) < 1e-12


# --- sums in bounded memory -----------------------------------------------------------------------


def decaying(seed: int, m: int, n: int, rank: int) -> Term:
    """A term whose directions grow smaller, and whose first ones all terms share."""
    common, own = stream(99), stream(seed)
    shared_B = torch.randn(m, rank, generator=common, dtype=torch.float64)
    shared_A = torch.randn(rank, n, generator=common, dtype=torch.float64)
    B = shared_B + 0.3 * torch.randn(m, rank, generator=own, dtype=torch.float64)
    A = shared_A + 0.3 * torch.randn(rank, n, generator=own, dtype=torch.float64)
    return Term(B * 0.6 ** torch.arange(rank), A)


@pytest.mark.parametrize("limit", [4, 8, 16])
def test_a_bounded_sum_is_as_near_as_it_says_and_holds_no_more_than_it_may(limit: int) -> None:
    terms = [decaying(k, 40, 30, 4) for k in range(12)]
    exact = dense_sum(terms, [1 / 12] * 12)
    running, held = RunningSum(limit), []
    for term in terms:
        running.add(1 / 12, term)
        held.append(sum(t.rank for _, t in running._terms))
    error = float((running.svd().dense() - exact).norm())
    tail = float(torch.linalg.svdvals(exact)[limit:].norm())
    assert tail * (1 - 1e-5) <= error <= running.dropped
    assert max(held[1:]) <= limit
    # Of what is served, rank 4, next to nothing is lost with a buffer of twice the rank.
    if limit >= 8:
        best = dense_truncation(exact, 4)
        found = running.svd().truncated(4).dense()
        assert float((found - exact).norm()) < 1.05 * float((best - exact).norm())


def test_a_sum_without_a_limit_is_exact() -> None:
    terms = [decaying(k, 40, 30, 4) for k in range(12)]
    running = RunningSum()
    for term in terms:
        running.add(1 / 12, term)
    assert running.dropped == 0
    assert relative_error(running.svd().dense(), dense_sum(terms, [1 / 12] * 12)) < 1e-12
    assert relative_error(running.svd(3.0).dense(), dense_sum(terms, [0.25] * 12)) < 1e-12
