"""Paths and planes through adapters: held to dense sums, hand-worked curves and plain geometry."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from common.lowrank import factor_names
from common.paths import DeltaMixture, End, FactorMixture, Plane, barrier, standard_error
from common.residuals import residual_name

# The first holds 6 directions at most, the second 10: one mixture has a rank for both.
SIZES = {"enc.0.query": (12, 6), "enc.0.value": (10, 14)}


def end(
    seed: int,
    rank: int = 3,
    scale: float = 1.5,
    heads: Sequence[str] = ("head.a.weight",),
    residual: bool = False,
) -> End:
    """A random adapter, float64."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    tensors = {name: draw(4, 5) for name in heads}
    for module, (rows, columns) in SIZES.items():
        name_B, name_A = factor_names(module)
        tensors |= {name_B: draw(rows, rank), name_A: draw(rank, columns)}
        if residual:
            tensors[residual_name(module)] = draw(rows, columns)
    return End(tensors, rank, scale)


def dense(adapter: End, module: str) -> Tensor:
    name_B, name_A = factor_names(module)
    return adapter.scale * adapter.tensors[name_B].double() @ adapter.tensors[name_A].double()


def scale_of(rank: int) -> float:
    return 7.0 / rank


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_two_paths_differ_by_the_product_of_differences(share: float) -> None:
    """Specification 3.2: ΔW_f = ΔW_m - s·λ(1-λ)·(B2-B1)(A2-A1)."""
    first, second = end(0), end(1)
    c = (1 - share, share)
    deltas = DeltaMixture((first, second), scale_of)
    mixed = End(FactorMixture((first, second)).at(c), 3, 1.5)
    for module in SIZES:
        name_B, name_A = factor_names(module)
        gap_B = second.tensors[name_B] - first.tensors[name_B]
        gap_A = second.tensors[name_A] - first.tensors[name_A]
        cross = 1.5 * share * (1 - share) * gap_B @ gap_A
        expected = deltas.delta(module, c).dense() - cross
        torch.testing.assert_close(dense(mixed, module), expected, rtol=0, atol=1e-12)
        if 0 < share < 1:
            assert cross.abs().max() > 0.1  # else the identity would say nothing


@pytest.mark.parametrize("coefficients", [(1.0, 0.0, 0.0), (0.5, 0.3, 0.2), (1.4, -0.9, 0.5)])
def test_a_delta_mixture_is_the_dense_sum_whatever_ranks_and_scales(
    coefficients: tuple[float, float, float],
) -> None:
    ends = [end(0, rank=2, scale=3.0), end(1, rank=3), end(2, rank=4, scale=0.5)]
    mixture = DeltaMixture(ends, scale_of)
    # 2 + 3 + 4 directions; the narrow module has 6, and is filled up.
    assert mixture.rank == 9
    found = End(mixture.at(coefficients), mixture.rank, scale_of(mixture.rank))
    for module in SIZES:
        expected = sum(c * dense(e, module) for c, e in zip(coefficients, ends, strict=True))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(
            mixture.delta(module, coefficients).dense(), expected, rtol=0, atol=1e-12
        )
        name_B, name_A = factor_names(module)
        assert found.tensors[name_B].shape == (SIZES[module][0], 9)
        assert found.tensors[name_A].dtype == torch.float32
        torch.testing.assert_close(dense(found, module), expected, rtol=0, atol=2e-5)


def test_no_mixture_has_more_directions_than_its_largest_module() -> None:
    mixture = DeltaMixture([end(n, rank=4) for n in range(3)], scale_of)
    assert mixture.rank == 10


