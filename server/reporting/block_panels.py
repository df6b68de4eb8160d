"""Panels of `fedcopra shapley` and `fedcopra prune`: what the parts of an adapter are worth."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.reporting.drawing import (
    MUTED,
    SERIES,
    TEXT,
    Line,
    Mark,
    draw,
    marks,
    paint_lines,
    square,
)
from server.reporting.figures import Key, Panel
from server.reporting.wording import percent, points, rough_percent, shortened, spoken

Analysis = Mapping[str, Any]
Estimate = Mapping[str, Any]

# A gain or a difference within this many standard errors is not called one.
ERRORS = 2


# Shapley values.


def shapley_panels(analysis: Analysis) -> list[Panel]:
    """Return one panel for each kind of players whose values there are."""
    return [_value_panel(found) for found in analysis.values()]


def _value_panel(found: Analysis) -> Panel:
    players, rows = found["players"], found["values"]
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    inks = {kind: SERIES[number % len(SERIES)] for number, kind in enumerate(kinds)}
    thickness = 0.72 / len(kinds)

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for row in rows:
            offset = (kinds.index(row["kind"]) - (len(kinds) - 1) / 2) * thickness
            axes.barh(
                blocks.index(row["block"]) + offset,
                row["minus_loss"]["value"],
                0.9 * thickness,
                color=inks[row["kind"]],
                xerr=_whisker(row["minus_loss"]),
                error_kw={"ecolor": TEXT, "elinewidth": 1.4, "capsize": 2.5},
            )
        axes.set_yticks(range(len(blocks)), [shortened(block, 22) for block in blocks])
        axes.set_ylim(len(blocks) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="loss that it takes away, nats")

    sampled = found["orders"] is not None
    how = (
        f"From {found['coalitions']} sets of {players} along {found['orders']} random orders, "
        "each with its reverse"
        if sampled
        else f"From all {found['coalitions']} sets of {players}"
    )
    name = f"shapley-{players}-{found['digest'][:8]}"
    columns, numbers = value_rows(found)
    return Panel(
        name=name,
        heading=f"Which {players} is the gain of the adapters owed to?",
        shows=f"{found['label']}, seed {found['seed']}: the Shapley value of each "
        f"{players.removesuffix('s')}, counted from 0, which is how much loss its adapters take "
        f"away on {found['examples']} {found['split']} examples, mean over the orders in which "
        "they could be added to the frozen model with its trained head. "
        f"{how}. Whiskers: one standard error, from the choice of examples"
        f"{' and of orders' if sampled else ''}. The values sum to the whole gain by definition: "
        "they say how parts that were trained together share it, not what a part would learn "
        "alone.",
        conclusion=f"{_whole_gain(found)} {_concentration(found)}".strip(),
        drawing=draw(
            name,
            f"Shapley values of {players}",
            paint,
            height=0.75 + len(blocks) * max(0.27, 0.17 * len(kinds)),
        ),
        legend=[Key(kind, square(ink)) for kind, ink in inks.items() if kind],
        columns=columns,
        numbers=numbers,
    )


def value_rows(found: Analysis) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and rows of a table of values, errors and shares."""
    gain = found["gain"]["minus_loss"]
    what = found["players"].removesuffix("s").capitalize()
    return (what, "Loss, nats", "error", "share", "Accuracy, points", "error"), [
        [
            row["player"],
            _nats(row["minus_loss"]["value"]),
            f"{_whisker(row['minus_loss']):.4f}",
            # With no gain there are no shares of it.
            percent(row["minus_loss"]["value"] / gain, 0) if _is_gain(found) else "–",
            points(row["accuracy"]["value"], unit=False),
            points(_whisker(row["accuracy"]), sign=False, unit=False),
        ]
        for row in found["values"]
    ]


def _whisker(value: Mapping[str, float]) -> float:
    """Return the standard error from rows and orders together."""
    return math.hypot(value["row_error"], value["sampling_error"])


def _is_gain(found: Analysis) -> bool:
    return bool(found["gain"]["minus_loss"] > ERRORS * found["gain_row_error"]["minus_loss"])


