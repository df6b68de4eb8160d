"""`connectivity`, `shapley`, `prune`, `low-norm` and `paired`: analyses of finished runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from common.errors import ConfigError
from server.commands.console import (
    Out,
    console,
    counting,
    groups_of,
    numbers_of,
    print_table,
    rewrite_report,
)
from server.folders import REPORT, appearing_whole, refuse_existing, write_json


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
    with counting(plan.models, "models") as advance:
        found = measure_connectivity(plan, scorer, advance)
    write_json(run / "connectivity.json", found)
    columns = ("lines", "by", "bumps", "barrier, nats", "at λ", "middle less ends")
    print_table(columns, summary_rows(found))
    rewrite_report(run)


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
    with counting(len(plan.design.shares), "models") as advance:
        found = measure_shapley(plan, scorer, advance)
    write_shapley(run, found)
    columns, rows = value_rows(found)
    print_table(columns, rows)
    rewrite_report(run)


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
    shares = numbers_of("--sparsity", sparsity)
    from server.analysis.pruning import measure_pruning, plan_pruning
    from server.analysis.stored_run import open_run
    from server.reporting.block_panels import pruning_rows

    plan = plan_pruning([open_run(run) for run in runs], shares)
    with counting(plan.models, "models") as advance:
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
    rewrite_report(runs[0])


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
    numbers = [numbers_of(option, text) for option, text in amounts.items()]
    groups = groups_of("--positions", positions)
    from server.analysis.low_norm import Amounts, measure_low_norm, plan_low_norm
    from server.analysis.stored_run import open_run
    from server.reporting.prompt_panels import count_rows, response_rows

    chosen = Amounts(*numbers)
    plan = plan_low_norm([open_run(run) for run in runs], chosen, groups)
    with counting(plan.models, "models") as advance:
        found = measure_low_norm(plan, examples, advance)
    write_json(runs[0] / "low_norm.json", found)
    console.print(f"{found['label']}, seeds {found['seeds']}", soft_wrap=True)
    for columns, rows in (count_rows(found), response_rows(found)):
        print_table(columns, rows)
    console.print(
        "(cells whose accuracy rises, of those with this effect on norms; a count alone is no "
        "evidence, raised and kept norms are the controls)",
        soft_wrap=True,
    )
    rewrite_report(runs[0])


def paired(
    folders: Annotated[list[Path], typer.Argument(help="The folders of finished comparisons.")],
    asked: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            metavar='"FIRST > SECOND"',
            help="Two labels, each in every comparison: is the first better? May be repeated.",
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Ask over several comparisons whether one subject is better than another: signed-rank tests.

    A pair is one seed of one comparison. p values are corrected for all the questions of the
    command. Writes paired.json and report.html into a new folder.

    Example: fedcopra paired runs/A runs/B --pair "projection > projection, norms alone"
    """
    target = out or Path("runs") / "paired"
    refuse_existing(target)  # before anything heavy is imported
    from server.analysis.paired_tests import accuracies_of, parse_questions, signed_ranks
    from server.reporting.paired_page import COLUMNS, answer_rows, write_paired_page

    questions = parse_questions(asked or [])
    found = signed_ranks(accuracies_of(folders), questions)
    with appearing_whole(target) as unfinished:
        write_json(unfinished / "paired.json", found)
        write_paired_page(unfinished / REPORT, found)
    print_table(COLUMNS, answer_rows(found))
    console.print(f"all numbers and the method: {target / REPORT}", soft_wrap=True)
