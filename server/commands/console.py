"""What commands share: options, the console, progress bars and tables."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.errors import ConfigError
from server.folders import REPORT

console = Console(stderr=True, highlight=False)

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file, as in experiments/.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to write; it must not exist.")]


def progress_bar(unit: str) -> Progress:
    """Return a bar on the console, which counts in this unit; hidden where nobody looks."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; what is given is to be called with what was done, once for each."""
    with progress_bar(unit) as progress:
        bar = progress.add_task("starting", total=total)
        yield lambda what: progress.update(bar, advance=1, description=what)


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers in an option's value, which stand between commas."""
    found = []
    for part in text.split(",") if text else ():
        try:
            found.append(float(part))
        except ValueError:
            raise ConfigError(f"{option} {text}: {part!r} is no number") from None
    return tuple(found)


def groups_of(option: str, text: str) -> list[tuple[int, ...]]:
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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def rewrite_report(run: Path) -> None:
    """Write the run's report with all analyses that there are of it by now."""
    from server.reporting.report import write_report

    write_report([run], run / REPORT)
    console.print(f"report: {run / REPORT}", soft_wrap=True)


def shown_score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
