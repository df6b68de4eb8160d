"""The command line: `fedcopra simulate | compare | report | export | list`.

Heavy imports stand inside the commands, so that `--help` and mistakes answer at once.
"""

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.config import (
    Experiment,
    load_experiment,
    parse_assignments,
    split_alternatives,
)
from common.errors import ConfigError, FedcopraError
from server.environment import prepare_environment
from server.wording import round_line

app = typer.Typer(
    name="fedcopra",
    help="Federated fine-tuning of foundation models: simulate, compare, report, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True, highlight=False)

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file, as in experiments/.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to write; it must not exist.")]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: its method's label, and its experiment."""

    label: str
    experiment: Experiment

    @property
    def folder(self) -> str:
        """Return a folder name: the label and the seed."""
        slug = re.sub(r"[^\w.=-]+", "-", self.label).strip("-")
        return f"{slug}-seed{self.experiment.federation.seed}"


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
    _run_all([PlannedRun(experiment.strategy_name, experiment)], folder, comparison=False)


@app.command()
def compare(
    file: ExperimentFile,
    strategies: Annotated[
        str,
        typer.Option(
            help="Strategies, with commas; the first is what others are held to. A strategy may "
            "bring settings of its own: ffa-lora+train.learning_rate=4e-3"
        ),
    ] = "fedavg,ffa-lora,flexlora,copra-merge",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    assignments: Sets = None,
    out: Out = None,
) -> None:
    """Run several strategies on the same shards, seeds and start, and compare them.

    A --set with several values, as in --set copra.enabled=true,false, compares these too.

    Example: fedcopra compare experiments/digits.toml --strategies fedavg,copra-merge --seeds 0,1
    """
    runs = plan_comparison(file, strategies.split(","), seeds.split(","), assignments or [])
    _run_all(runs, out or Path("runs") / f"{file.stem}-comparison", comparison=True)


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
    from server.report import write_report

    write_report(folders, out)
    console.print(f"report: {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    folder: Annotated[Path, typer.Argument(help="The PEFT folder to write; must not exist.")],
    task: Annotated[str, typer.Option(help="Whose head, in a by-task run.")] = "",
) -> None:
    """Write the served adapter as a standard PEFT folder.

    Example: fedcopra export runs/digits-copra-merge-seed0 adapter/
    """
    from server.export import export_run

    export_run(run, folder, task)
    console.print(f"adapter: {folder} (PeftModel.from_pretrained(base, {str(folder)!r}) takes it)")


@app.command("list")
def list_command(
    what: Annotated[str, typer.Argument(help="strategies, tasks or backbones.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what there is, one line each.

    Example: fedcopra list strategies --json
    """
    from server.catalogue import CATALOGUES

    if what not in CATALOGUES:
        raise ConfigError(f"list {what}: choose from {', '.join(CATALOGUES)}")
    entries = CATALOGUES[what]()
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    width = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        print(f"{entry['name']:<{width}}  {entry['summary']}")


def plan_comparison(
    file: Path, strategies: Sequence[str], seeds: Sequence[str], assignments: Sequence[str]
) -> list[PlannedRun]:
    """Return every run of strategies x settings x seeds, in that order.

    A strategy is written `name`, or `name+key=value+key=value` for settings that it alone has.

    Raises:
        ConfigError: any of them could not be meant; nothing has run by then.
    """
    alternatives = split_alternatives(assignments)
    for key, option in {"federation.seed": "--seeds", "strategy.name": "--strategies"}.items():
        if key in alternatives:
            raise ConfigError(f"--set {key}: in a comparison, say {option} instead")
    varied = [key for key, values in alternatives.items() if len(values) > 1]
    numbers = [_seed(seed) for seed in seeds]
    runs = []
    for strategy in strategies:
        name, *own = strategy.strip().split("+")
        for values in itertools.product(*alternatives.values()):
            setting = dict(zip(alternatives, values, strict=True)) | parse_assignments(own)
            shown = [*varied, *(key for key in parse_assignments(own) if key not in varied)]
            label = " · ".join([name, *(f"{key}={_shown(setting[key])}" for key in shown)])
            for seed in numbers:
                chosen = {"strategy.name": name, "federation.seed": seed}
                runs.append(PlannedRun(label, load_experiment(file, setting | chosen)))
    if repeated := [run.folder for run in runs if [r.folder for r in runs].count(run.folder) > 1]:
        raise ConfigError(f"the comparison has {repeated[0]} more than once")
    return runs


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise ConfigError(f"--seeds {text!r}: seeds are whole numbers from 0, as in 0,1,2")
    return int(text)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _run_all(runs: Sequence[PlannedRun], folder: Path, *, comparison: bool) -> None:
    from server.record import (
        REPORT,
        appearing_whole,
        build_record,
        refuse_existing,
        write_json,
        write_run,
    )
    from strategies import resolve

    refuse_existing(folder)  # before anything heavy is imported
    for run in runs:
        resolve(run.experiment)
    from server.comparison import compare as compare_records
    from server.report import write_report

    with appearing_whole(folder) as unfinished:
        finished = _simulate_with_progress(runs, comparison)
        records = [build_record(done, run.label) for run, done in zip(runs, finished, strict=True)]
        for run, record, done in zip(runs, records, finished, strict=True):
            place = unfinished / run.folder if comparison else unfinished
            place.mkdir(exist_ok=True)
            write_run(place, record, done.outcomes.served)
        if comparison:
            write_json(unfinished / "comparison.json", compare_records(records))
        write_report([unfinished], unfinished / REPORT)
    _print_summary(records)
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)


def _simulate_with_progress(runs: Sequence[PlannedRun], comparison: bool) -> list[Any]:
    from server.simulation import simulate as simulate_runs

    rounds = sum(run.experiment.federation.rounds for run in runs)
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
            seed = run.experiment.federation.seed
            progress.update(bar, advance=1, description=f"{run.label}, seed {seed}")
            if not comparison or row["round"] == run.experiment.federation.rounds:
                line = f"{run.label}, seed {seed}, {round_line(row)}"
                progress.console.print(line, soft_wrap=True)
            for client in row["clients"]:
                if client["status"] != "ok":
                    progress.console.print(
                        f"{run.label}, seed {seed}, round {row['round']}: client "
                        f"{client['client']} {client['status']}: {client['reason']}",
                        soft_wrap=True,
                    )

        return simulate_runs([run.experiment for run in runs], on_progress)


def _print_summary(records: Sequence[Mapping[str, Any]]) -> None:
    from server.comparison import compare as compare_records

    table = Table("strategy", "accuracy", "95 % interval", "against the first", box=None)
    comparison = compare_records(records)
    verdicts = {pair["label"]: pair["verdict"] for pair in comparison["paired"]}
    for row in comparison["summary"]:
        scores = row["accuracy"]
        interval = (
            "one seed" if scores["low"] is None else f"{scores['low']:.3f}-{scores['high']:.3f}"
        )
        table.add_row(
            row["label"], f"{scores['mean']:.3f}", interval, verdicts.get(row["label"], "")
        )
    console.print(table)