def test_a_change_of_basis_moves_the_factor_path_and_not_the_delta_path() -> None:
    first, second = end(0), end(1)
    turned = dict(second.tensors)
    stream = torch.Generator().manual_seed(9)
    for module in SIZES:
        name_B, name_A = factor_names(module)
        Q = torch.randn(3, 3, generator=stream, dtype=torch.float64)
        turned[name_B] = turned[name_B] @ Q
        turned[name_A] = torch.linalg.solve(Q, turned[name_A])
    other = End(turned, 3, 1.5)
    module = next(iter(SIZES))
    same, moved = (DeltaMixture((first, e), scale_of) for e in (second, other))
    torch.testing.assert_close(
        moved.delta(module, (0.4, 0.6)).dense(),
        same.delta(module, (0.4, 0.6)).dense(),
        rtol=0,
        atol=1e-10,
    )
    straight, bent = (
        dense(End(FactorMixture((first, e)).at((0.4, 0.6)), 3, 1.5), module)
        for e in (second, other)
    )
    assert (straight - bent).abs().max() > 0.1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (end(1, rank=4), "rank 3 at scale 1.5 and of rank 4 at scale 1.5"),
        (end(1, scale=3.0), "scale 1.5 and of rank 3 at scale 3 "),
    ],
)
def test_factors_of_unlike_rank_or_scale_are_not_mixed(other: End, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FactorMixture((end(0), other))
    with pytest.raises(ConfigError, match=says):
        FactorMixture((other, end(0)))


@pytest.mark.parametrize("mix", [FactorMixture, lambda ends: DeltaMixture(ends, scale_of)])
def test_a_module_that_one_end_lacks_is_named(mix: object) -> None:
    cut = {n: t for n, t in end(1).tensors.items() if not n.startswith("enc.0.value")}
    for ends in ((end(0), End(cut, 3, 1.5)), (End(cut, 3, 1.5), end(0))):
        with pytest.raises(ConfigError, match=r"enc\.0\.value"):
            mix(ends)  # type: ignore[operator]


@pytest.mark.parametrize("mix", [FactorMixture, lambda ends: DeltaMixture(ends, scale_of)])
def test_heads_are_mixed_and_a_head_of_one_end_alone_stays(mix: object) -> None:
    first = end(0, heads=("head.a.weight", "head.both.weight"))
    second = end(1, heads=("head.b.weight", "head.both.weight"))
    found = mix((first, second)).at((0.75, 0.25))  # type: ignore[operator]
    assert torch.equal(found["head.a.weight"], first.tensors["head.a.weight"])
    assert torch.equal(found["head.b.weight"], second.tensors["head.b.weight"])
    both = [e.tensors["head.both.weight"] for e in (first, second)]
    torch.testing.assert_close(found["head.both.weight"], 0.75 * both[0] + 0.25 * both[1])


def test_a_head_of_two_in_three_is_mixed_over_these() -> None:
    ends = [end(0), end(1, heads=("head.b.weight",)), end(2)]
    mixture = DeltaMixture(ends, scale_of)
    held = [ends[n].tensors["head.a.weight"] for n in (0, 2)]
    found = mixture.at((0.2, 0.2, 0.6))["head.a.weight"]
    torch.testing.assert_close(found, 0.25 * held[0] + 0.75 * held[1])
    with pytest.raises(ValueError, match=r"head\.a\.weight"):
        mixture.at((0.5, 1.0, -0.5))


@pytest.mark.parametrize("mix", [FactorMixture, lambda ends: DeltaMixture(ends, scale_of)])
def test_a_residual_that_an_end_lacks_is_zero_there(mix: object) -> None:
    first, second = end(0, residual=True), end(1)
    mixture = mix((first, second))  # type: ignore[operator]
    for module in SIZES:
        name = residual_name(module)
        found = mixture.at((0.75, 0.25))[name]
        torch.testing.assert_close(found, 0.75 * first.tensors[name])
        assert not mixture.at((0.0, 1.0))[name].any()
    third = end(2, residual=True)
    name = residual_name("enc.0.query")
    both = mix((first, third)).at((0.75, 0.25))[name]  # type: ignore[operator]
    torch.testing.assert_close(both, 0.75 * first.tensors[name] + 0.25 * third.tensors[name])


def test_the_ends_of_both_paths_are_the_adapters_themselves() -> None:
    first, second = end(0), end(1)
    for c, adapter in (((1.0, 0.0), first), ((0.0, 1.0), second)):
        by_factors = FactorMixture((first, second)).at(c)
        assert all(torch.equal(by_factors[n], t) for n, t in adapter.tensors.items())
        mixture = DeltaMixture((first, second), scale_of)
        by_deltas = End(mixture.at(c), mixture.rank, scale_of(mixture.rank))
        for module in SIZES:
            torch.testing.assert_close(
                dense(by_deltas, module), dense(adapter, module), rtol=0, atol=1e-5
            )


# --- barriers -------------------------------------------------------------------------------------


def test_a_convex_loss_has_no_barrier() -> None:
    positions = [n / 10 for n in range(11)]
    rows = torch.linspace(-2.0, 3.0, 40, dtype=torch.float64)
    losses = torch.stack([(rows - 4 * t) ** 2 for t in positions])
    found = barrier(positions, losses)
    assert (found.height, found.error, found.at) == (0.0, 0.0, 0.0)


def test_the_barrier_of_a_curve_worked_by_hand() -> None:
    """Two rows; baselines 1, 2, 3 and 0, 1, 2; the middle lies 1 and 3 above them."""
    losses = torch.tensor([[1.0, 0.0], [3.0, 4.0], [3.0, 2.0]])
    found = barrier([0.0, 0.5, 1.0], losses)
    assert found.height == 2.0
    assert found.at == 0.5
    # Differences 1 and 3: sd √2 and two rows. The rows' own spread, 0.5, does not enter.
    assert found.error == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_the_baseline_is_tilted() -> None:
    """Higher than one end and still no bump; a bump lower than one end."""
    assert barrier([0, 0.5, 1], torch.tensor([[0.0], [2.0], [4.0]])).height == 0
    found = barrier([0, 0.25, 0.5, 1], torch.tensor([[0.0], [2.0], [2.5], [4.0]]))
    assert (found.height, found.at) == (1.0, 0.25)


def test_a_constant_shift_of_a_row_changes_neither_barrier_nor_error() -> None:
    stream = torch.Generator().manual_seed(3)
    positions = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = torch.randn(5, 30, generator=stream, dtype=torch.float64)
    losses[2] += 3.0
    shifted = barrier(positions, losses + 100 * torch.arange(30))
    plain = barrier(positions, losses)
    assert plain.height > 2
    assert shifted.height == pytest.approx(plain.height)
    assert shifted.error == pytest.approx(plain.error)


def test_a_path_runs_from_0_to_1() -> None:
    with pytest.raises(ValueError, match=r"0\.25"):
        barrier([0.0, 0.25], torch.zeros(2, 3))


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        math.sqrt((4 + 1 + 0 + 9) / 3 / 4)
    )
    assert standard_error(torch.tensor([True, False])) == pytest.approx(0.5)
    assert standard_error(torch.tensor([5.0])) == 0.0


