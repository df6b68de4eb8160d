"""Comparison numbers against values worked out by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_records import by_task_record, synthetic_record, synthetic_study

from common.errors import FedcopraError
from server.comparison import compare, holm

# Student's t for 95% and two degrees of freedom, from a printed table.
T_TWO_DEGREES = 4.302653


def study(**finals: list[float | None]) -> list[dict[str, Any]]:
    """Return runs with these final accuracies, one list a label, seeds counted from 0."""
    return [
        synthetic_record("fedavg", seed, label=label, final=value, rounds=3)
        for label, values in finals.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


def only_pair(records: list[dict[str, Any]]) -> dict[str, Any]:
    (pair,) = compare(records)["paired"]
    assert isinstance(pair, dict)
    return pair


def test_mean_and_interval_over_seeds() -> None:
    (row,) = compare(study(one=[0.80, 0.82, 0.84]))["summary"]
    half = T_TWO_DEGREES * 0.02 / math.sqrt(3)
    assert row["accuracy"] == pytest.approx(
        {"mean": 0.82, "sd": 0.02, "low": 0.82 - half, "high": 0.82 + half}, rel=1e-6
    )
    assert row["seeds"] == [0, 1, 2]


def test_paired_difference_is_within_seeds() -> None:
    # Differences 0.01, 0.03 and 0.02: the seeds' own ups and downs cancel.
    pair = only_pair(study(first=[0.70, 0.80, 0.90], second=[0.71, 0.83, 0.92]))
    half = T_TWO_DEGREES * 0.01 / math.sqrt(3)
    # With two degrees of freedom P(|T| > t) = 1 - t / √(t² + 2), here with t = √12.
    p = 1 - math.sqrt(12 / 14)
    assert pair["accuracy"] == pytest.approx(
        {"mean": 0.02, "sd": 0.01, "low": 0.02 - half, "high": 0.02 + half, "p": p, "p_holm": p},
        rel=1e-6,
    )
    assert (pair["label"], pair["against"], pair["seeds"]) == ("second", "first", [0, 1, 2])
    assert pair["verdict"] == "no difference shown"


def test_only_common_seeds_are_paired() -> None:
    records = study(first=[0.5, 0.6, None], second=[None, 0.7, 0.9])
    pair = only_pair(records)
    assert pair["seeds"] == [1]
    assert pair["accuracy"]["mean"] == pytest.approx(0.1)
    assert pair["accuracy"]["low"] is None
    assert pair["verdict"] == "one seed cannot tell"
    assert only_pair(study(first=[0.5, None], second=[None, 0.7]))["verdict"] == "no seed in common"


def test_verdicts_follow_the_differences() -> None:
    records = study(
        first=[0.60, 0.61, 0.62], up=[0.70, 0.711, 0.719], down=[0.50, 0.511, 0.519], same=[0.6] * 3
    )
    verdicts = {pair["label"]: pair["verdict"] for pair in compare(records)["paired"]}
    assert verdicts == {"up": "better", "down": "worse", "same": "no difference shown"}


def test_holm_can_overrule_a_single_interval() -> None:
    # One difference that would stand alone, among five that say nothing.
    noise = [0.60, 0.66, 0.56]
    records = study(
        first=[0.60, 0.61, 0.62],
        close=[0.64, 0.662, 0.69],
        **{f"noise{n}": noise for n in range(5)},
    )
    close = compare(records)["paired"][0]
    assert close["accuracy"]["low"] > 0
    assert close["accuracy"]["p"] < 0.05
    assert close["accuracy"]["p_holm"] == pytest.approx(6 * close["accuracy"]["p"])
    assert close["verdict"] == "no difference shown"


def test_differences_without_spread_prove_nothing() -> None:
    # 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit, which must not count as a tiny spread.
    pair = only_pair(study(first=[0.8, 0.7], second=[0.9, 0.8]))
    assert pair["accuracy"]["p"] is None
    assert pair["verdict"] == "cannot tell: the same difference in every seed"
    twins = only_pair(study(first=[0.8, 0.7], second=[0.8, 0.7]))
    assert (twins["accuracy"]["mean"], twins["accuracy"]["p"]) == (0.0, 1.0)
    assert twins["verdict"] == "no difference shown"


def test_a_run_that_diverged_leaves_no_mean() -> None:
    records = study(first=[0.8, 0.7], second=[0.9, math.nan])
    comparison = compare(records)
    assert comparison["summary"][1]["accuracy"]["mean"] is None
    assert comparison["paired"][0]["verdict"] == "cannot tell: a run has no finite accuracy"
    json.dumps(comparison, allow_nan=False)


def test_holm_by_hand() -> None:
    # Smallest first: 3 · 0.01, 2 · 0.03, then 1 · 0.04, which may not fall below the one before.
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_holm_never_lowers_a_p_value_nor_changes_the_order(seed: int) -> None:
    p_values = np.random.default_rng(seed).beta(0.3, 1, size=seed % 8).tolist()
    adjusted = [value for value in holm(p_values) if value is not None]
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    in_order = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in in_order] == sorted(adjusted)


def test_totals_and_rows() -> None:
    record = synthetic_record("fedavg", 5, rounds=4)
    comparison = compare([record])
    (row,), (summary,) = comparison["rows"], comparison["summary"]
    assert row["bytes_up"] == 4 * (590_000 + 3000) == summary["bytes_up"]
    assert row["training_seconds"] == pytest.approx(4 * 2.3)
    assert row["digest"] == record["digest"]
    assert summary["aggregation_error"] == pytest.approx(0.058 * (1 + 0.5 / 4))
    assert comparison["paired"] == []


def test_the_study_as_a_whole() -> None:
    comparison = compare(synthetic_study())
    labels = [row["label"] for row in comparison["summary"]]
    assert labels[0] == "fedavg"
    assert [pair["label"] for pair in comparison["paired"]] == labels[1:]
    assert {row["label"] for row in comparison["summary"] if row["control"]} == {
        "centralised",
        "local-only",
    }
    assert len(comparison["rows"]) == 24
    assert "Holm" in comparison["method"]
    json.dumps(comparison, allow_nan=False)


def test_copra_pairs_differ_in_copra_only() -> None:
    (pair,) = compare(synthetic_study())["copra"]
    assert (pair["label"], pair["against"]) == ("copra-merge · copra.enabled=true", "copra-merge")
    assert pair["bytes"]["mean"] == pytest.approx(-2 * 12 * 61_000)
    assert pair["training_seconds"]["mean"] == pytest.approx(-12 * 0.4)
    other_settings = synthetic_record("fedavg", label="with", copra=True)
    other_settings["experiment"]["train"]["local_steps"] = 99
    assert compare([synthetic_record("fedavg"), other_settings])["copra"] == []


def test_accuracy_by_task() -> None:
    (row,) = compare([by_task_record("fedavg", seed) for seed in (0, 1)])["summary"]
    assert list(row["tasks"]) == ["docstrings", "commits", "issues"]
    assert row["tasks"]["issues"]["mean"] == pytest.approx(row["accuracy"]["mean"] + 0.05)


def test_a_seed_counts_once() -> None:
    with pytest.raises(FedcopraError, match="fedavg and have seed 3"):
        compare([synthetic_record("fedavg", 3), synthetic_record("fedavg", 3)])
    with pytest.raises(FedcopraError, match="no run"):
        compare([])


def test_reporting_loads_neither_torch_nor_flower() -> None:
    script = (
        "import sys, server.comparison, server.report; "
        "print(sorted({'torch', 'flwr', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
