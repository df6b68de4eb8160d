"""The command line: `fedcopra simulate | compare | report | export | list`.

Heavy imports stand inside the commands, so that `--help` and mistakes answer at once.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.config import load_experiment, parse_assignments, split_alternatives
from common.errors import ConfigError, FedcopraError
from server.environment import prepare_environment
from server.folders import REPORT, appearing_whole, continued, refuse_existing
from server.plans import (
    ONE_CELL,
    SUITES,
    PlannedRun,
    cells_of,
    checked_alternatives,
    choose,
    parse_seeds,
    plan_runs,
    plan_trials,
    subjects_of,
    tuning_cells,
    with_choices,
)
from server.reporting.wording import round_line

app = typer.Typer(
    name="fedcopra",
    help="Federated fine-tuning of foundation models: simulate, compare, report, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_USUAL = ("fedavg", "ffa-lora", "flexlora", "copra-merge")
console = Console(stderr=True, highlight=False)

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file, as in experiments/.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to write; it must not exist.")]


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    prepare_environment()
    try:
        sys.exit(app(standalone_mode=False))
    except FedcopraError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(f"{error.format_message()} (fedcopra --help shows how)")
    except click.Abort:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"fedcopra: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.command()
def simulate(file: ExperimentFile, assignments: Sets = None, out: Out = None) -> None:
    """Run one federation on this machine and write its record, model and report.

    Example: fedcopra simulate experiments/digits.toml --set federation.rounds=4 --out runs/short
    """
    experiment = load_experiment(file, parse_assignments(assignments or []))
    name = f"{file.stem}-{experiment.strategy_name}-seed{experiment.federation.seed}"
    folder = out or Path("runs") / name
    refuse_existing(folder)  # before anything heavy is imported
    from server.reporting.report import write_report

    with TemporaryDirectory() as scratch:
        planned = PlannedRun(experiment.strategy_name, experiment)
        records = _simulate([planned], Path(scratch))
        with appearing_whole(folder) as unfinished:
            shutil.copytree(Path(scratch) / planned.folder, unfinished, dirs_exist_ok=True)
            write_report([unfinished], unfinished / REPORT)
    _print_summary(records)
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)


@app.command()
def compare(
    file: ExperimentFile,
    strategies: Annotated[
        str,
        typer.Option(
            help="Strategies, with commas; the first is what others are held to. A strategy may "
            "bring settings of its own: ffa-lora+train.learning_rate=4e-3",
            show_default="fedavg,ffa-lora,flexlora,copra-merge, or those of the suite",
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    assignments: Sets = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="Choose this setting for every strategy by itself, on validation rows.",
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="A standard grid: federated-lora.")] = "",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=VALUES", help="Make only these cells of the suite."),
    ] = None,
    out: Out = None,
) -> None:
    """Run several strategies on the same shards, seeds and start, and compare them.

    A --set with several values, as in --set copra.enabled=true,false, compares these too. --tune
    tries every value for every strategy at a seed of its own, on validation rows, and takes the
    best one to the test rows. A comparison that was stopped goes on where it was when the same
    command is given again.

    Example: fedcopra compare experiments/digits.toml --strategies fedavg,copra-merge --seeds 0,1
    """
    if suite and suite not in SUITES:
        raise ConfigError(f"--suite {suite!r}: choose from {', '.join(SUITES)}")
    if only and not suite:
        raise ConfigError(f"--only {only[0]}: it chooses cells of a --suite, and there is none")
    standard = SUITES[suite] if suite else None
    names = strategies.split(",") if strategies else (standard.strategies if standard else _USUAL)
    subjects = subjects_of(names, checked_alternatives(assignments or []))
    cells = cells_of(standard, only or []) if standard else ONE_CELL
    grid = split_alternatives(tune or []) or (standard.grid if standard else {})
    numbers = parse_seeds(seeds.split(","))
    runs = plan_runs(file, subjects, cells, numbers)
    places = tuning_cells(standard, cells) if standard else ONE_CELL
    trials = plan_trials(file, subjects, places, grid) if grid else []
    folder = out or Path("runs") / f"{file.stem}-{suite or 'comparison'}"
    refuse_existing(folder)  # before anything heavy is imported
    from server.study import write_comparison, write_suite

    with _kept(folder), continued(folder) as unfinished:
        choices = []
        if trials:
            choices = choose(trials, _simulate([trial.run for trial in trials], unfinished))
            runs = with_choices(file, subjects, cells, numbers, choices)
        records = _simulate(runs, unfinished)
        if standard:
            write_suite(suite, cells, runs, records, choices, unfinished)
        else:
            write_comparison(records, unfinished, choices)
    for cell in cells:
        if cell.name:
            console.print(f"\n{cell.name}")
        _print_summary([d for r, d in zip(runs, records, strict=True) if r.cell == cell.name])
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or of comparisons.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one HTML page from any records; it works offline.

    Example: fedcopra report runs/A runs/B --out both.html
    """
    from server.reporting.report import write_report

    write_report(folders, out)
    console.print(f"report: {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    folder: Annotated[Path, typer.Argument(help="The PEFT folder to write; must not exist.")],
    task: Annotated[str, typer.Option(help="Whose head, in a by-task run.")] = "",
    rank: Annotated[
        int, typer.Option(help="Cut to the best of this rank; methods with a residual need it.")
    ] = 0,
) -> None:
    """Write the served adapter as a standard PEFT folder.

    Example: fedcopra export runs/digits-copra-merge-seed0 adapter/
    """
    from server.export import export_run

    kept = export_run(run, folder, task, rank)
    if kept is not None:
        console.print(f"rank {rank} keeps {100 * kept:.2f} % of the energy of the served delta")
    console.print(f"adapter: {folder} (PeftModel.from_pretrained(base, {str(folder)!r}) takes it)")


@app.command("list")
def list_command(
    what: Annotated[str, typer.Argument(help="strategies, tasks or backbones.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what there is; of strategies, what each serves, costs and can do.

    Example: fedcopra list strategies --json
    """
    from server.catalogue import CATALOGUES

    if what not in CATALOGUES:
        raise ConfigError(f"list {what}: choose from {', '.join(CATALOGUES)}")
    catalogue = CATALOGUES[what]
    entries = catalogue.entries()
    print(json.dumps(entries, indent=1) if as_json else catalogue.write(entries))


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """When a comparison is stopped, say that what has been done is kept."""
    try:
        yield
    except BaseException:
        if folder.with_name(f".{folder.name}.unfinished").exists():
            console.print("stopped; finished runs are kept: the same command goes on from there")
        raise


def _simulate(runs: Sequence[PlannedRun], folder: Path) -> list[dict[str, Any]]:
    """Make the runs that are missing, with a progress bar; return the records of all."""
    from server.study import finished_runs, make_runs
    from strategies import resolve

    for run in runs:
        resolve(run.experiment)
    done = finished_runs(runs, folder)
    if done:
        console.print(f"{len(done)} of {len(runs)} runs are there already")
    rounds = sum(run.experiment.federation.rounds for i, run in enumerate(runs) if i not in done)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeElapsedColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
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


def _print_summary(records: Sequence[Mapping[str, Any]]) -> None:
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
        accuracy = _score(scores["mean"] if scores else None)
        own = _score(row["own_accuracy"]["mean"])
        table.add_row(label, accuracy, interval, verdicts.get(label, ""), own)
    console.print(table)


def _interval(scores: Mapping[str, float | None]) -> str:
    if scores["mean"] is None:
        return "not finite in every seed"
    if scores["low"] is None:
        return "one seed"
    return f"{scores['low']:.3f}-{scores['high']:.3f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
