"""Studies: many runs into one folder, each written when it ends, so that a study can be continued.

A study that was stopped leaves its finished runs in `.<folder>.unfinished`. The same command finds
them there and makes only the runs that are missing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.environment import git_state, installed_versions
from server.folders import FORMAT, RECORD, REPORT, appearing_whole, write_json
from server.plans import Cell, Choice, PlannedRun
from server.record import build_record, write_run
from server.simulation import Finished, OnProgress, simulate

Record = dict[str, Any]


def finished_runs(runs: Sequence[PlannedRun], folder: Path) -> dict[int, Record]:
    """Return the records of the planned runs that are there already, by position.

    A record counts if its experiment, label, the versions of all libraries and the commit of this
    code are the same: runs of unlike code are not to be compared.
    """
    found = {}
    for index, run in enumerate(runs):
        file = folder / run.folder / RECORD
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if record and _is_of(record, run):
            found[index] = record
    return found


def make_runs(runs: Sequence[PlannedRun], folder: Path, on_progress: OnProgress) -> list[Record]:
    """Make every run that is not there yet; return the records of all, in order."""
    records = finished_runs(runs, folder)
    missing = [index for index in range(len(runs)) if index not in records]

    def write(position: int, finished: Finished) -> None:
        index = missing[position]
        place = folder / runs[index].folder
        shutil.rmtree(place, ignore_errors=True)  # of another experiment, or another version
        record = build_record(finished, runs[index].label)
        with appearing_whole(place) as unfinished:
            write_run(unfinished, record, finished.outcomes)
        records[index] = record

    def tell(position: int, row: Mapping[str, Any]) -> None:
        on_progress(missing[position], row)

    if missing:
        simulate([runs[index].experiment for index in missing], tell, write)
    return [records[index] for index in range(len(runs))]


def write_comparison(records: Sequence[Record], folder: Path, choices: Sequence[Choice]) -> None:
    """Write `comparison.json` and the report of one comparison, whose runs are in `folder`."""
    from server.reporting.comparison import compare
    from server.reporting.report import write_report

    comparison = compare(records)
    if choices:
        comparison["choices"] = [describe_choice(choice) for choice in choices]
    write_json(folder / "comparison.json", comparison)
    write_report([folder], folder / REPORT)


def write_suite(
    name: str,
    cells: Sequence[Cell],
    runs: Sequence[PlannedRun],
    records: Sequence[Record],
    choices: Sequence[Choice],
    folder: Path,
) -> None:
    """Write the comparison of every cell, and the overview of all of them."""
    from server.reporting.overview import CellResult, write_overview

    results = []
    for cell in cells:
        there = [
            (r, record) for r, record in zip(runs, records, strict=True) if r.cell == cell.name
        ]
        place = folder / there[0][0].folder
        chosen = [choice for choice in choices if choice.cell == cell.tuned_like]
        write_comparison([record for _, record in there], place.parent, chosen)
        results.append(
            CellResult(cell.name, [record for _, record in there], f"{place.parent.name}/{REPORT}")
        )
    write_overview(name, results, [describe_choice(choice) for choice in choices], folder)


def describe_choice(choice: Choice) -> dict[str, Any]:
    """Return what was chosen, among what, at which price, for a record."""
    return {
        "label": choice.subject,
        "cell": choice.cell,
        "chosen": dict(choice.settings),
        "tried": choice.tried,
        "bytes": sum(trial["bytes"] for trial in choice.tried),
        "training_seconds": sum(trial["seconds"] for trial in choice.tried),
    }


def _is_of(record: Mapping[str, Any], run: PlannedRun) -> bool:
    wanted = {
        "format": FORMAT,
        "label": run.label,
        "experiment": json.loads(run.experiment.model_dump_json()),
    }
    same = all(record.get(key) == value for key, value in wanted.items())
    there = record.get("environment", {})
    return same and (there["versions"], there["git"]) == (installed_versions(), git_state())
