"""The command line; `fedcopra --help` lists the commands.

Heavy imports stand inside the commands, so that `--help` and mistakes answer at once.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.config import (
    load_experiment,
    load_subjects,
    parse_assignments,
    split_alternatives,
)
from common.errors import ConfigError, FedcopraError
from server.deployment import commands as deployment_commands
from server.environment import prepare_environment
from server.folders import REPORT, appearing_whole, continued, refuse_existing, write_json
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


app.command()(deployment_commands.certs)
app.command()(deployment_commands.run)
app.add_typer(deployment_commands.site, name="site")


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

    with _kept(folder), continued(folder) as unfinished:
        choices = []
        if trials:
            tried = [run for trial in trials for run in trial.runs]
            choices = choose(trials, _simulate(tried, unfinished))
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


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders of LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", help="The PEFT folder to write; must not exist.")],
    weights: Annotated[
        str, typer.Option(help="One an adapter, with commas; divided by their sum. Usually equal.")
    ] = "",
    rank: Annotated[int, typer.Option(help="Of the merged one; 0: the largest of any.")] = 0,
    alpha: Annotated[
        float, typer.Option(help="Of the merged one; 0: what keeps the first adapter's scale.")
    ] = 0.0,
    gauge: Annotated[
        str, typer.Option(help="How B and A share the singular values: balanced or lora.")
    ] = "balanced",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge though their base models have unlike names.")
    ] = False,
    without_heads: Annotated[
        bool, typer.Option("--without-heads", help="Drop heads and all else that is saved whole.")
    ] = False,
) -> None:
    """Average LoRA adapters from anywhere into one of rank R: their deltas, not their factors.

    One shot, without base model or data. Writes merge.json beside the adapter: how far the adapters
    agree, and what the rank keeps.

    Example: fedcopra merge adapter-a/ adapter-b/ adapter-c/ --weights 2,1,1 --out merged/
    """
    refuse_existing(out)  # before anything heavy is imported
    given = _numbers("--weights", weights)
    from server.analysis.merging import MergeOptions, plan_merge, write_merged

    options = MergeOptions(given, rank, alpha, gauge, any_base, without_heads)
    plan = plan_merge(adapters, options)
    with _counting(len(plan.ranks), "modules") as advance:
        numbers = write_merged(plan, out, advance)
    _print_merge(numbers)
    console.print(f"adapter: {out} (all numbers in merge.json beside it)", soft_wrap=True)


@app.command()
def connectivity(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[
        Path | None,
        typer.Argument(help="A second run, whose model is joined to that of the first."),
    ] = None,
    points: Annotated[int, typer.Option(help="Positions on a line, its ends included; odd.")] = 11,
    examples: Annotated[int, typer.Option(help="Rows to score on; 0 for all.")] = 500,
    clients: Annotated[int, typer.Option(help="How many of the kept clients are joined.")] = 4,
    surface: Annotated[
        bool, typer.Option(help="The loss on the plane through three clients, too.")
    ] = True,
    served: Annotated[
        bool, typer.Option(help="Lines from the merged model to the clients, too.")
    ] = False,
) -> None:
    """Score the straight lines between the adapters of a run: its clients, and another run's model.

    Writes connectivity.json and report.html into the run's folder, over older ones.

    Example: fedcopra connectivity runs/digits-copra-merge-seed0 --clients 3
    """
    if examples < 0:
        raise ConfigError(f"--examples {examples}: choose 1 or more, or 0 for all")
    from server.analysis.connectivity import measure_connectivity, plan_connectivity
    from server.analysis.stored_run import Scorer, open_run
    from server.reporting.connectivity_panels import summary_rows

    stored = open_run(run)
    plan = plan_connectivity(
        stored,
        open_run(other) if other else None,
        points=points,
        clients=clients,
        surface=surface,
        served=served,
    )
    scorer = Scorer(stored.experiment, stored.experiment.task.evaluate_on, examples)
    with _counting(plan.models, "models") as advance:
        found = measure_connectivity(plan, scorer, advance)
    write_json(run / "connectivity.json", found)
    table = Table("lines", "by", "bumps", "barrier, nats", "at λ", "middle less ends", box=None)
    for row in summary_rows(found):
        table.add_row(*row)
    console.print(table)
    _rewrite_report(run)


@app.command()
def shapley(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    players: Annotated[str, typer.Option(help="What is valued: blocks or modules.")] = "blocks",
    orders: Annotated[
        int, typer.Option(help="Random orders, reverses among them; all sets where these are few.")
    ] = 50,
    examples: Annotated[
        int, typer.Option(help="Validation rows to score on; 0 for all.", min=0)
    ] = 500,
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
) -> None:
    """Say what every block of a run's adapter is worth, by Shapley values on validation rows.

    Writes shapley.json and report.html into the run's folder, over older ones.

    Example: fedcopra shapley runs/digits-copra-merge-seed0 --players modules
    """
    from server.analysis.shapley import measure_shapley, plan_shapley, write_shapley
    from server.analysis.stored_run import Scorer, open_run
    from server.reporting.block_panels import value_rows

    stored = open_run(run)
    plan = plan_shapley(stored, players, orders, seed)
    scorer = Scorer(stored.experiment, "validation", examples)
    with _counting(len(plan.design.shares), "models") as advance:
        found = measure_shapley(plan, scorer, advance)
    write_shapley(run, found)
    columns, rows = value_rows(found)
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _rewrite_report(run)


@app.command()
def prune(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; the first is what others are held to.")
    ],
    examples: Annotated[int, typer.Option(help="Rows to score on; 0 for all.", min=0)] = 0,
    sparsity: Annotated[
        str, typer.Option(help="Shares of the delta's entries to set to zero, with commas.")
    ] = "0.25,0.5,0.75,0.9",
) -> None:
    """Score models with parts of their adapters removed, and no retraining.

    By parts kept, by Shapley values where a run has them (fedcopra shapley), and entry by entry.
    Writes pruning.json and report.html into the first run's folder, over older ones.

    Example: fedcopra prune runs/lora runs/copra --sparsity 0.5,0.9
    """
    shares = _numbers("--sparsity", sparsity)
    from server.analysis.pruning import measure_pruning, plan_pruning
    from server.analysis.stored_run import open_run
    from server.reporting.block_panels import pruning_rows

    plan = plan_pruning([open_run(run) for run in runs], shares)
    with _counting(plan.models, "models") as advance:
        found = measure_pruning(plan, examples, advance)
    write_json(runs[0] / "pruning.json", found)
    for number, row in enumerate(found["labels"], start=1):
        console.print(f"{number}: {row['label']}, seeds {row['seeds']}", soft_wrap=True)
    columns, rows = pruning_rows(found)
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for note in found["notes"]:
        console.print(note, soft_wrap=True)
    _rewrite_report(runs[0])


@app.command("low-norm")
def low_norm(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs of soft prompts that differ in the seed.")
    ],
    replace: Annotated[
        str, typer.Option(help="Standard deviations of noise in a vector's place, with commas.")
    ] = "0,0.001,0.02,0.1",
    rescale: Annotated[
        str, typer.Option(help="Factors below 1 on a vector.")
    ] = "0.001,0.1,0.5,0.9",
    raising: Annotated[
        str, typer.Option("--raise", help="Factors above 1, a control.")
    ] = "1.1,1.25,2",
    rotate: Annotated[
        str, typer.Option(help="Degrees that a vector is turned by, a control.")
    ] = "60,90",
    whole: Annotated[
        str, typer.Option(help="Factors on the whole prompt, beside 1.")
    ] = "0.1,0.5,0.8,0.9,1.1,1.25,2",
    positions: Annotated[
        str,
        typer.Option(
            help="Positions from 0, with commas; 0+3 corrupts these two together.",
            show_default="each alone",
        ),
    ] = "",
    examples: Annotated[int, typer.Option(help="Rows to score on; 0 for all.", min=0)] = 0,
) -> None:
    """Score trained prompts with some of their vectors corrupted: the Low-Norm Effect.

    Each operation at each position, and the whole prompt rescaled. Several runs are seeds of one
    analysis. Writes low_norm.json and report.html into the first run's folder, over older ones.

    Example: fedcopra low-norm runs/clip-digits-promptfl-seed0 --positions 0,3,0+3
    """
    amounts = {
        "--replace": replace,
        "--rescale": rescale,
        "--raise": raising,
        "--rotate": rotate,
        "--whole": whole,
    }
    numbers = [_numbers(option, text) for option, text in amounts.items()]
    groups = _groups("--positions", positions)
    from server.analysis.low_norm import Amounts, measure_low_norm, plan_low_norm
    from server.analysis.stored_run import open_run
    from server.reporting.prompt_panels import count_rows, response_rows

    chosen = Amounts(*numbers)
    plan = plan_low_norm([open_run(run) for run in runs], chosen, groups)
    with _counting(plan.models, "models") as advance:
        found = measure_low_norm(plan, examples, advance)
    write_json(runs[0] / "low_norm.json", found)
    console.print(f"{found['label']}, seeds {found['seeds']}", soft_wrap=True)
    for columns, rows in (count_rows(found), response_rows(found)):
        table = Table(*columns, box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        "(cells whose accuracy rises, of those with this effect on norms; a count alone is no "
        "evidence, raised and kept norms are the controls)",
        soft_wrap=True,
    )
    _rewrite_report(runs[0])


@app.command()
def bank(
    folder: Annotated[Path, typer.Argument(help="The folder of the bank; made if need be.")],
    imported: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            help="A safetensors file: a prompt of another bank, or the 13 published for "
            "roberta-base; may be repeated.",
        ),
    ] = None,
    added: Annotated[
        list[Path] | None,
        typer.Option("--add", help="The folder of a run of soft prompts; may be repeated."),
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Of the prompts of --add.", show_default="not stated")
    ] = "",
    prefix: Annotated[str, typer.Option(help="Put before the names of the prompts of --add.")] = "",
) -> None:
    """Keep trained soft prompts for other tasks: list them, put some in, say how alike they are.

    Writes bank.json and bank.html into the folder, over older ones.

    Example: fedcopra bank bank/ --add runs/source-prompts-promptfl-seed0
    """
    if (licence or prefix) and not added:
        option = "--licence" if licence else "--prefix"
        raise ConfigError(f"{option} is of the prompts of --add, and there is none")
    from common.prompt_bank import load_bank
    from server.analysis.source_prompts import (
        NOT_STATED,
        describe,
        entries_of_file,
        entries_of_run,
        put_into,
    )
    from server.analysis.stored_run import open_run
    from server.reporting.bank_page import BRIEF, brief_rows, remarks, write_bank_page

    entries = [entry for file in imported or [] for entry in entries_of_file(file)]
    for run in added or []:
        entries += entries_of_run(open_run(run), licence or NOT_STATED, prefix)
    put_into(folder, entries)
    found = describe(load_bank(folder))
    write_json(folder / "bank.json", found)
    write_bank_page(folder / "bank.html", folder.name, found)
    _print_table(BRIEF, brief_rows(found))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    console.print(f"all numbers and the map: {folder / 'bank.html'}", soft_wrap=True)


@app.command()
def gap(
    folder: Annotated[Path, typer.Argument(help="The folder of a prompt bank.")],
    file: ExperimentFile,
    client: Annotated[
        int | None,
        typer.Option(
            help="To the pictures of this client alone.", show_default="of all that take part"
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Of 100 patches; 0 for all, in five passes, as published.")
    ] = 200,
    statistic: Annotated[
        str, typer.Option(help="multi-kernel, as published, or gaussian, unbiased.")
    ] = "multi-kernel",
    per_picture: Annotated[
        bool, typer.Option("--per-picture", help="One point a picture: its mean patch.")
    ] = False,
    assignments: Sets = None,
    out: Out = None,
) -> None:
    """Rank the prompts of a bank by how near they are to a client's pictures: the modality gap.

    Nothing is trained. Writes gap.json and report.html into a new folder.

    Example: fedcopra gap bank/ experiments/vision-client.toml --out runs/gaps
    """
    experiment = load_experiment(file, parse_assignments(assignments or []))
    target = out or Path("runs") / f"{file.stem}-gap"
    refuse_existing(target)  # before anything heavy is imported
    from common.prompt_bank import load_bank
    from server.analysis.gaps import Measuring, measure_gaps
    from server.reporting.gap_page import COLUMNS, gap_rows, remarks, write_gap_page

    measuring = Measuring(batches, statistic, per_picture)
    clients = experiment.members if client is None else (client,)
    found = measure_gaps(load_bank(folder), experiment, clients, measuring)
    with appearing_whole(target) as unfinished:
        write_json(unfinished / "gap.json", found)
        title = f"Modality gap of {folder.name} to {experiment.task.label}"
        write_gap_page(unfinished / REPORT, title, found)
    _print_table(COLUMNS, gap_rows(found))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    console.print(f"all numbers and the method: {target / REPORT}", soft_wrap=True)


@app.command()
def transfer(
    folder: Annotated[Path, typer.Argument(help="The folder of a prompt bank.")],
    file: ExperimentFile,
    kind: Annotated[
        str, typer.Option(help="frozen, projection, attention; auto lets probes choose.")
    ] = "auto",
    source: Annotated[
        str,
        typer.Option(help="A prompt of the bank.", show_default="the first by the modality gap"),
    ] = "",
    shortlist: Annotated[
        int, typer.Option(help="With auto: how many sources are probed.", min=1)
    ] = 3,
    assignments: Sets = None,
    out: Out = None,
) -> None:
    """Train vision clients from a prompt that was learned on text, or plainly if that is better.

    With auto every client ranks the bank by its gap to the client's own pictures, probes the first
    few on validation rows, and takes a transfer only if it beats plain tuning by more than one
    standard error; clients that chose alike train together. Without it one source serves all.
    Writes selection.json beside the records, and plain tuning for comparison.

    Example: fedcopra transfer bank/ experiments/vision-client.toml --kind auto --out runs/transfer
    """
    from server.analysis.transfer_choice import KINDS

    if kind not in (*KINDS, "auto"):
        raise ConfigError(f"--kind {kind}: choose from {', '.join(KINDS)}, or auto")
    overrides = parse_assignments(assignments or [])
    experiment = load_experiment(file, overrides)
    target = out or Path("runs") / f"{file.stem}-transfer-{kind}"
    refuse_existing(target)  # before anything heavy is imported
    from server.analysis.transfer_selection import Wish, select
    from server.reporting.choice_page import write_choice_page
    from server.study import write_comparison

    wish = Wish(folder, file, overrides, experiment, kind, source, shortlist)
    with _kept(target), continued(target) as unfinished:
        selected = select(wish, unfinished, _simulate)
        records = _simulate(selected.runs, unfinished)
        write_comparison(records, unfinished, [])
        write_json(unfinished / "selection.json", selected.found)
        title = f"What to start from: {folder.name} for {experiment.task.label}"
        write_choice_page(unfinished / "selection.html", title, selected.found)
    for said in selected.found["sentences"]:
        console.print(said, soft_wrap=True)
    _print_summary(records)
    console.print(f"record and report: {target / REPORT}", soft_wrap=True)


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
def _counting(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; what is given is to be called with what was done, once for each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("starting", total=total)
        yield lambda what: progress.update(bar, advance=1, description=what)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers in an option's value, which stand between commas."""
    found = []
    for part in text.split(",") if text else ():
        try:
            found.append(float(part))
        except ValueError:
            raise ConfigError(f"{option} {text}: {part!r} is no number") from None
    return tuple(found)


