"""Gaps of a bank's prompts to a client's pictures, as a table for the terminal and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.reporting.tables import Block, Cell, cells, write_tables
from server.reporting.wording import count_of, duration

COLUMNS = ("prompt", "gap", "random, same norms", "norm", "rows", "prior")


def gap_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for every prompt, the nearest first."""
    return [
        [
            source["name"],
            _with_error(source["gap"], source["error"]),
            _with_error(source["random"], source["random_error"]),
            f"{source['norm']:.2f}",
            "-" if source["examples"] is None else f"{source['examples']:,}",
            f"{source['prior']:+.2f}",
        ]
        for source in found["sources"]
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return what the numbers say beyond the rows."""
    seconds = found["seconds"]
    said = [
        f"{count_of(len(found['sources']), 'prompt')}, {found['pictures']:,} pictures, "
        f"{found['patches']:,} points, {found['batches']:,} batches: "
        f"{duration(seconds['embedding'])} to load and embed, {duration(seconds['gaps'])} to "
        "measure"
    ]
    if found["mapped"]:
        widths = ", ".join(map(str, found["mapped"]))
        said.append(
            f"Prompts of width {widths} were mapped to the width of the patches by random maps "
            f"(adapter.transfer.begin = {found['begin']!r}); errors are over maps."
        )
    for key, what in (("gap_and_norm", "the norms"), ("gap_and_random", "the gaps of random")):
        if found[key] is not None:
            whose = "of the prompts" if key == "gap_and_norm" else "vectors of the same norms"
            said.append(f"Spearman of the gaps with {what} {whose}: {found[key]:+.2f}.")
    return said


def write_gap_page(file: Path, title: str, found: Mapping[str, Any]) -> None:
    """Write the page: the table, with a bar's worth of shade for every gap."""
    largest = max(source["gap"] for source in found["sources"])
    rows = []
    for source, texts in zip(found["sources"], gap_rows(found), strict=True):
        row = cells(texts)
        for at, key in ((1, "gap"), (2, "random")):
            row[at] = Cell(texts[at], 0.8 * max(0.0, source[key]) / largest if largest > 0 else 0)
        rows.append(row)
    write_tables(
        file, title, [Block("", remarks(found), COLUMNS, rows), Block("Method", [found["method"]])]
    )
