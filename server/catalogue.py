"""What there is: the tables behind `fedcopra list`, and the page on strategies.

`python -m server.catalogue > docs/strategies.md` writes that page anew.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entries = list[dict[str, Any]]
WIDTH = 120


def strategies() -> Entries:
    """Describe every strategy: what it serves, costs, needs, keeps and can be told."""
    from strategies import STRATEGIES

    entries = []
    for name, method in STRATEGIES.items():
        up, down = method.cost.words
        entries.append(
            {
                "name": name,
                "summary": method.summary,
                "citation": method.citation,
                "control": method.control,
                "served": method.served,
                "cost": {"up": up, "down": down},
                "weighting": method.weighting,
                "adapters": list(method.adapters),
                "unequal_ranks": method.unequal_ranks,
                "by_task": method.by_task,
                "secure_aggregation": method.secure_aggregation,
                "noise": method.noise,
                "optimiser": method.optimiser,
                "server_state": method.server_state,
                "client_state": method.client_state,
                "options": _options(method.options),
            }
        )
    return entries


def _options(options: Any) -> dict[str, dict[str, Any]]:
    """Return default, type and meaning of every option; bounds and choices are in the type."""
    properties = options.model_json_schema().get("properties", {})
    meanings = _meanings(options)
    return {
        name: {
            "default": field.default,
            "type": _type(properties[name]),
            "meaning": meanings.get(name, ""),
        }
        for name, field in options.model_fields.items()
    }


_ATTRIBUTE = re.compile(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def _meanings(options: type) -> dict[str, str]:
    """Return what the docstrings of a type, and of those it inherits from, say of attributes."""
    found: dict[str, str] = {}
    for parent in reversed(options.__mro__):
        _, _, attributes = (inspect.cleandoc(parent.__doc__ or "")).partition("Attributes:\n")
        for names, meaning in _ATTRIBUTE.findall(attributes):
            found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


_JSON_TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return ", ".join([_JSON_TYPES[schema["type"]], *bounds])


def tasks() -> Entries:
    """Describe every task with a name: shipped ones, then those that papers name."""
    from common.published_tasks import METRIC, PUBLISHED_TASKS
    from common.tasks import SHIPPED_TASKS

    shipped = [{"name": name, "summary": task.summary} for name, task in SHIPPED_TASKS.items()]
    published = [
        {
            "name": name,
            "summary": task.summary,
            "hub": task.hub,
            "part": task.part,
            "verified": task.verified,
            "splits": dict(task.splits),
            "classes": task.classes,
            "examples": task.examples or None,
            "metric": METRIC,
        }
        for name, task in PUBLISHED_TASKS.items()
    ]
    return [*shipped, *published]


def backbones() -> Entries:
    """Describe every backbone with a name."""
    from common.backbones import SHIPPED_BACKBONES

    return [
        {"name": name, "kind": backbone.kind, "summary": backbone.summary}
        for name, backbone in SHIPPED_BACKBONES.items()
    ]


# How they are printed.


def one_line_each(entries: Entries) -> str:
    """Write names and summaries."""
    width = max(len(entry["name"]) for entry in entries)
    return "\n".join(f"{entry['name']:<{width}}  {entry['summary']}" for entry in entries)


# What a strategy can do: its heading in the table, and what yes means.
ABILITIES: Mapping[str, tuple[str, str]] = {
    "unequal_ranks": ("ranks", "clients may have adapters of different ranks"),
    "by_task": ("tasks", "clients may hold different tasks"),
    "secure_aggregation": ("secure", "the server needs no more than sums over clients"),
    "noise": (
        "noise",
        "noise on what clients send enters the delta linearly, as differential privacy wants it",
    ),
}

SERVED: Mapping[str, str] = {
    "exact": "the served delta is the mean of the clients' deltas, up to rounding",
    "best rank r": "the best approximation of that mean at the adapter's rank",
    "inexact": "something else, by design or because factors are averaged apart",
    "personal": "every client has a model of its own; there is no single one",
}

WEIGHTINGS: Mapping[str, str] = {
    "examples": "clients count by their number of examples",
    "equal": "clients count alike",
    "norms": "clients count by the norms of their deltas",
}


def table_of_strategies(entries: Entries) -> str:
    """Write what strategies can do: a line of columns, then a sentence, within 120 columns."""
    headings = ("strategy", "serves", "up", "down", "weights", *(h for h, _ in ABILITIES.values()))
    rows = [headings, *(_cells(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    lines = [_padded(headings, widths)]
    for entry, row in zip(entries, rows[1:], strict=True):
        lines += [
            _padded(row, widths),
            *textwrap.wrap(
                _sentence(entry), WIDTH, initial_indent="    ", subsequent_indent="    "
            ),
        ]
    return "\n".join([*lines, "", _symbols()])


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        entry["name"],
        entry["served"],
        *map(_tight, entry["cost"].values()),
        entry["weighting"],
        *("yes" if entry[ability] else "-" for ability in ABILITIES),
    )


def _tight(formulas: str) -> str:
    return " then ".join(part.replace(" ", "") for part in formulas.split(", then "))


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def _sentence(entry: Mapping[str, Any]) -> str:
    return "; ".join(
        [
            entry["summary"] + (f" [{entry['citation']}]" if entry["citation"] else ""),
            f"adapters: {', '.join(entry['adapters'])}",
            *_needs(entry),
        ]
    )


def _needs(entry: Mapping[str, Any]) -> list[str]:
    """Return what is kept beside the model, and what local training has to be."""
    kinds = {
        "server_state": "server keeps",
        "client_state": "client keeps",
        "optimiser": "needs train.optimiser =",
    }
    return [f"{words} {entry[key]}" for key, words in kinds.items() if entry[key]]


def _symbols() -> str:
    from strategies.cost import NAMES

    blocks = {
        "serves: what the served model is of the mean of the clients' models": SERVED,
        "up, down: numbers of one client in a round, from round 2 on": NAMES,
        "weights: what clients count by": WEIGHTINGS,
        "yes:": dict(ABILITIES.values()),
    }
    width = max(len(name) for meanings in blocks.values() for name in meanings)
    lines = []
    for heading, meanings in blocks.items():
        lines += [heading, *(f"    {name:<{width}}  {text}" for name, text in meanings.items())]
    return "\n".join(lines)


@dataclass(frozen=True)
class Catalogue:
    """One list: its entries, as `--json` prints them, and how people read them."""

    entries: Callable[[], Entries]
    write: Callable[[Entries], str] = one_line_each


CATALOGUES: Mapping[str, Catalogue] = {
    "strategies": Catalogue(strategies, table_of_strategies),
    "tasks": Catalogue(tasks),
    "backbones": Catalogue(backbones),
}


def page_of_strategies() -> str:
    """Return `docs/strategies.md`."""
    from strategies.cost import NAMES

    entries = strategies()
    cells = [_cells(entry) for entry in entries]
    headings = ("Strategy", "Serves", "Up", "Down", "Weights", *(h for h, _ in ABILITIES.values()))
    blocks = [
        "# Strategies",
        "Written by `python -m server.catalogue > docs/strategies.md` from the table in "
        "`strategies/__init__.py`; edit that, not this page.",
        "## What they can do",
        _markdown_table(
            headings, [(f"`{row[0]}`", row[1], *map(_code, row[2:4]), *row[4:]) for row in cells]
        ),
        "**Serves**: what the served model is of the mean of the clients' models; where adapters "
        "may be of either kind, with LoRA.",
        _bullets(SERVED),
        "**Up, down**: numbers, not bytes, of one client in one round, from the second round on "
        "and when it takes part in every round. The common start is drawn by everyone and never "
        "travels; a client that was absent is sent what it missed; compression comes on top. "
        "“X, then Y” take turns, round by round.",
        _bullets({f"`{name}`": meaning for name, meaning in NAMES.items()}),
        "**Weights**: what clients count by in the merge.",
        _bullets(WEIGHTINGS),
        "**Yes** in the other columns:",
        _bullets(dict(ABILITIES.values())),
        "## One by one",
        *(_about(entry) for entry in entries),
    ]
    return "\n\n".join(blocks) + "\n"


def _about(entry: Mapping[str, Any]) -> str:
    sentence = entry["summary"][0].upper() + entry["summary"][1:]
    facts = [f"Adapters: {', '.join(entry['adapters'])}", *_needs(entry)]
    cited = f" {entry['citation']}." if entry["citation"] else ""
    parts = [
        f"### {entry['name']}",
        f"{sentence}.{cited} {'. '.join(fact[0].upper() + fact[1:] for fact in facts)}.",
    ]
    if entry["options"]:
        rows = [
            (
                f"`strategy.{entry['name']}.{name}`",
                option["type"],
                f"`{option['default']}`",
                option["meaning"],
            )
            for name, option in entry["options"].items()
        ]
        parts.append(_markdown_table(("Option", "Type", "Default", "Meaning"), rows))
    return "\n\n".join(parts)


def _code(formula: str) -> str:
    return ", then ".join(f"`{part}`" for part in formula.split(" then "))


def _bullets(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {meaning}" for name, meaning in meanings.items())


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar inside a cell would end it.
    written = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in written]
    return "\n".join([lines[0], "|" + " --- |" * len(headings), *lines[1:]])


if __name__ == "__main__":
    print(page_of_strategies(), end="")
