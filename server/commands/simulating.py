"""Runs that commands have made, with a progress bar, and what they print of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from server.commands.console import console, progress_bar, shown_score
from server.plans import PlannedRun
from server.reporting.wording import round_line


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """When a comparison is stopped, say that what has been done is kept."""
    try:
        yield
    except BaseException:
        if folder.with_name(f".{folder.name}.unfinished").exists():
            console.print("stopped; finished runs are kept: the same command goes on from there")
        raise


def simulate_all(runs: Sequence[PlannedRun], folder: Path) -> list[dict[str, Any]]:
    """Make the runs that are missing, with a progress bar; return the records of all."""
    from server.study import finished_runs, make_runs
    from strategies import resolve

    for run in runs:
        resolve(run.experiment)
    done = finished_runs(runs, folder)
    if done:
        console.print(f"{len(done)} of {len(runs)} runs are there already")
    rounds = sum(run.experiment.federation.rounds for i, run in enumerate(runs) if i not in done)
    with progress_bar("rounds") as progress:
        bar = progress.add_task("starting clients", total=rounds)

        def on_progress(index: int, row: Mapping[str, Any]) -> None:
            run = runs[index]
            who = f"{run.label}, seed {run.experiment.federation.seed}"
            who = f"{run.cell}: {who}" if run.cell else who
            progress.update(bar, advance=1, description=who)
            if len(runs) == 1 or row["round"] == run.experiment.federation.rounds:
                progress.console.print(f"{who}, {round_line(row)}", soft_wrap=True)
            for client in row["clients"]:
                if client["status"] != "ok":
                    progress.console.print(
                        f"{who}, round {row['round']}: client {client['client']} "
                        f"{client['status']}: {client['reason']}",
                        soft_wrap=True,
                    )

        return make_runs(runs, folder, on_progress)


def print_summary(records: Sequence[Mapping[str, Any]]) -> None:
    from server.reporting.comparison import compare as compare_records

    columns = ("strategy", "accuracy", "95 % interval", "against the first", "on own labels")
    table = Table(*columns, box=None)
    comparison = compare_records(records)
    verdicts = {pair["label"]: pair["verdict"] for pair in comparison["paired"]}
    single = {row["label"]: row["accuracy"] for row in comparison["summary"]}
    for row in comparison["own"]["summary"]:
        label, scores = row["label"], single.get(row["label"])
        # A personalised method has no accuracy but that on its clients' own labels.
        interval = "personalised" if scores is None else _interval(scores)
        accuracy = shown_score(scores["mean"] if scores else None)
        own = shown_score(row["own_accuracy"]["mean"])
        table.add_row(label, accuracy, interval, verdicts.get(label, ""), own)
    console.print(table)


def _interval(scores: Mapping[str, float | None]) -> str:
    if scores["mean"] is None:
        return "not finite in every seed"
    if scores["low"] is None:
        return "one seed"
    return f"{scores['low']:.3f}-{scores['high']:.3f}"