def _groups(option: str, text: str) -> list[tuple[int, ...]]:
    """Return the groups of whole numbers in an option's value: 0,1+3 is (0,) and (1, 3)."""
    found = []
    for part in text.split(",") if text else ():
        try:
            found.append(tuple(int(number) for number in part.split("+")))
        except ValueError:
            raise ConfigError(
                f"{option} {text}: {part!r} is no position, nor several like 0+3"
            ) from None
    return found


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_merge(numbers: Mapping[str, Any]) -> None:
    merged, alike = numbers["merged"], numbers["pairwise_cosine"]
    columns = ("", "weight", "rank", "alpha", "modules", "norm", "cosine", "stable rank")
    table = Table(*columns, box=None)
    for row in numbers["adapters"]:
        table.add_row(
            row["folder"],
            _score(row["weight"]),
            str(row["rank"]),
            f"{row['alpha']:g}",
            str(row["modules"]),
            _score(row["norm"]),
            _score(row["cosine_with_merged"]),
            _score(row["stable_rank"]),
        )
    shape = (str(merged["rank"]), f"{merged['alpha']:g}", str(merged["modules"]))
    table.add_row("merged", "", *shape, _score(merged["norm"]), "", _score(merged["stable_rank"]))
    console.print(table)
    console.print(
        "(norm of the delta, cosine with the merged one, stable rank of a module on average)",
        soft_wrap=True,
    )
    # Of two adapters the least and the most alike pair are the same.
    pairs = alike if len(numbers["adapters"]) > 2 else dict(list(alike.items())[:1])
    for what, pair in pairs.items():
        label = f"{what} alike" if len(pairs) > 1 else "how alike"
        between = " and ".join(pair["between"])
        console.print(f"{label}: {between}, cosine {pair['cosine']:.3f}", soft_wrap=True)
    worst = merged["worst_module"]
    console.print(
        f"rank {merged['rank']} keeps {100 * merged['kept_energy']:.2f} % of the energy of the "
        f"average, in the worst module {100 * worst['kept_energy']:.2f} % ({worst['module']}); "
        f"rank {merged['rank_that_keeps_99_percent']} would keep 99 %",
        soft_wrap=True,
    )
    for group in numbers["held_by_some"]:
        console.print(
            f"{_some_of(group['names'])}: only in {', '.join(group['held_by'])}; zero elsewhere",
            soft_wrap=True,
        )
    for group in numbers["saved_whole"]:
        everyone = len(group["held_by"]) == len(numbers["adapters"])
        done = "dropped, of" if numbers["heads_dropped"] else "averaged over"
        holders = "all" if everyone else ", ".join(group["held_by"])
        console.print(f"{_some_of(group['names'])}: {done} {holders}", soft_wrap=True)


def _some_of(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _rewrite_report(run: Path) -> None:
    """Write the run's report with all analyses that there are of it by now."""
    from server.reporting.report import write_report

    write_report([run], run / REPORT)
    console.print(f"report: {run / REPORT}", soft_wrap=True)


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
