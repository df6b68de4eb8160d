"""`bank`, `gap` and `transfer`: prompts of one task for clients of another."""

from pathlib import Path
from typing import Annotated

import typer

from common.config import load_experiment, parse_assignments
from common.errors import ConfigError
from server.commands.console import (
    ExperimentFile,
    Out,
    Sets,
    console,
    print_table,
)
from server.commands.simulating import kept, print_summary, simulate_all
from server.folders import REPORT, appearing_whole, continued, refuse_existing, write_json


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
    print_table(BRIEF, brief_rows(found))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    console.print(f"all numbers and the map: {folder / 'bank.html'}", soft_wrap=True)


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
    print_table(COLUMNS, gap_rows(found))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    console.print(f"all numbers and the method: {target / REPORT}", soft_wrap=True)


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
    with kept(target), continued(target) as unfinished:
        selected = select(wish, unfinished, simulate_all)
        records = simulate_all(selected.runs, unfinished)
        write_comparison(records, unfinished, [])
        write_json(unfinished / "selection.json", selected.found)
        title = f"What to start from: {folder.name} for {experiment.task.label}"
        write_choice_page(unfinished / "selection.html", title, selected.found)
    for said in selected.found["sentences"]:
        console.print(said, soft_wrap=True)
    print_summary(records)
    console.print(f"record and report: {target / REPORT}", soft_wrap=True)


def selectors(
    folder: Annotated[Path, typer.Argument(help="The folder of a prompt bank.")],
    comparisons: Annotated[
        list[Path],
        typer.Argument(help="Finished comparisons in which every prompt of it was transferred."),
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="Whose transfers count: frozen, projection, attention.",
            show_default="the only kind there is",
        ),
    ] = "",
    out: Out = None,
) -> None:
    """Say how well gap, prior, rows, norms and short probes would have chosen a source.

    The test rows of the comparisons say which source was best; every selector ranks them by what
    a client has beforehand. Only the probes train. Writes selectors.json and report.html into a
    new folder.

    Example: fedcopra selectors bank/ runs/every-source --out runs/selectors
    """
    target = out or Path("runs") / f"{folder.name}-selectors"
    refuse_existing(target)  # before anything heavy is imported
    from common.prompt_bank import load_bank
    from server.analysis.selectors import judge_selectors, tried_sources
    from server.reporting.selector_page import (
        COLUMNS,
        remarks,
        selector_rows,
        write_selector_page,
    )

    bank = load_bank(folder)
    tried = [tried_sources(comparison, bank, kind) for comparison in comparisons]
    with kept(target), continued(target) as unfinished:
        found = judge_selectors(bank, tried, lambda runs: simulate_all(runs, unfinished))
        write_json(unfinished / "selectors.json", found)
        title = f"Ways to choose a prompt of {folder.name}"
        write_selector_page(unfinished / REPORT, title, found)
    print_table(COLUMNS, selector_rows(found["overall"]))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    console.print(f"all numbers and the method: {target / REPORT}", soft_wrap=True)