def _whole_gain(found: Analysis) -> str:
    none, everyone = found["none"], found["all"]
    change = (
        f"from {-none['minus_loss']:.3f} to {-everyone['minus_loss']:.3f} nats, and accuracy goes "
        f"from {percent(none['accuracy'])} to {percent(everyone['accuracy'])}."
    )
    if _is_gain(found):
        return f"All adapters together take the loss {change}"
    return (
        f"The loss goes {change} That is no gain beyond two standard errors, so there is little "
        "to share out."
    )


def _concentration(found: Analysis) -> str:
    """Say what share the top third holds; nothing where there is no gain to have a share of."""
    if not _is_gain(found):
        return ""
    players = found["players"]
    ordered = sorted(found["values"], key=lambda row: -row["minus_loss"]["value"])
    top = math.ceil(len(ordered) / 3)
    held = sum(row["minus_loss"]["value"] for row in ordered[:top]) / found["gain"]["minus_loss"]
    said = (
        f"The top {top} of {len(ordered)} {players} ({spoken([r['player'] for r in ordered[:top]])}"
        f") hold {percent(held, 0)} of the value; spread evenly it would be "
        f"{percent(top / len(ordered), 0)}. They are the top on the examples that value them, "
        "which flatters them a little."
    )
    harmful = [
        row["player"]
        for row in ordered
        if row["minus_loss"]["value"] < -ERRORS * _whisker(row["minus_loss"])
    ]
    return f"{said} Below zero beyond two standard errors: {spoken(harmful)}." if harmful else said


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


# Pruning.


def pruning_panels(analysis: Analysis) -> list[Panel]:
    """Return what is left by parts kept, by blocks kept in order of value, and by sparsity."""
    sparsity = [_sparsity_panel(analysis)] if _family(analysis, "sparsity") else []
    return [_parts_panel(analysis), _best_blocks_panel(analysis), *sparsity]


