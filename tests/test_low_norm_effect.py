"""The Low-Norm Effect: corruptions, what they do to norms, counts and paired tests."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.low_norm import (
    Cell,
    Corruption,
    Effect,
    RiseCount,
    agreed,
    corrupt,
    mcnemar_test,
    norm_effect,
    rise_counts,
    sign_test,
)
from common.nemesis import vector_norms

ROWS = [[3.0, 4.0, 0.0], [0.0, -5.0, 12.0]]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed), dtype=torch.float64)


def close(found: Tensor, expected: object, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    wanted = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


# Corruptions.


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("kind", ["replace", "rescale", "rotate"])
@pytest.mark.parametrize("positions", [(2,), (4, 0)])
def test_only_the_named_positions_change(
    shape: tuple[int, ...], kind: str, positions: tuple[int, ...]
) -> None:
    P = random_prompt(*shape).float().requires_grad_()
    before = P.detach().clone()
    state = torch.get_rng_state()
    found = corrupt(P, Corruption(kind, 0.5, positions), stream())
    others = [i for i in range(5) if i not in positions]
    assert torch.equal(found[..., others, :], before[..., others, :])
    assert (found[..., list(positions), :] != before[..., list(positions), :]).any(-1).all()
    assert torch.equal(P, before)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, corrupt(P, Corruption(kind, 0.5, positions), stream()))


def test_replacement_by_nothing_is_the_zero_vector() -> None:
    found = corrupt(torch.tensor(ROWS), Corruption("replace", 0.0, (1,)), stream())
    assert found.tolist() == [ROWS[0], [0.0, 0.0, 0.0]]


def test_replacement_is_drawn_anew_for_each_vector_with_the_standard_deviation_given() -> None:
    found = corrupt(torch.ones(3, 8, 512), Corruption("replace", 0.05, (6, 1)), stream())
    drawn = found[:, [1, 6]]
    assert drawn.std().item() == pytest.approx(0.05, rel=0.03)  # 0.05 is no variance
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.005)
    assert len(drawn.flatten(0, 1).unique(dim=0)) == 6


def test_rescaling_multiplies() -> None:
    P = torch.tensor(ROWS)
    close(corrupt(P, Corruption("rescale", 0.1, (0,)), stream())[0], [0.3, 0.4, 0.0])
    assert torch.equal(corrupt(P, Corruption("rescale", 0.5, (0, 1)), stream()), 0.5 * P)


@pytest.mark.parametrize("degrees", [0.0, 60.0, 90.0, 180.0])
def test_rotation_keeps_the_norm_and_turns_by_the_angle(degrees: float) -> None:
    P = random_prompt(2, 5, 64).float()
    found = corrupt(P, Corruption("rotate", degrees, (1, 3)), stream())
    close(vector_norms(found), vector_norms(P), rtol=1e-6)
    cosine = functional.cosine_similarity(found, P, dim=-1)[:, [1, 3]]
    close(cosine, torch.full((2, 2), math.cos(math.radians(degrees))), atol=1e-6)
    moved = vector_norms(found - P)[:, [1, 3]]
    way = 2 * math.sin(math.radians(degrees) / 2) * vector_norms(P)[:, [1, 3]]
    close(moved, way, rtol=1e-5, atol=1e-5)


def test_rotation_goes_anywhere_across_the_vector() -> None:
    P = torch.tensor([[3.0, 0.0, 0.0]]).repeat(2000, 1)
    found = corrupt(P, Corruption("rotate", 90.0, tuple(range(2000))), stream())
    angles = torch.atan2(found[:, 2], found[:, 1]) / (2 * math.pi) + 0.5
    assert stats.kstest(angles.numpy(), "uniform").pvalue > 0.01


def test_a_zero_vector_stays_zero_however_it_is_turned() -> None:
    found = corrupt(torch.zeros(1, 3), Corruption("rotate", 60.0, (0,)), stream())
    assert torch.equal(found, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("kind", "amount", "positions", "effect"),
    [
        ("rescale", 0.5, (0,), "lowers"),
        ("rescale", -0.5, (0,), "lowers"),
        ("rescale", 1.0, (0,), "keeps"),
        ("rescale", -1.0, (0,), "keeps"),
        ("rescale", 2.0, (0,), "raises"),
        ("rescale", 0.5, (2,), "keeps"),  # a zero vector is no shorter than zero
        ("rescale", 0.5, (0, 1), "lowers"),
        ("rescale", 0.5, (0, 2), "mixed"),
        ("rotate", 60.0, (0,), "keeps"),
        ("replace", 0.0, (0,), "lowers"),
        ("replace", 0.0, (2,), "keeps"),
        ("replace", 0.01, (0, 1), "lowers"),
        ("replace", 0.01, (2,), "raises"),
        ("replace", 100.0, (0, 1), "raises"),
    ],
)
def test_effect_on_norms_is_that_of_the_norms_obtained(
    kind: str, amount: float, positions: tuple[int, ...], effect: Effect
) -> None:
    P = torch.tensor([*ROWS, [0.0, 0.0, 0.0]])
    corruption = Corruption(kind, amount, positions)
    assert norm_effect(P, corrupt(P, corruption, stream()), corruption) == effect


def test_prompts_that_do_not_agree_on_a_position_are_mixed() -> None:
    P = torch.stack([torch.full((2, 16), 0.1), torch.full((2, 16), 10.0)])
    corruption = Corruption("replace", 1.0, (1,))
    assert norm_effect(P, corrupt(P, corruption, stream()), corruption) == "mixed"


@pytest.mark.parametrize(
    ("kind", "amount", "positions", "message"),
    [
        ("scale", 0.5, (0,), "corruption 'scale' is not known; choose one of replace, rescale"),
        ("replace", -0.1, (0,), r"replace -0\.1: .* >= 0"),
        ("rescale", math.nan, (0,), "rescale nan"),
        ("rotate", math.inf, (0,), "rotate inf"),
        ("rescale", 0.5, (), r"positions \(\)"),
        ("rescale", 0.5, (1, 1), r"positions \(1, 1\)"),
    ],
)
def test_corruptions_that_cannot_be_meant(
    kind: str, amount: float, positions: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Corruption(kind, amount, positions)


@pytest.mark.parametrize("position", [-1, 2])
def test_a_position_outside_the_prompt_is_refused(position: int) -> None:
    with pytest.raises(ConfigError, match=rf"position {position} is not among .* 0\.\.1"):
        corrupt(torch.ones(4, 2, 3), Corruption("rescale", 0.5, (position,)), stream())


# Counts and paired tests.


def cell(
    operation: tuple[str, float],
    original: tuple[int, ...],
    hits: tuple[int, ...],
    effects: tuple[Effect, ...] = ("lowers", "lowers"),
    rows: tuple[int, ...] = (10, 10),
) -> Cell:
    return Cell(Corruption(*operation, (0,)), effects, original, hits, rows)


HALF, NOTHING, DOUBLE = ("rescale", 0.5), ("replace", 0.0), ("rescale", 2.0)


def test_cells_are_counted_with_their_denominator() -> None:
    cells = [
        cell(HALF, (5, 5), (6, 5)),
        cell(HALF, (5, 5), (6, 4)),  # the mean ties
        cell(HALF, (5, 5), (4, 5)),
        cell(NOTHING, (5, 5), (9, 2)),  # one seed falls, the mean rises
        cell(NOTHING, (5, 5), (9, 9), ("lowers", "keeps")),
        cell(DOUBLE, (5, 5), (9, 9), ("raises", "raises")),
        cell(DOUBLE, (5, 5), (1, 1), ("raises", "raises")),
    ]
    assert rise_counts(cells) == {
        "all": RiseCount(2, 4),
        "rescale 0.5": RiseCount(1, 3),
        "replace 0": RiseCount(1, 1),
    }
    assert rise_counts(cells, "raises") == {
        "all": RiseCount(1, 2),
        "rescale 2": RiseCount(1, 2),
    }
    assert rise_counts(cells, "mixed")["all"] == RiseCount(1, 1)
    assert rise_counts(cells, "keeps") == {"all": RiseCount(0, 0)}


def test_effects_agree_or_are_mixed() -> None:
    assert agreed(["lowers", "lowers"]) == "lowers"
    assert agreed(["raises"]) == "raises"
    assert agreed(["lowers", "lowers", "keeps"]) == "mixed"


def test_accuracy_is_averaged_not_hits_and_without_rounding() -> None:
    # 1/100 up and 1/10 down, though as many rows rise as fall, and 1/10 up and 1/100 down.
    assert not cell(HALF, (5, 5), (6, 4), rows=(100, 10)).rises
    assert cell(HALF, (5, 5), (6, 4), rows=(10, 100)).rises
    # In floats 0.1 + 0.2 > 0.15 + 0.15.
    assert not cell(HALF, (15, 15), (10, 20), rows=(100, 100)).rises


def test_cells_need_all_seeds() -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = cell(HALF, (5, 5), (6,)).rises


@pytest.mark.parametrize(
    ("differences", "rises", "falls", "p_value"),
    [
        ([1, 2, 3], 3, 0, 0.25),
        ([1, 2, 0, 3, 0], 3, 0, 0.25),
        ([1, -1], 1, 1, 1.0),
        ([1] * 9 + [-1], 9, 1, 22 / 1024),
        ([0, 0], 0, 0, 1.0),
        ([], 0, 0, 1.0),
    ],
)
def test_sign_test(differences: list[int], rises: int, falls: int, p_value: float) -> None:
    found = sign_test(differences)
    assert (found.rises, found.falls) == (rises, falls)
    assert found.p_value == pytest.approx(p_value, rel=1e-12)


def test_sign_test_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        sign_test([1.0, math.nan])


def test_exact_tests_agree_with_scipy() -> None:
    small = list(itertools.product(range(9), repeat=2))
    for rises, falls in [*small[1:], (4900, 5100), (30_000, 29_000)]:
        original = torch.tensor([False] * rises + [True] * (falls + 7))
        corrupted = torch.tensor([True] * rises + [False] * falls + [True] * 7)
        found = mcnemar_test(original, corrupted)
        assert (found.rises, found.falls) == (rises, falls)
        expected = stats.binomtest(rises, rises + falls).pvalue
        assert found.p_value == pytest.approx(expected, rel=1e-9)


def test_only_hits_of_the_same_rows_are_paired() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        mcnemar_test(torch.ones(3).bool(), torch.ones(2).bool())
    with pytest.raises(ValueError, match="hits are bool"):
        mcnemar_test(torch.ones(3), torch.ones(3).bool())
