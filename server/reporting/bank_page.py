"""What a prompt bank holds, as tables for the terminal and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.reporting.tables import Block, Cell, cells, write_tables
from server.reporting.wording import amount_of_bytes

COLUMNS = (
    "prompt",
    "of",
    "size",
    "rows",
    "score",
    "norm",
    "from a start",
    "licence",
    "privacy",
    "checksum",
)
# Those that fit a terminal.
BRIEF = ("prompt", "size", "rows", "score", "norm", "licence", "checksum")
_CONFOUND = (
    "Norms of these prompts and the sizes of their training sets rank alike, Spearman {rho:.2f}: "
    "a source that does well may do so for its norm alone. Hold it against random vectors of the "
    "same norms."
)


def prompt_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for every prompt."""
    return [
        [
            prompt["name"],
            prompt["backbone"],
            f"{prompt['length']} x {prompt['width']}",
            "-" if prompt["examples"] is None else f"{prompt['examples']:,}",
            "-" if prompt["score"] is None else f"{prompt['score']:.3f}",
            f"{prompt['norm']:.2f} ± {prompt['norm_spread']:.2f}",
            f"{prompt['distance']:.3f}",
            prompt["licence"],
            _privacy(prompt["privacy"]),
            prompt["checksum"][:8],
        ]
        for prompt in found["prompts"]
    ]


def brief_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for every prompt, of the columns `BRIEF`."""
    kept = [COLUMNS.index(column) for column in BRIEF]
    return [[row[at] for at in kept] for row in prompt_rows(found)]


def _privacy(privacy: Mapping[str, float] | None) -> str:
    return f"ε {privacy['epsilon']:g}, δ {privacy['delta']:g}" if privacy else "none"


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return what the numbers say beyond the rows."""
    said = []
    total = sum(prompt["bytes"] for prompt in found["prompts"])
    said.append(f"{len(found['prompts'])} prompts, {amount_of_bytes(total)}")
    if any(prompt["first_row"] == "meaningless" for prompt in found["prompts"]):
        said.append("Row 0 means nothing in some of them; it is left out of norms and likenesses.")
    if groups := found["groups"]:
        said.append(
            f"Mean cosine within a group {groups['same']:.3f}, between groups "
            f"{groups['different']:.3f}."
        )
    if (rho := found["norm_and_examples"]) is not None and rho > 0.5:
        said.append(_CONFOUND.format(rho=rho))
    return said


def write_bank_page(file: Path, bank: str, found: Mapping[str, Any]) -> None:
    """Write the page of a bank."""
    rows = [cells(row) for row in prompt_rows(found)]
    maps = [
        Block(
            "Cosine of mean vectors",
            ["Of prompts of one width; row 0 is left out where it means nothing."],
            ("", *found["names"]),
            _map(found["names"], found["cosine"]),
        ),
        Block(
            "Neurons that both activate",
            ["|A ∩ B| / √(|A|·|B|), of prompts of one and the same model, without any input."],
            ("", *found["names"]),
            _map(found["names"], found["overlap"]),
        ),
    ]
    norms = (
        "norm: mean and standard deviation over vectors. from a start: MMD² to one fixed random "
        "prompt as nothing has trained it; about 0.06 at 100 vectors means none of it is left. "
        "score: as the prompt's maker says."
    )
    write_tables(
        file,
        f"Prompt bank {bank}",
        [
            Block("", [*remarks(found), norms], COLUMNS, rows),
            *(block for block in maps if _has_pairs(block)),
        ],
    )


def _map(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> list[list[Cell]]:
    return [
        [Cell(name), *(_shaded(value) for value in row)]
        for name, row in zip(names, values, strict=True)
    ]


def _shaded(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.2f}", max(0.0, value) * 0.8)


def _has_pairs(block: Block) -> bool:
    """Say whether a map has more than its diagonal."""
    return any(
        cell.text
        for number, row in enumerate(block.rows)
        for at, cell in enumerate(row[1:])
        if at != number
    )