def _parts_panel(analysis: Analysis) -> Panel:
    cuts = _family(analysis, "parts")
    chosen = _marks(analysis)
    labels = list(chosen)
    step = 0.4 / max(1, len(labels) - 1)

    def paint(axes: Axes) -> None:
        for number, (label, mark) in enumerate(chosen.items()):
            shift = 0.0 if len(labels) == 1 else -0.2 + number * step
            found = [
                (row + shift, cut["scores"][label]["accuracy"])
                for row, cut in enumerate(cuts)
                if label in cut["scores"]
            ]
            axes.errorbar(
                [score["mean"] for _, score in found],
                [row for row, _ in found],
                xerr=[score["error"] for _, score in found],
                linestyle="none",
                marker=mark.marker or "|",
                markersize=6,
                color=mark.ink,
                elinewidth=1.4,
            )
        axes.set_yticks(range(len(cuts)), [shortened(cut["name"], 22) for cut in cuts])
        axes.set_ylim(len(cuts) - 0.4, -0.6)
        axes.set(xlabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    name = f"pruning-parts-{analysis['digest'][:8]}"
    return Panel(
        name=name,
        heading="How good is the model with only a part of its adapters?",
        shows=f"Accuracy on {_examples(analysis)} when only the adapters named on the left are "
        "kept; the frozen model and its trained head always stay, and nothing is trained again. "
        "Low is next to the input. Every other block once from the first on, once from the "
        f"second. Whiskers: {_whiskers(analysis)}.{_paired(analysis)}",
        conclusion=" ".join(
            [
                *(_left_of(analysis, label) for label in labels),
                *_verdicts(analysis, cuts),
                *_of_the_heads(analysis),
                *_caution(analysis),
            ]
        ),
        drawing=draw(
            name,
            "Accuracy by the adapters that are kept",
            paint,
            height=0.75 + len(cuts) * max(0.28, 0.13 * len(labels)),
        ),
        legend=_legend(analysis, chosen),
        **_table(analysis, cuts),
    )


def _best_blocks_panel(analysis: Analysis) -> Panel:
    cuts = _family(analysis, "shapley")
    heading = "How many blocks are needed, the most valuable first?"
    notes = [note for note in analysis["notes"] if "Shapley" in note]
    name = f"pruning-shapley-{analysis['digest'][:8]}"
    if not cuts:
        return Panel(name, heading, "", " ".join(notes))
    ends = {cut["name"]: cut for cut in _family(analysis, "parts")}
    sizes = {row["label"]: row["blocks"] for row in analysis["labels"]}
    lines, fewest = [], []
    called = _called(analysis)
    for label, mark in _marks(analysis).items():
        kept = [(cut["amount"], cut) for cut in cuts if label in cut["scores"]]
        if not kept:
            continue
        kept = [(0, ends["none"]), *kept, (sizes[label], ends["all"])]
        lines.append(_line(label, mark, kept))
        enough = next(k for k, cut in kept if not _is_worse(cut["changes"][label]["accuracy"]))
        fewest.append(f"{called[label]} {enough} of {sizes[label]}")
    return Panel(
        name=name,
        heading=heading,
        shows=f"Accuracy on {_examples(analysis)} with the adapters of the best blocks only, by "
        "Shapley values found on validation examples: none on the left, all on the right. Bands: "
        f"{_whiskers(analysis)}. {' '.join(notes)}".strip(),
        conclusion="Fewest blocks at which no loss of accuracy against all of them is shown, at "
        f"two standard errors: {'; '.join(fewest)}. Whoever prunes by this has chosen on these "
        f"examples, and should confirm on others. {' '.join(_verdicts(analysis, cuts))}".strip(),
        drawing=_curves(name, "Accuracy by blocks kept", lines, "blocks kept", whole=True),
        legend=_legend(analysis, {line.label: line.mark for line in lines}),
        **_table(analysis, cuts),
    )


def _sparsity_panel(analysis: Analysis) -> Panel:
    cuts = _family(analysis, "sparsity")
    ends = {cut["name"]: cut for cut in _family(analysis, "parts")}
    chosen = _marks(analysis)
    points_of = [(0, ends["all"]), *((cut["amount"], cut) for cut in cuts), (1, ends["none"])]
    lines = [_line(label, mark, points_of) for label, mark in chosen.items()]
    sparsest, called = cuts[-1], _called(analysis)
    lost = [
        f"{called[label]} {_change(change['accuracy'])}"
        for label, change in sparsest["changes"].items()
    ]
    saves = list(dict.fromkeys(rough_percent(row["break_even"]) for row in analysis["labels"]))
    name = f"pruning-sparsity-{analysis['digest'][:8]}"
    return Panel(
        name=name,
        heading="How many entries of the adapter's delta are needed?",
        shows=f"Accuracy on {_examples(analysis)} with the smallest entries of the delta sBA set "
        "to zero, by magnitude over all modules together; 0% is the whole adapter, 100% none. "
        "By which criterion the paper prunes is not known. "
        f"Bands: {_whiskers(analysis)}.",
        conclusion=f"With {percent(sparsest['amount'], 0)} of the entries zero, against all of "
        f"them: {'; '.join(lost)}. A delta takes fewer numbers than its two factors only with "
        f"more than {spoken(saves)} zeros: below that this says how robust the delta is, and "
        f"saves nothing. {' '.join(_verdicts(analysis, cuts))}".strip(),
        drawing=_curves(name, "Accuracy by sparsity", lines, "entries set to zero", whole=False),
        legend=_legend(analysis, chosen),
        **_table(analysis, cuts),
    )


def _curves(name: str, title: str, lines: Sequence[Line], below: str, *, whole: bool) -> str:
    def paint(axes: Axes) -> None:
        paint_lines(axes, lines)
        axes.set(xlabel=below, ylabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=whole))
        if not whole:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    return draw(name, title, paint)


def _family(analysis: Analysis, family: str) -> list[Analysis]:
    return [cut for cut in analysis["cuts"] if cut["family"] == family]