# --- planes ---------------------------------------------------------------------------------------


def flat(adapter: End) -> Tensor:
    return torch.cat([dense(adapter, module).flatten() for module in SIZES])


def test_distances_on_the_plane_are_those_of_dense_deltas() -> None:
    ends = [end(0), end(1, rank=2, scale=4.0), end(2)]
    plane = Plane(DeltaMixture(ends, scale_of))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = float((flat(ends[i]) - flat(ends[j])).norm())
        assert math.dist(plane.corners[i], plane.corners[j]) == pytest.approx(expected)
    for number, corner in enumerate(plane.corners):
        unit = [0.0, 0.0, 0.0]
        unit[number] = 1.0
        assert plane.coefficients(*corner) == pytest.approx(unit, abs=1e-12)
    outside = plane.coefficients(-3.0, 20.0)
    assert sum(outside) == pytest.approx(1.0)
    assert min(outside) < 0


def test_the_foot_of_a_fourth_adapter_is_its_dense_projection() -> None:
    ends = [end(n) for n in range(4)]
    plane = Plane(DeltaMixture(ends[:3], scale_of))
    x, y, off = plane.foot(DeltaMixture(ends, scale_of))
    origin, *others = (flat(adapter) for adapter in ends)
    basis, _ = torch.linalg.qr(torch.stack([other - origin for other in others[:2]], dim=1))
    along = basis.T @ (others[2] - origin)
    assert math.hypot(x, y) == pytest.approx(float(along.norm()))
    assert off == pytest.approx(float((others[2] - origin - basis @ along).norm()))
    shares = plane.coefficients(x, y)
    foot = sum(c * flat(adapter) for c, adapter in zip(shares, ends, strict=False))
    assert isinstance(foot, Tensor)
    torch.testing.assert_close(foot, origin + basis @ along, rtol=0, atol=1e-9)


def test_an_adapter_of_the_plane_is_its_own_foot() -> None:
    ends = [end(n) for n in range(3)]
    plane = Plane(DeltaMixture(ends, scale_of))
    x, y, off = plane.foot(DeltaMixture([*ends, ends[1]], scale_of))
    assert (x, y) == pytest.approx(plane.corners[1])
    # A difference of squares: half the digits are left.
    assert off == pytest.approx(0.0, abs=1e-5)


def test_three_on_a_line_have_no_plane() -> None:
    first, second = end(0), end(1)
    same = End(dict(first.tensors), 3, 3.0)  # twice the delta of the first
    zero = End({n: torch.zeros_like(t) for n, t in first.tensors.items()}, 3, 1.5)
    for ends in ([first, second, first], [first, first, second], [zero, first, same]):
        with pytest.raises(ConfigError, match="on a line"):
            Plane(DeltaMixture(ends, scale_of))
