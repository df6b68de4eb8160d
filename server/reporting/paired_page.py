"""Paired tests over several comparisons, as a table for the terminal and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.reporting.tables import Block, cells, write_tables
from server.reporting.wording import points

COLUMNS = (
    "is better",
    "than",
    "mean, points",
    "above/equal/below",
    "effect",
    "p",
    "Holm",
    "p by comparison",
    "Holm",
)


def answer_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for every question."""
    return [
        [
            answer["first"],
            answer["second"],
            points(answer["pairs"]["mean"], unit=False),
            f"{answer['pairs']['above']}/{answer['pairs']['equal']}/{answer['pairs']['below']}",
            f"{answer['pairs']['effect']:+.2f}",
            *_p_values(answer["pairs"]),
            *_p_values(answer["by_comparison"]),
        ]
        for answer in found["answers"]
    ]


def _p_values(tested: Mapping[str, Any]) -> list[str]:
    return [_p_value(tested["p"]), _p_value(tested["p_holm"])]


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def write_paired_page(file: Path, found: Mapping[str, Any]) -> None:
    """Write the page: the tests, and every comparison's mean difference."""
    asked = [f"{answer['first']} > {answer['second']}" for answer in found["answers"]]
    means = [
        [name, *(_mean(answer["differences"][name]) for answer in found["answers"])]
        for name in found["comparisons"]
    ]
    blocks = [
        Block("", [], COLUMNS, [cells(row) for row in answer_rows(found)]),
        Block(
            "Mean difference over seeds, points",
            [],
            ("comparison", *asked),
            [cells(row) for row in means],
        ),
        Block("Method", [found["method"]]),
    ]
    write_tables(file, "Paired over comparisons and seeds", blocks)


def _mean(differences: Mapping[Any, float]) -> str:
    return points(sum(differences.values()) / len(differences), unit=False)
