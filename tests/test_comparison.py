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
from server.reporting.comparison import area, compare, holm

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


def test_area_under_the_curve_by_hand() -> None:
    record = synthetic_record("fedavg", rounds=4)
    record["start"]["accuracy"] = 0.2
    for entry, value in zip(record["rounds"], (None, 0.6, None, 0.8), strict=True):
        entry["accuracy"] = value
    # Trapezoids from 0 to 2 and from 2 to 4: 2 · 0.4 + 2 · 0.7, over four rounds.
    assert area(record, "accuracy") == pytest.approx(0.55)
    record["rounds"][-1]["accuracy"] = None
    assert area(record, "accuracy") is None
    record["rounds"][-1]["accuracy"], record["start"]["accuracy"] = 0.8, None
    assert area(record, "accuracy") is None


def with_bytes(label: str, sizes: list[int], accuracies: list[float | None]) -> dict[str, Any]:
    """Return a run that sends these bytes, both ways together, and is scored so, from 0.1 on."""
    record = synthetic_record("fedavg", label=label, rounds=len(sizes), final=accuracies[-1])
    for entry, size, value in zip(record["rounds"], sizes, accuracies, strict=True):
        entry["bytes"] = {"up": {"total": size - 1}, "down": {"total": 1}}
        entry["accuracy"] = value
    return record


def test_accuracy_at_byte_budgets_by_hand() -> None:
    cheap = with_bytes("cheap", [100, 100, 100, 100], [0.3, None, 0.5, 0.6])
    # The last budget is 400: two bytes more are within the slack, ten are not.
    near = with_bytes("near", [201, 201], [0.4, 0.7])
    dear = with_bytes("dear", [205, 205], [0.4, 0.7])
    diverged = with_bytes("diverged", [400, 400], [0.9, 0.9])
    diverged["final"]["accuracy"] = math.nan
    control = synthetic_record("local-only", rounds=2)
    comparison = compare([cheap, near, dear, diverged, control])
    assert comparison["budgets"]["bytes"] == [100, 200, 400]
    at = {
        row["label"]: [value["mean"] for value in row["accuracy"]]
        for row in comparison["budgets"]["labels"]
    }
    assert at == {
        "cheap": [0.3, 0.3, 0.6],
        "near": [0.1, 0.4, 0.7],
        "dear": [0.1, 0.1, 0.4],
        "diverged": [None, None, None],
    }
    rows = {row["label"]: row["accuracy_at_budgets"] for row in comparison["rows"]}
    assert rows == {**at, "local-only": None}


def test_personalised_labels_stand_apart() -> None:
    records = [
        synthetic_record(name, seed, copra=copra, label=f"{name} {copra}")
        for name, copra in (("fedsa-lora", False), ("fedavg", False), ("fedsa-lora", True))
        for seed in (0, 1)
    ]
    comparison = compare(records)
    assert [row["label"] for row in comparison["summary"]] == ["fedavg False"]
    assert comparison["paired"] == comparison["copra"] == []
    assert [row["label"] for row in comparison["budgets"]["labels"]] == ["fedavg False"]
    own = comparison["own"]
    assert [(row["label"], row["personalised"]) for row in own["summary"]] == [
        ("fedsa-lora False", True),
        ("fedavg False", False),
        ("fedsa-lora True", True),
    ]
    pairs = {pair["label"]: pair for pair in own["paired"]}
    assert {pair["against"] for pair in pairs.values()} == {"fedsa-lora False"}
    ends = {(r["label"], r["seed"]): r["final"]["own_accuracy"] for r in records}
    differences = [ends["fedavg False", s] - ends["fedsa-lora False", s] for s in (0, 1)]
    assert pairs["fedavg False"]["own_accuracy"]["mean"] == pytest.approx(np.mean(differences))
    assert pairs["fedavg False"]["own_accuracy"]["p_holm"] is not None
    assert [(pair["label"], pair["against"]) for pair in own["copra"]] == [
        ("fedsa-lora True", "fedsa-lora False")
    ]
    row = comparison["rows"][0]
    assert (row["accuracy"], row["area"]) == (None, None)
    assert row["own_area"] == pytest.approx(area(records[0], "own_accuracy"))
    json.dumps(comparison, allow_nan=False)


def test_personalised_methods_alone_can_be_compared() -> None:
    comparison = compare([synthetic_record("fedsa-lora", seed) for seed in (0, 1)])
    assert comparison["summary"] == comparison["paired"] == comparison["budgets"]["bytes"] == []
    assert comparison["own"]["summary"][0]["own_accuracy"]["mean"] is not None


def test_ledger_by_hand() -> None:
    record = synthetic_record("fedsa-lora", rounds=2)
    record["rounds"] = record["rounds"][:2]
    for entry, factor in zip(record["rounds"], (1, 3), strict=True):
        # Client 1 takes part in the second round only, and never answers.
        answers = [{"client": 0, "bytes": {"up": {"total": 20 * factor}, "down": {"total": 8}}}]
        if factor == 3:
            answers.append({"client": 1, "bytes": {"down": {"total": 8}}})
        entry["clients"] = [record["rounds"][0]["clients"][0] | answer for answer in answers]
        entry["bytes"] = {
            "up": {"A": 15 * factor, "protocol": 5 * factor, "total": 20 * factor},
            "down": {"protocol": 8 * len(answers), "total": 8 * len(answers)},
            "evaluation": {"protocol": 7, "total": 7},
        }
    (row,) = compare([record])["ledger"]
    assert row["up"].pop("kinds") == {"A": 20}
    assert row["up"] == pytest.approx({"protocol": 20 / 3, "total": 80 / 3, "least": 0, "most": 40})
    assert row["down"] == {"kinds": {}, "protocol": 8, "total": 8, "least": 8, "most": 8}
    assert row["evaluation"] == 14


def test_seconds_are_summed() -> None:
    (row,) = compare([synthetic_record("fedavg", rounds=5)])["summary"]
    assert row["wall_seconds"] == pytest.approx(5 * 1.204)
    assert row["training_seconds"] == pytest.approx(5 * 2.3)


def test_the_study_as_a_whole() -> None:
    comparison = compare(synthetic_study())
    labels = [row["label"] for row in comparison["summary"]]
    assert labels[0] == "fedavg"
    assert [pair["label"] for pair in comparison["paired"]] == labels[1:]
    assert {row["label"] for row in comparison["summary"] if row["control"]} == {
        "centralised",
        "local-only",
    }
    assert "fedsa-lora" not in labels
    assert {row["label"] for row in comparison["own"]["summary"]} == {*labels, "fedsa-lora"}
    assert len(comparison["rows"]) == 27
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
        "import sys, server.reporting.comparison, server.reporting.report; "
        "print(sorted({'torch', 'flwr', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
