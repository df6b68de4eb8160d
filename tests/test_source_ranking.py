"""Scores of sources, and how good a ranking by them is."""

import math

import pytest
from scipy.stats import kendalltau

from common.errors import ConfigError
from common.source_ranking import best_first, combined_scores, prior_scores, ranking_quality

GAPS = {"a": 0.5, "b": 2.0, "c": 1.0}


def test_combined_by_hand() -> None:
    assert combined_scores(GAPS) == {"a": -0.5, "b": -2.0, "c": -1.0}
    likeness = {"a": 0.1, "b": 0.9, "c": 0.0}
    found = combined_scores(GAPS, likeness, gap_weight=2.0, likeness_weight=10.0, form="log")
    assert found == pytest.approx({"a": 1 + 2 * math.log(2), "b": 9 - 2 * math.log(2), "c": 0.0})
    assert combined_scores(GAPS, form="sinh")["c"] == pytest.approx(-math.sinh(1.0))
    assert best_first(combined_scores(GAPS)) == ["a", "c", "b"]
    assert best_first({"y": 1.0, "x": 1.0}) == ["x", "y"]


def test_prior_by_hand() -> None:
    rows = {"a": 1.0, "b": math.e**2, "c": math.e}
    # Gaps have mean 7/6 and variance 7/18; log rows are 0, 2, 1, with mean 1 and variance 2/3.
    expected = {
        name: -(GAPS[name] - 7 / 6) / (7 / 18) ** 0.5 + 0.5 * (log - 1) / (2 / 3) ** 0.5
        for name, log in (("a", 0), ("b", 2), ("c", 1))
    }
    assert prior_scores(GAPS, rows, 0.5) == pytest.approx(expected)
    alike = prior_scores(dict.fromkeys(GAPS, 0.1), dict.fromkeys(GAPS, 7.0))
    assert alike == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_quality_by_hand() -> None:
    names = "wxyz"
    found = ranking_quality(
        dict(zip(names, [1, 2, 3, 4], strict=True)), dict(zip(names, [1, 3, 2, 4], strict=True))
    )
    assert found.kendall == pytest.approx(2 / 3)
    assert found.spearman == pytest.approx(0.8)
    assert found.regret == 0
    backwards = ranking_quality({"a": 1, "b": 2, "c": 3}, {"a": 0.9, "b": 0.5, "c": 0.2})
    assert (backwards.kendall, backwards.spearman) == (-1, pytest.approx(-1))
    assert backwards.regret == pytest.approx(0.7)


def test_ties_count_for_neither_side() -> None:
    scores, outcomes = {"a": 1.0, "b": 1.0, "c": 2.0}, {"a": 0.1, "b": 0.2, "c": 0.3}
    assert ranking_quality(scores, outcomes).kendall == pytest.approx(2 / 3)
    assert kendalltau([1, 1, 2], [0.1, 0.2, 0.3]).statistic > 2 / 3
    flat = ranking_quality(dict.fromkeys(scores, 1.0), outcomes)
    assert (flat.kendall, flat.spearman) == (0.0, None)
    assert flat.regret == pytest.approx(0.2)  # ties are chosen by name


def test_without_ties_it_is_what_scipy_has() -> None:
    scores = {str(i): math.sin(3.0 * i) for i in range(20)}
    outcomes = {str(i): math.cos(5.0 * i) for i in range(20)}
    expected = kendalltau(list(scores.values()), list(outcomes.values())).statistic
    assert ranking_quality(scores, outcomes).kendall == pytest.approx(float(expected))


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cube'.*identity, log, sinh"):
        combined_scores(GAPS, form="cube")
    with pytest.raises(ConfigError, match="gap of d is 0"):
        combined_scores({**GAPS, "d": 0.0}, form="log")
    with pytest.raises(ConfigError, match="c has a gap or a likeness"):
        combined_scores(GAPS, {"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigError, match="b was trained on 0"):
        prior_scores(GAPS, {"a": 1, "b": 0, "c": 1})
    with pytest.raises(ConfigError, match="same two sources"):
        ranking_quality({"a": 1.0}, {"a": 1.0})
    with pytest.raises(ConfigError, match="NaN"):
        ranking_quality({"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 2.0})
