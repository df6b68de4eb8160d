"""The overview of a suite: one page with every method in every cell, and the way to each report.

Reads plain records only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from common.package_files import package_file
from server.folders import write_json
from server.reporting.choices import choice_rows, price_of_choosing
from server.reporting.comparison import compare
from server.reporting.wording import interval, percent

Record = Mapping[str, Any]


@dataclass(frozen=True)
class CellResult:
    """One cell: its name, its records, and where its own report is, relative to the overview."""

    name: str
    records: Sequence[Record]
    report: str


def write_overview(
    name: str, cells: Sequence[CellResult], choices: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write `suite.json` and `report.html` into `folder`."""
    comparisons = {cell.name: compare(cell.records) for cell in cells}
    content = {
        "suite": name,
        "cells": {
            cell.name: {
                "report": cell.report,
                "summary": comparisons[cell.name]["summary"],
                "paired": comparisons[cell.name]["paired"],
            }
            for cell in cells
        },
        "choices": list(choices),
    }
    write_json(folder / "suite.json", content)
    page = _template().render(
        name=name,
        cells=cells,
        labels=list(dict.fromkeys(r["label"] for cell in cells for r in cell.records)),
        entries={cell.name: _entries(comparisons[cell.name]) for cell in cells},
        choices=choice_rows(choices),
        seeds=sorted({record["seed"] for cell in cells for record in cell.records}),
        price=price_of_choosing(choices),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(
        package_file("server/reporting/overview.html.jinja").read_text(encoding="utf-8")
    )


def _entries(comparison: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return, by label, what stands in the tables of a cell."""
    single = {row["label"]: row for row in comparison["summary"]}
    verdicts = {pair["label"]: _MARKS.get(pair["verdict"], "") for pair in comparison["paired"]}
    means = [row["accuracy"]["mean"] for row in single.values() if not row["control"]]
    best = max((mean for mean in means if mean is not None), default=None)
    entries = {}
    for row in comparison["own"]["summary"]:
        label = row["label"]
        entry = {"own": percent(row["own_accuracy"]["mean"]), "best": "", "verdict": ""}
        entry |= {"accuracy": "–", "interval": ""}
        if label in single:
            accuracy = single[label]["accuracy"]
            entry |= {"accuracy": percent(accuracy["mean"]), "verdict": verdicts.get(label, "")}
            entry["interval"] = interval(accuracy, percent)
            federated = not single[label]["control"]
            leads = federated and accuracy["mean"] is not None and accuracy["mean"] == best
            entry["best"] = "best" if leads else ""
        entries[label] = entry
    return entries


_MARKS = {"better": "better", "worse": "worse"}
