"""Pages of plain tables, whose cells may be shaded: what there is in a bank, gaps, choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from common.package_files import package_file


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and how dark it is, from 0 to 1; None leaves it plain."""

    text: str
    shade: float | None = None


@dataclass(frozen=True)
class Block:
    """A heading, what is to be said, and a table, if there is one."""

    heading: str
    texts: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


def cells(texts: Sequence[str]) -> list[Cell]:
    """Return plain cells."""
    return [Cell(text) for text in texts]


def write_tables(file: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write one page that works offline."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        package_file("server/reporting/tables.html.jinja").read_text(encoding="utf-8")
    )
    file.write_text(template.render(title=title, blocks=blocks), encoding="utf-8")
