"""What a report says of settings that were chosen on validation rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import synthetic_record

from server.folders import CHOOSING
from server.reporting.choices import at_the_edge, choice_rows, price_of_choosing
from server.reporting.report import read_records, write_report


def chosen(value: Any, tried: list[Any], label: str = "fedavg") -> dict[str, Any]:
    return {
        "label": label,
        "cell": "",
        "chosen": {"train.learning_rate": value},
        "tried": [
            {"settings": {"train.learning_rate": t}, "accuracy": 0.5 + 0.01 * k, "loss": 1.0}
            for k, t in enumerate(tried)
        ],
        "bytes": 2_000_000,
        "training_seconds": 30.0,
    }


@pytest.mark.parametrize(
    ("value", "tried", "edge"),
    [
        (0.01, [0.001, 0.01], True),
        (0.001, [0.01, 0.001, 0.1], True),
        (0.01, [0.1, 0.01, 0.001], False),
        (0.01, [0.01], False),
        ("cosine", ["cosine", "none"], False),
        (True, [True, False], False),
    ],
)
def test_the_edge_of_a_grid_is_the_smallest_or_largest_number(
    value: Any, tried: list[Any], edge: bool
) -> None:
    assert at_the_edge(chosen(value, tried)) is edge
    [row] = choice_rows([chosen(value, tried)])
    assert bool(row["edge"]) is edge


def test_the_price_of_choosing_is_said() -> None:
    said = price_of_choosing([chosen(0.01, [0.001, 0.01]), chosen(0.01, [0.001, 0.01, 0.1])])
    assert "5 runs" in said
    assert "4 MB" in said
    assert "1 of 2 choices lie at the edge" in said
    assert price_of_choosing([]) == ""


def test_a_report_shows_the_choice_and_leaves_the_runs_of_choosing_out(tmp_path: Path) -> None:
    places = {
        "fedavg-seed0": synthetic_record("fedavg", 0),
        f"{CHOOSING}/fedavg-lr-seed1000": synthetic_record("fedavg", 1000, label="fedavg · lr"),
    }
    for place, record in places.items():
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "record.json").write_text(json.dumps(record))
    content = {"rows": [{"label": "fedavg"}], "choices": [chosen(0.01, [0.001, 0.01, 0.1])]}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    assert [record["label"] for record in read_records(tmp_path)] == ["fedavg"]
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "train.learning_rate = 0.01" in page
    assert "Choosing took 3 runs" in page
    assert "fedavg · lr" not in page