def _marks(analysis: Analysis) -> dict[str, Mark]:
    return marks(
        {row["label"]: [{"strategy": {"control": row["control"]}}] for row in analysis["labels"]}
    )


def _called(analysis: Analysis) -> dict[str, str]:
    """Return what labels are called here: without the settings that all of them begin with."""
    labels = [row["label"] for row in analysis["labels"]]
    parts = [label.split(" · ") for label in labels]
    shared = 0
    if len(parts) > 1:
        # The last part of every label stays.
        columns = zip(*(row[:-1] for row in parts), strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    return {label: " · ".join(row[shared:]) for label, row in zip(labels, parts, strict=True)}


def _legend(analysis: Analysis, chosen: Mapping[str, Mark]) -> list[Key]:
    """Return the legend, of which one label has no need."""
    called = _called(analysis)
    drawn = [Key(called[label], mark.swatch()) for label, mark in chosen.items()]
    return drawn if len(drawn) > 1 else []


def _line(label: str, mark: Mark, kept: Sequence[tuple[float, Analysis]]) -> Line:
    found = [(x, cut["scores"][label]["accuracy"]) for x, cut in kept]
    return Line(
        label,
        mark,
        [x for x, _ in found],
        [score["mean"] for _, score in found],
        [score["mean"] - score["error"] for _, score in found],
        [score["mean"] + score["error"] for _, score in found],
    )


def _examples(analysis: Analysis) -> str:
    rows = dict.fromkeys(f"{row['examples']} {row['split']}" for row in analysis["labels"])
    seeds = sorted({seed for row in analysis["labels"] for seed in row["seeds"]})
    numbered = f"seed{'s' if len(seeds) > 1 else ''} {spoken([str(seed) for seed in seeds])}"
    return f"{spoken(list(rows))} examples ({numbered})"


def _whiskers(analysis: Analysis) -> str:
    several = any(len(row["seeds"]) > 1 for row in analysis["labels"])
    return "one standard error, over examples" + (" and seeds" if several else "")


def _paired(analysis: Analysis) -> str:
    if len(analysis["labels"]) == 1 or not analysis["same_rows"]:
        return ""
    return " Differences are taken example by example: one may show where whiskers overlap."


def _change(estimate: Estimate) -> str:
    return f"{points(estimate['mean'])} (SE {points(estimate['error'], sign=False, unit=False)})"


def _is_worse(estimate: Estimate) -> bool:
    return bool(estimate["beyond"] and estimate["mean"] < 0)


def _left_of(analysis: Analysis, label: str) -> str:
    """Say what one label has with all, with none, and where parts cost it most and least."""
    cuts = {cut["name"]: cut for cut in _family(analysis, "parts") if label in cut["scores"]}
    whole, none = (cuts[end]["scores"][label]["accuracy"]["mean"] for end in ("all", "none"))
    said = (
        f"{_called(analysis)[label]}: {percent(whole)} with all adapters, {percent(none)} with none"
    )
    partial = {n: c["changes"][label]["accuracy"] for n, c in cuts.items() if n not in _ENDS}
    if not partial:
        return f"{said}."
    best = max(partial, key=lambda cut: partial[cut]["mean"])
    worst = min(partial, key=lambda cut: partial[cut]["mean"])
    return (
        f"{said}; of the parts kept alone, {best} comes nearest to all, {_change(partial[best])}, "
        f"and {worst} is farthest, {_change(partial[worst])}."
    )


_ENDS = ("all", "none")


def _verdicts(analysis: Analysis, cuts: Sequence[Analysis]) -> list[str]:
    """Say where other labels differ from the first."""
    called = _called(analysis)
    reference, *others = called
    if others and not analysis["same_rows"]:
        return ["The runs are scored on different examples: no difference between them is taken."]
    said = []
    for label in others:
        found = {
            cut["name"]: cut["differences"][label]["accuracy"]
            for cut in cuts
            if label in cut["differences"]
        }
        ahead = [name for name, d in found.items() if d["beyond"] and d["mean"] > 0]
        behind = [name for name, d in found.items() if d["beyond"] and d["mean"] < 0]
        ways = {"ahead": ahead, "behind": behind}
        parts = [f"is {way} with {spoken(names)}" for way, names in ways.items() if names]
        rest = len(found) - len(ahead) - len(behind)
        if found and not parts:
            parts = [f"differs from it in none of the {len(found)} rows"]
        elif rest:
            parts.append(f"no difference is shown in the other {rest}")
        if parts:
            said.append(
                f"Against {called[reference]}, beyond two standard errors, {called[label]} "
                f"{', and '.join(parts)}."
            )
    return said


def _of_the_heads(analysis: Analysis) -> list[str]:
    """Say how much of the differences there is without any adapter."""
    (none,) = (cut for cut in _family(analysis, "parts") if cut["name"] == "none")
    called = _called(analysis)
    return [
        f"With no adapter at all {called[label]} differs by {_change(found['accuracy'])}: heads "
        "were trained beside adapters, and what heads do alone is no merit of pruned adapters."
        for label, found in none["differences"].items()
        if found["accuracy"]["beyond"]
    ]


def _caution(analysis: Analysis) -> list[str]:
    """Say what to hold against differences between labels, where any are taken."""
    looked_at = sum(len(cut["differences"]) for cut in analysis["cuts"])
    if not looked_at:
        return []
    fewest = min(len(row["seeds"]) for row in analysis["labels"])
    seeds = (
        "One seed is one seed: with another a difference may turn round, and errors over examples "
        "do not know that."
        if fewest == 1
        else f"With {fewest} seeds two standard errors are less than a 95% interval."
    )
    return [
        f"{seeds} Of the {looked_at} differences that these figures look at, about one in twenty "
        "lies beyond two errors by chance."
    ]


def pruning_rows(analysis: Analysis) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and rows of a table of all cuts, by accuracy; labels are numbered from 1."""
    numbers = {row["label"]: str(n) for n, row in enumerate(analysis["labels"], start=1)}
    found = _table(analysis, analysis["cuts"], numbers, losses=False)
    return found["columns"], found["numbers"]


def _table(
    analysis: Analysis,
    cuts: Sequence[Analysis],
    called: Mapping[str, str] | None = None,
    *,
    losses: bool = True,
) -> dict[str, Any]:
    """Return the numbers: scores and changes of every label, and differences to the first."""
    names = called or _called(analysis)
    reference, *others = names
    compared = others if analysis["same_rows"] else []
    columns = ["Kept"]
    for name in names.values():
        columns += [name, "less all, points", *(["loss"] if losses else [])]
    columns += [f"{names[label]} less {names[reference]}, points" for label in compared]
    rows = []
    for cut in cuts:
        row = [_with_blocks(cut) if losses else cut["name"]]
        for label in names:
            row += _cells(cut, label, losses=losses)
        row += [_cell(cut["differences"].get(label)) for label in compared]
        rows.append(row)
    return {"columns": columns, "numbers": rows}


def _cells(cut: Analysis, label: str, *, losses: bool) -> list[str]:
    scores = cut["scores"].get(label)
    if scores is None:
        return ["–"] * (2 + losses)
    change = None if cut["name"] == "all" else cut["changes"][label]
    loss = scores["loss"]["mean"]
    written = "–" if loss is None else f"{loss:.3f}"
    return [percent(scores["accuracy"]["mean"]), _cell(change), *([written] if losses else [])]


def _cell(difference: Analysis | None) -> str:
    if difference is None:
        return "–"
    found = difference["accuracy"]
    return f"{points(found['mean'], unit=False)} ± {points(found['error'], sign=False, unit=False)}"


def _with_blocks(cut: Analysis) -> str:
    """Return the name, with the numbers of the blocks where a part of them is kept whole."""
    if not cut["blocks"] or len(cut["blocks"]) == cut["of"]:
        return str(cut["name"])
    return f"{cut['name']} ({', '.join(block.removeprefix('block ') for block in cut['blocks'])})"
