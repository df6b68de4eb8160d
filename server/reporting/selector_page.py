"""How well selectors rank the sources of a bank, as tables for the terminal and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.reporting.tables import Block, cells, write_tables
from server.reporting.wording import amount_of_bytes, count_of, duration, percent, points

COLUMNS = ("selector", "Kendall", "Spearman", "regret, points", "seconds", "bytes")


def selector_rows(selectors: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row of texts for every selector."""
    return [
        [
            row["selector"],
            _signed(row["kendall"]),
            _signed(row["spearman"]),
            points(row["regret"], sign=False, unit=False),
            duration(row["seconds"]),
            amount_of_bytes(row["bytes"]),
        ]
        for row in selectors
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return what the numbers are of."""
    seeds = sum(len(comparison["seeds"]) for comparison in found["comparisons"])
    spreads = [
        max(c["outcomes"].values()) - min(c["outcomes"].values()) for c in found["comparisons"]
    ]
    return [
        f"Means over {count_of(len(found['comparisons']), 'comparison')} and {seeds} seeds in all, "
        f"{count_of(len(found['sources']), 'source')}; between the best and the worst source lie "
        f"{points(min(spreads), sign=False)} to {points(max(spreads), sign=False)}."
    ]


def write_selector_page(file: Path, title: str, found: Mapping[str, Any]) -> None:
    """Write the page of `selectors.json`."""
    blocks = [
        Block("", remarks(found), COLUMNS, _plain(selector_rows(found["overall"]))),
    ]
    for comparison in found["comparisons"]:
        heading = f"{comparison['comparison']}: {comparison['kind']} to {comparison['task']}"
        outcomes = ", ".join(f"{s} {percent(a)}" for s, a in comparison["outcomes"].items())
        rows = _plain(selector_rows(comparison["selectors"]))
        blocks.append(Block(heading, [f"On test rows: {outcomes}."], COLUMNS, rows))
    blocks.append(Block("Method", [found["method"]]))
    write_tables(file, title, blocks)


def _plain(rows: Sequence[Sequence[str]]) -> list[Any]:
    return [cells(row) for row in rows]
