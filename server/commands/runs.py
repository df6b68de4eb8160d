"""`simulate`, `compare`, `report`, `export` and `list`."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from common.config import (
    load_experiment,
    load_subjects,
    parse_assignments,
    split_alternatives,
)
from common.errors import ConfigError
from server.commands.console import ExperimentFile, Out, Sets, console
from server.commands.simulating import kept, print_summary, simulate_all
from server.folders import REPORT, appearing_whole, continued, refuse_existing
from server.plans import (
    ONE_CELL,
    SUITES,
    PlannedRun,
    cells_of,
    checked_alternatives,
    choose,
    named_subjects,
    parse_seeds,
    plan_runs,
    plan_trials,
    subjects_of,
    tuning_cells,
    with_choices,
)

_USUAL = ("fedavg", "ffa-lora", "flexlora", "copra-merge")


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
        records = simulate_all([planned], Path(scratch))
        with appearing_whole(folder) as unfinished:
            shutil.copytree(Path(scratch) / planned.folder, unfinished, dirs_exist_ok=True)
            write_report([unfinished], unfinished / REPORT)
    print_summary(records)
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)


def compare(
    file: ExperimentFile,
    strategies: Annotated[
        str,
        typer.Option(
            help="Strategies, with commas; the first is what others are held to. A strategy may "
            "bring settings of its own: ffa-lora+train.learning_rate=4e-3",
            show_default="what the file names as subjects, or those of the suite, or "
            "fedavg,ffa-lora,flexlora,copra-merge",
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
    tune_seeds: Annotated[
        int, typer.Option(help="How many seeds of their own choose together.", min=1)
    ] = 1,
    suite: Annotated[str, typer.Option(help="A standard grid: federated-lora.")] = "",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=VALUES", help="Make only these cells of the suite."),
    ] = None,
    out: Out = None,
) -> None:
    """Run several strategies on the same shards, seeds and start, and compare them.

    A --set with several values, as in --set copra.enabled=true,false, compares these too. --tune
    tries every value for every strategy at seeds of their own, on validation rows, and takes the
    best one to the test rows. A comparison that was stopped goes on where it was when the same
    command is given again. A file may name what is compared: tables [subjects."label"], whose
    settings are laid over the others.

    Example: fedcopra compare experiments/digits.toml --strategies fedavg,copra-merge --seeds 0,1
    """
    if suite and suite not in SUITES:
        raise ConfigError(f"--suite {suite!r}: choose from {', '.join(SUITES)}")
    if only and not suite:
        raise ConfigError(f"--only {only[0]}: it chooses cells of a --suite, and there is none")
    standard = SUITES[suite] if suite else None
    names = strategies.split(",") if strategies else (standard.strategies if standard else _USUAL)
    alternatives = checked_alternatives(assignments or [])
    named = {} if strategies or standard else load_subjects(file)
    subjects = (
        named_subjects(load_experiment(file).strategy_name, named, alternatives)
        if named
        else subjects_of(names, alternatives)
    )
    cells = cells_of(standard, only or []) if standard else ONE_CELL
    grid = split_alternatives(tune or []) or (standard.grid if standard else {})
    numbers = parse_seeds(seeds.split(","))
    runs = plan_runs(file, subjects, cells, numbers)
    places = tuning_cells(standard, cells) if standard else ONE_CELL
    trials = plan_trials(file, subjects, places, grid, tune_seeds) if grid else []
    folder = out or Path("runs") / f"{file.stem}-{suite or 'comparison'}"
    refuse_existing(folder)  # before anything heavy is imported
    from server.study import write_comparison, write_suite

    with kept(folder), continued(folder) as unfinished:
        choices = []
        if trials:
            tried = [run for trial in trials for run in trial.runs]
            choices = choose(trials, simulate_all(tried, unfinished))
            runs = with_choices(file, subjects, cells, numbers, choices)
        records = simulate_all(runs, unfinished)
        if standard:
            write_suite(suite, cells, runs, records, choices, unfinished)
        else:
            write_comparison(records, unfinished, choices)
    for cell in cells:
        if cell.name:
            console.print(f"\n{cell.name}")
        print_summary([d for r, d in zip(runs, records, strict=True) if r.cell == cell.name])
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)


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


def list_entries(
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
