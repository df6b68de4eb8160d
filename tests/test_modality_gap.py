"""Discrepancies of known points, by hand and in closed form; batches against the dense formula."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from common.errors import ConfigError
from common.modality_gap import gaussian, median_distance, mmd, modality_gaps, multi_kernel


def points(*rows: float | tuple[float, ...]) -> Tensor:
    return torch.tensor([row if isinstance(row, tuple) else (row,) for row in rows]).double()


def published(X: np.ndarray, Y: np.ndarray) -> float:
    """The published statistic, written out densely with another library's distances."""
    Z = np.concatenate([X, Y])
    N, n = len(Z), len(X)
    D = cdist(Z, Z, "sqeuclidean")
    s = D.sum() / (N**2 - N)
    K = sum(np.exp(-D / (s * 2.0 ** (u - 2))) for u in range(5))
    return float(K[:n, :n].mean() + K[n:, n:].mean() - 2 * K[:n, n:].mean())


def test_two_points_at_distance_one() -> None:
    expected = 2 - 2 * math.exp(-0.5)
    assert mmd(points(0.0), points(1.0), gaussian(1.0, "biased")) == pytest.approx(
        expected, abs=1e-12
    )
    assert expected == pytest.approx(0.7869386806)


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-6])
def test_published_of_two_points_whatever_their_distance(scale: float) -> None:
    expected = 10 - 2 * sum(math.exp(-4 / 2**u) for u in range(5))
    found = mmd(scale * points((0.3, 1.0)), scale * points((2.0, -1.0)))
    assert found == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(6.1862763878, abs=1e-9)


