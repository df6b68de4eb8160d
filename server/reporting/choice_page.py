"""How each client chose what to start from, as a page: every probe at every length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.reporting.tables import Block, cells, write_tables
from server.reporting.wording import count_of, duration

COLUMNS = ("probe", "what it is", "accuracy", "loss", "training")


def probe_rows(rung: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for every probe of a length, the best first."""
    probes = sorted(rung["probes"], key=lambda probe: -probe["accuracy"])
    return [
        [
            probe["label"],
            probe["role"],
            f"{probe['accuracy']:.3f}",
            "not finite" if probe["loss"] is None else f"{probe['loss']:.3f}",
            duration(probe["training_seconds"]),
        ]
        for probe in probes
    ]


def write_choice_page(file: Path, title: str, found: Mapping[str, Any]) -> None:
    """Write the page of `selection.json`."""
    blocks: list[Block] = [Block("", found["sentences"])]
    for told in found["clients"]:
        for rung in told["rungs"]:
            heading = (
                f"Client {told['client']}: {count_of(rung['rounds'], 'round')}, validation rows"
            )
            blocks.append(Block(heading, [], COLUMNS, _plain(probe_rows(rung))))
    blocks.append(Block("Method", [found["method"]]))
    write_tables(file, title, blocks)


def _plain(rows: Sequence[Sequence[str]]) -> list[Any]:
    return [cells(row) for row in rows]