@pytest.mark.parametrize(
    ("X", "Y", "expected"),
    [
        (
            points((0.0, 0.0), (1.0, 0.0)),
            points((0.0, 1.0), (1.0, 1.0)),
            {"biased": 0.6321205588, "unbiased": 0.2386512185, "paired": 0.4773024371,
             "published": 3.5649481878},
        ),
        (
            points(0.0, 2.0),
            points(1.0, 3.0),
            {"biased": 0.2199847954, "unbiased": -0.6446799214, "published": 1.2007888846},
        ),
    ],
    ids=["square", "line"],
)  # fmt: skip
def test_four_points(X: Tensor, Y: Tensor, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        statistic = multi_kernel if name == "published" else gaussian(1.0, name)
        assert mmd(X, Y, statistic) == pytest.approx(value, abs=1e-9), name


def test_the_same_points() -> None:
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    for statistic in (multi_kernel, gaussian(1.0, "biased"), gaussian(1.0, "paired")):
        assert mmd(X, X, statistic) == pytest.approx(0, abs=1e-12)
    # The unbiased one is not 0: it is so in the mean over independent samples.
    assert mmd(points(0.0, 1.0), points(0.0, 1.0), gaussian(1.0)) == pytest.approx(
        math.exp(-0.5) - 1, abs=1e-12
    )
    assert -2 / 20 <= mmd(X, X, gaussian(1.0)) <= 0


def test_estimators_in_the_mean() -> None:
    stream = torch.Generator().manual_seed(3)

    def draws(shift: float, estimator: str, count: int) -> Tensor:
        statistic = gaussian(1.0, estimator)
        pairs = torch.randn(count, 2, 200, 1, generator=stream).double()
        return torch.tensor([mmd(X, Y + shift, statistic) for X, Y in pairs])

    same = draws(0.0, "unbiased", 200)
    assert abs(float(same.mean())) < 0.001
    assert float(same.std()) == pytest.approx(0.0037, abs=0.001)
    biased = draws(0.0, "biased", 200)
    assert float(biased.mean()) == pytest.approx(2 / 200 * (1 - 3**-0.5), abs=0.0008)
    apart = draws(1.0, "unbiased", 50)
    assert float(apart.mean()) == pytest.approx(2 / 3**0.5 * (1 - math.exp(-1 / 6)), abs=0.02)


def test_point_masses_symmetry_and_order() -> None:
    assert mmd(torch.zeros(100, 1), torch.ones(100, 1)) == pytest.approx(7.7329949084, abs=1e-9)
    stream = torch.Generator().manual_seed(1)
    X, Y = torch.randn(30, 4, generator=stream), 2 * torch.randn(20, 4, generator=stream) + 1
    for statistic in (multi_kernel, gaussian(2.0), gaussian(2.0, "biased")):
        there, back = mmd(X, Y, statistic), mmd(Y, X, statistic)
        assert there == pytest.approx(back, abs=1e-12)
        turned = mmd(X[torch.randperm(30, generator=stream)], Y.flip(0), statistic)
        assert turned == pytest.approx(there, abs=1e-12)


def test_points_that_are_all_one() -> None:
    one = torch.full((5, 3), 0.1)
    assert mmd(one, one) == 0
    gaps = modality_gaps({"p": one}, one.repeat(4, 1), torch.Generator(), batch=5)
    assert gaps["p"].value == 0
    assert gaps["p"].standard_error == 0


def test_batches_are_the_published_statistic_of_each() -> None:
    stream = torch.Generator().manual_seed(2)
    prompts = {
        "near": 0.5 + torch.randn(10, 6, generator=stream),
        "far": 40 * torch.randn(7, 6, generator=stream),
    }
    patches = 0.5 + torch.randn(47, 6, generator=stream)
    found = modality_gaps(
        prompts, patches, torch.Generator().manual_seed(9), batch=10, batches=None, passes=5
    )
    order = torch.Generator().manual_seed(9)
    cut = [
        patches[rows]
        for _ in range(5)
        for rows in torch.randperm(47, generator=order)[:40].view(4, 10)
    ]
    for name, prompt in prompts.items():
        values = [published(prompt.double().numpy(), part.double().numpy()) for part in cut]
        assert found[name].batches == 20
        assert found[name].value == pytest.approx(np.mean(values), abs=1e-5)
        error = np.std(values, ddof=1) / 20**0.5
        assert found[name].standard_error == pytest.approx(error, rel=1e-3)
    fewer = modality_gaps(prompts, patches, torch.Generator().manual_seed(9), batch=10, batches=3)
    first = [published(prompts["near"].numpy(), part.numpy()) for part in cut[:3]]
    assert fewer["near"].value == pytest.approx(np.mean(first), abs=1e-5)
    alone = modality_gaps(
        {"far": prompts["far"]}, patches, torch.Generator().manual_seed(9), batch=10, batches=3
    )
    assert alone["far"].value == pytest.approx(fewer["far"].value, abs=1e-6)


def test_batches_of_a_fixed_kernel_and_a_large_common_offset() -> None:
    stream = torch.Generator().manual_seed(4)
    prompt, patches = torch.randn(2, 30, 5, generator=stream)
    sigma = median_distance(torch.cat([prompt, patches]), stream)
    statistic = gaussian(sigma)
    expected = mmd(prompt, patches, statistic)
    found = modality_gaps({"p": prompt}, patches, stream, statistic=statistic, batch=30)
    assert found["p"].value == pytest.approx(expected, abs=1e-5)
    # In float32 an offset of 1024 would take all but three digits of squared distances.
    moved = modality_gaps(
        {"p": prompt + 1024}, patches + 1024, stream, statistic=statistic, batch=30
    )
    assert moved["p"].value == pytest.approx(expected, abs=1e-3)


def test_median_distance_is_of_different_points() -> None:
    # Distances 1, 2, 3, 1, 2, 1.
    reference = points(0.0, 1.0, 2.0, 3.0)
    assert median_distance(reference, torch.Generator()) == 1.0
    many = torch.randn(3000, 2, generator=torch.Generator().manual_seed(5))
    some = median_distance(many, torch.Generator().manual_seed(6), most=500)
    assert some == pytest.approx(float(torch.pdist(many).median()), rel=0.05)
    with pytest.raises(ConfigError, match="are one"):
        median_distance(torch.ones(5, 2), torch.Generator())


def test_independent_starts_are_at_the_floor_of_the_biased_estimator() -> None:
    stream = torch.Generator().manual_seed(7)
    first, second = (2 * torch.rand(2, 100, 768, generator=stream) - 1) * 0.0625
    assert mmd(first, second) == pytest.approx(0.06, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": {}}, "no prompt"),
        ({"prompts": {"p": torch.ones(3, 4)}}, r"'p' of shape \(3, 4\).*width 2"),
        ({"prompts": {"p": torch.full((3, 2), math.nan)}}, "'p' holds NaN"),
        ({"batch": 9}, "9 of them at least"),
        ({"batches": 0}, "batches = 0"),
    ],
)
def test_what_has_no_gap_is_refused(settings: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"prompts": {"p": torch.ones(3, 2)}, "batch": 4}
    with pytest.raises(ConfigError, match=words):
        modality_gaps(patches=torch.ones(8, 2), generator=torch.Generator(), **given | settings)
    with pytest.raises(ConfigError, match="sigma = 0"):
        gaussian(0.0)
    with pytest.raises(ConfigError, match="biased, unbiased, paired"):
        gaussian(1.0, "median")
    with pytest.raises(ConfigError, match="as many patches"):
        mmd(torch.ones(2, 1), torch.ones(3, 1), gaussian(1.0, "paired"))
