"""Panels of soft prompts: their norms while they train, and what `fedcopra low-norm` has found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.reporting.comparison import Groups, Record
from server.reporting.drawing import (
    MUTED,
    SERIES,
    TEXT,
    Cells,
    Line,
    Mark,
    draw,
    marks,
    paint_cells,
    paint_lines,
    square,
)
from server.reporting.figures import Key, Panel, legend_of, score_line
from server.reporting.pan_panels import selection_panels
from server.reporting.prompt_maps import KINDS, MAPS, Kind, drawn_map, first_and_last, shades_of
from server.reporting.wording import count_of, percent, points, shortened, spoken

Analysis = Mapping[str, Any]
Estimate = Mapping[str, Any]
Drift = Mapping[str, Any]

# Averaging that takes less than this share off the norms leaves nothing to give back.
LITTLE = 0.01


# Norms over the rounds, from the records alone.


def prompt_panels(groups: Groups) -> list[Panel]:
    """Return norms by round, norms by position, and what averaging did; nothing without prompts."""
    chosen = marks(groups)
    found: list[Panel] = []
    for kind in KINDS:
        held = {k: members for k, members in groups.items() if _in_every_seed(members, kind)}
        if held:
            found += [
                _norm_panel(held, chosen, kind),
                *_position_panels(held, kind),
                *selection_panels(held, chosen, kind),
                *_drift_panels(held, chosen, kind),
            ]
    return found


def _drifts(record: Record, kind: Kind) -> dict[int, list[Drift]]:
    """Return what each round that merged anything has measured of these prompts."""
    by_round = {
        entry["round"]: [
            drift for name, drift in (entry.get("prompts") or {}).items() if kind.holds(name)
        ]
        for entry in record["rounds"]
    }
    return {number: drifts for number, drifts in by_round.items() if drifts}


def _in_every_seed(members: Sequence[Record], kind: Kind) -> list[int]:
    """Return the rounds that every seed has measured."""
    seen = [_drifts(record, kind) for record in members]
    return [number for number in seen[0] if all(number in seed for seed in seen)]


def _served_norms(drifts: Sequence[Drift]) -> list[float] | None:
    """Return the norm of every served vector; None where there is no single served prompt."""
    if any(drift["norm"] is None for drift in drifts):
        return None
    return [norm for drift in drifts for norm in drift["norm"]]


def _norm_line(label: str, members: Sequence[Record], mark: Mark, kind: Kind) -> Line:
    """Return mean norms over vectors and seeds; low and high are those of any vector."""
    line = Line(label, mark)
    seen = [_drifts(record, kind) for record in members]
    for number in _in_every_seed(members, kind):
        norms = [_served_norms(seed[number]) for seed in seen]
        known = [of_seed for of_seed in norms if of_seed is not None]
        if len(known) == len(norms):
            line.x.append(number)
            line.mean.append(fmean(map(fmean, known)))
            line.low.append(min(map(min, known)))
            line.high.append(max(map(max, known)))
    return line


def _norm_panel(groups: Groups, chosen: Mapping[str, Mark], kind: Kind) -> Panel:
    lines = {k: _norm_line(k, members, chosen[k], kind) for k, members in groups.items()}
    lines = {label: line for label, line in lines.items() if line.x}
    unserved = [label for label in groups if label not in lines]
    apart = f" No single prompt is served by {spoken(unserved)}." if unserved else ""
    heading = "Do the norms of the prompt's vectors grow, and does accuracy follow?"
    name = f"prompt-norms{kind.suffix}"
    if not lines:
        return Panel(name, heading, "", f"Every client has a prompt of its own.{apart}")
    drawn = {label: groups[label] for label in lines}
    scores = [score_line(label, drawn[label], chosen[label], "accuracy") for label in drawn]

    def paint(above: Axes, below: Axes) -> None:
        paint_lines(above, lines.values())
        paint_lines(below, scores)
        above.set(ylabel="mean norm")
        below.set(xlabel="round", ylabel="accuracy")
        below.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        above.yaxis.set_major_locator(MaxNLocator(6))
        below.yaxis.set_major_locator(MaxNLocator(4))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    several = any(len(members) > 1 for members in drawn.values())
    over = " of any seed" if several else ""
    return Panel(
        name=name,
        heading=heading,
        shows=f"{kind.called}. Above: the mean Euclidean norm of the served vectors after each "
        f"round{' (mean over seeds)' if several else ''}; band: from the shortest to the longest "
        f"vector{over}. Below: accuracy on the same rounds, from the start on"
        f"{'; band: from the lowest to the highest seed' if several else ''}.{apart}",
        conclusion=_growth(lines),
        drawing=draw(name, "Norms and accuracy by round", paint, height=4.2, rows=(1.7, 1.0)),
        legend=legend_of(drawn, chosen),
        columns=("Method", "Norm, first", "last", "shortest", "longest", "Accuracy, last"),
        numbers=[
            [
                label,
                *(f"{x:.4g}" for x in (line.mean[0], line.mean[-1], line.low[-1], line.high[-1])),
                percent(score.mean[-1] if score.mean else None),
            ]
            for (label, line), score in zip(lines.items(), scores, strict=True)
        ],
    )


def _growth(lines: Mapping[str, Line]) -> str:
    """Say how far the norms went, of all labels or of those that end shortest and longest."""
    order = sorted(lines, key=lambda label: lines[label].mean[-1])
    named = list(lines) if len(lines) <= MAPS else [order[0], order[-1]]
    said = []
    for label in named:
        line = lines[label]
        first, last = line.mean[0], line.mean[-1]
        plus = "+" if last > first else ""
        grown = f", {plus}{percent(last / first - 1)}" if len(line.x) > 1 and first else ""
        said.append(
            f"{label} {first:.3g} after round {line.x[0]:g}, {last:.3g} after the last{grown}"
        )
    rest = len(lines) - len(named)
    between = f" The other {rest} end between these two." if rest else ""
    return (
        f"Mean norms: {'; '.join(said)}.{between} That norms and accuracy move together would not "
        "show that one moves the other."
    )


def _position_panels(groups: Groups, kind: Kind) -> list[Panel]:
    """Return a map of norms by position and round of the first run of a few labels."""
    by_position = {
        label: found
        for label, members in groups.items()
        if (found := _norms_by_position(members[0], kind)) is not None
    }
    shown = dict(islice(by_position.items(), MAPS))
    if not shown:
        return []
    every = np.concatenate([norms.ravel() for norms in shown.values()])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    return [
        _position_panel(groups[label][0], norms, (low, high), f"{kind.suffix}-{number}", kind)
        for number, (label, norms) in enumerate(shown.items())
    ]


def _norms_by_position(record: Record, kind: Kind) -> Cells | None:
    """Return (positions, rounds) served norms, mean over prompts, classes, blocks and tasks.

    NaN in rounds without a merge; None where there is no single served prompt.
    """
    seen = _drifts(record, kind)
    rounds = [entry["round"] for entry in record["rounds"]]
    columns = {}
    for number, drifts in seen.items():
        if _served_norms(drifts) is None:
            return None
        rows = [np.reshape(drift["norm"], (-1, drift["positions"][-1])) for drift in drifts]
        columns[number] = np.concatenate(rows).mean(axis=0)
    blank = np.full_like(next(iter(columns.values())), math.nan)
    return np.stack([columns.get(number, blank) for number in rounds], axis=1)


def _position_panel(
    record: Record, norms: Cells, ends: tuple[float, float], suffix: str, kind: Kind
) -> Panel:
    rounds = [entry["round"] for entry in record["rounds"]]
    last = norms[:, ~np.isnan(norms).any(axis=0)][:, -1]
    longest, shortest = int(last.argmax()), int(last.argmin())
    apart = float((last.max() - last.min()) / last.mean())
    name = f"prompt-norms-by-position{suffix}"
    return Panel(
        name=name,
        heading="Which positions have long vectors?",
        shows=f"{kind.called}, {record['label']}, seed {record['seed']}: the norm of the served "
        "vector by position (rows, from 0) and round (columns), mean over classes, prompts and "
        "blocks where there are several. Shades run from the shortest to the longest of all such "
        "maps here.",
        conclusion=f"With {record['label']} position {longest} ends with the longest "
        f"vector ({last[longest]:.3g}) and position {shortest} the shortest "
        f"({last[shortest]:.3g}): they are {percent(apart, 0)} of the mean norm apart."
        if len(norms) > 1
        else f"With {record['label']} the one position's vector ends with norm {last[0]:.3g}.",
        drawing=drawn_map(name, "Norms by position and round", norms, ends, rounds),
        legend=shades_of(ends, lambda norm: f"{norm:.3g}"),
        columns=("Position", *(f"round {n}" for n in first_and_last(rounds))),
        numbers=[
            [str(position), *(_plain(row[at]) for at in first_and_last(range(len(rounds))))]
            for position, row in enumerate(norms)
        ],
    )


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


# What averaging does.


@dataclass(frozen=True)
class Averaging:
    """What a label's rounds measured of averaging: a line each, means over positions.

    Attributes:
        shrink: σ, the norm of the mean over the mean of the norms.
        resultant: R, the length of the mean direction.
        apart: √D, how far clients are from their mean, as a root mean square.
        moved: mean over clients of the distance from what they were sent, all positions together.
    """

    shrink: Line
    resultant: Line
    apart: Line
    moved: Line


def _drift_panels(groups: Groups, chosen: Mapping[str, Mark], kind: Kind) -> list[Panel]:
    """Return how far clients agree, of labels with at least two of them in a round."""
    found = {
        label: averaging
        for label, members in groups.items()
        if (averaging := _averaging(label, members, chosen[label], kind)).shrink.x
    }
    if not found:
        return []

    def paint(*all_axes: Axes) -> None:
        measured = ("shrink", "resultant", "apart")
        for axes, quantity, symbol in zip(all_axes, measured, ("σ", "R", "√D"), strict=True):
            paint_lines(axes, [getattr(averaging, quantity) for averaging in found.values()])
            axes.set(ylabel=symbol)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        all_axes[-1].set(xlabel="round")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(7, integer=True))

    drawn = {label: groups[label] for label in found}
    several = any(len(members) > 1 for members in drawn.values())
    name = f"prompt-drift{kind.suffix}"
    return [
        Panel(
            name=name,
            heading="How much does averaging take off the norms?",
            shows=f"{kind.called}, means over positions, weighted by the clients' examples. σ: "
            "the norm of the mean vector over the mean of the clients' norms; R: the length of "
            "the mean of their directions; both are 1 where clients agree. √D: how far the "
            "clients' vectors are from their mean, root mean square, in units of the norm. All "
            "of the plain mean, whatever the method makes of it."
            f"{' Line: mean over seeds; band: from the lowest to the highest.' if several else ''}",
            conclusion=_shrinking(found),
            drawing=draw(
                name,
                "Shrink ratio, resultant length and drift by round",
                paint,
                height=4.6,
                rows=(1.0, 1.0, 1.0),
            ),
            legend=legend_of(drawn, chosen),
            columns=(
                "Method",
                *(f"{symbol}, {when}" for symbol in ("σ", "R", "√D") for when in ("first", "last")),
                "clients moved, last",
            ),
            numbers=[
                [
                    label,
                    *(
                        f"{line.mean[at]:.4g}"
                        for line in (averaging.shrink, averaging.resultant, averaging.apart)
                        for at in (0, -1)
                    ),
                    f"{averaging.moved.mean[-1]:.4g}",
                ]
                for label, averaging in found.items()
            ],
        )
    ]


def _averaging(label: str, members: Sequence[Record], mark: Mark, kind: Kind) -> Averaging:
    lines = Averaging(*(Line(label, mark) for _ in range(4)))
    seen = [_drifts(record, kind) for record in members]
    for number in _in_every_seed(members, kind):
        of_round = [seed[number] for seed in seen]
        ratios = [[s for d in drifts for s in d["shrink"] if s is not None] for drifts in of_round]
        shared = all(len(d["clients"]) > 1 for drifts in of_round for d in drifts)
        if not shared or not all(ratios):
            continue
        lines.shrink.add(number, [fmean(of_seed) for of_seed in ratios])
        for line, quantity in ((lines.resultant, "resultant"), (lines.apart, "drift")):
            means = [fmean(v for d in drifts for v in d[quantity]) for drifts in of_round]
            line.add(number, means if quantity == "resultant" else [math.sqrt(m) for m in means])
        lines.moved.add(
            number,
            [
                fmean(client["distance"] for d in drifts for client in d["clients"].values())
                for drifts in of_round
            ],
        )
    return lines


def _shrinking(found: Mapping[str, Averaging]) -> str:
    """Say what averaging takes off in the last round, and whether that is worth giving back."""
    taken = {label: 1 - averaging.shrink.mean[-1] for label, averaging in found.items()}
    order = sorted(taken, key=lambda label: -taken[label])
    named = order if len(order) <= MAPS else [order[0], order[-1]]
    said = spoken([f"{percent(taken[label], 2)} with {label}" for label in named])
    most = taken[order[0]]
    little = (
        f" Below {percent(LITTLE, 0)} there is next to nothing for a server's rule to give back."
        if most < LITTLE
        else ""
    )
    return f"In the last round the plain mean takes off the clients' norms: {said}.{little}"


# The Low-Norm Effect.


def low_norm_panels(analysis: Analysis) -> list[Panel]:
    """Return what corrupting vectors does, by position and of the whole prompt."""
    return [_cells_panel(analysis), _response_panel(analysis)]


def _cells_panel(analysis: Analysis) -> Panel:
    by_place = {(c["operation"], tuple(c["positions"])): c for c in analysis["cells"]}
    operations = list(dict.fromkeys(operation for operation, _ in by_place))
    places = list(dict.fromkeys(place for _, place in by_place))
    grid = [[by_place[operation, place] for place in places] for operation in operations]
    changes = np.array([[cell["change"]["mean"] for cell in row] for row in grid])
    beyond = np.argwhere([[cell["change"]["beyond"] for cell in row] for row in grid])
    largest = float(abs(changes).max())
    named = ["+".join(map(str, place)) for place in places]

    def paint(axes: Axes) -> None:
        for ink, part in ((SERIES[0], changes), (SERIES[1], -changes)):
            paint_cells(axes, np.maximum(part, 0) / (largest or 1.0), ink)
        axes.plot(beyond[:, 1], beyond[:, 0], ".", color=TEXT, markersize=5)
        step = math.ceil(len(named) / 16)
        axes.set_xticks(range(0, len(named), step), named[::step])
        axes.set_yticks(range(len(operations)), operations)
        axes.set(xlabel="position")

    name = f"low-norm-cells-{analysis['digest'][:8]}"
    columns, rows = count_rows(analysis)
    written = [
        [*row, *(points(value, unit=False) for value in line)]
        for row, line in zip(rows, changes, strict=False)
    ]
    rest = [[*row, *["–"] * len(named)] for row in rows[len(operations) :]]
    return Panel(
        name=name,
        heading="Does accuracy rise when a vector is made shorter?",
        shows=f"{_who(analysis)}: the change of accuracy when the operation on the left is done to "
        "the trained vector at one position, from 0, and nothing is trained again. replace: by "
        "random numbers of this standard deviation; rescale: times this factor; rotate: by so "
        "many degrees towards a random direction, which keeps the norm. A dot: beyond two "
        f"standard errors, paired {_pairing(analysis)}. Cells in which accuracy rises, by what "
        f"happened to the norm: {_counts_said(analysis)}. How the paper counts is not known.",
        conclusion=_effect_said(analysis),
        drawing=draw(
            name,
            "Change of accuracy by operation and position",
            paint,
            height=0.75 + 0.27 * max(len(operations), 4),
        ),
        legend=[
            Key(f"{points(sign * largest)}", square(ink))
            for sign, ink in ((1, SERIES[0]), (-1, SERIES[1]))
            if largest
        ],
        columns=(*columns, *(f"at {place}, points" for place in named)),
        numbers=[*written, *rest],
    )


EFFECTS = {
    "lowers": "lowered",
    "raises": "raised",
    "keeps": "kept",
    "mixed": "mixed",
}


def count_rows(analysis: Analysis) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and rows of rises by operation and effect on norms, and the mean changes.

    The operations stand in their order; behind them all together, and the mean change of accuracy.
    """
    operations = [*dict.fromkeys(cell["operation"] for cell in analysis["cells"]), "all"]
    counts = analysis["counts"]
    used = [effect for effect in EFFECTS if counts[effect]["change"]]
    rows = [
        [
            "all operations" if operation == "all" else operation,
            *(_ratio(counts[effect]["operations"].get(operation)) for effect in used),
        ]
        for operation in operations
    ]
    means = ["mean change, points", *(_with_error(counts[effect]["change"]) for effect in used)]
    columns = ["Operation", *(f"rises, norm {EFFECTS[effect]}" for effect in used)]
    return columns, [*rows, means]


def response_rows(analysis: Analysis) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and rows of accuracy by a factor on the whole prompt."""
    return ("Whole prompt times", "accuracy", "error, points", "less factor 1, points"), [
        [
            f"{row['factor']:g}",
            percent(row["accuracy"]["mean"]),
            points(row["accuracy"]["error"], sign=False, unit=False),
            "–" if row["factor"] == 1 else _with_error(row["change"]),
        ]
        for row in analysis["response"]
    ]


def _response_panel(analysis: Analysis) -> Panel:
    rows = analysis["response"]
    label = analysis["label"]
    mark = marks({label: [{"strategy": {"control": analysis["control"]}}]})[label]
    scores = [row["accuracy"] for row in rows]
    line = Line(
        label,
        mark,
        [row["factor"] for row in rows],
        [score["mean"] for score in scores],
        [score["mean"] - score["error"] for score in scores],
        [score["mean"] + score["error"] for score in scores],
    )

    def paint(axes: Axes) -> None:
        axes.axvline(1, color=MUTED, linewidth=0.8, dashes=(2, 3))
        paint_lines(axes, [line])
        axes.set(xlabel="factor on the whole prompt", ylabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    name = f"low-norm-response-{analysis['digest'][:8]}"
    columns, numbers = response_rows(analysis)
    return Panel(
        name=name,
        heading="Does the scale of the whole prompt matter?",
        shows=f"{_who(analysis)}: accuracy when all vectors of the trained prompt are multiplied "
        "by the same factor. Upright line: the prompt as it was trained. Band: one standard "
        f"error, over {_over(analysis)}.",
        conclusion=_response_said(rows),
        drawing=draw(name, "Accuracy by factor on the whole prompt", paint),
        columns=columns,
        numbers=numbers,
    )


def _response_said(rows: Sequence[Analysis]) -> str:
    best = max(rows, key=lambda row: row["change"]["mean"])
    other = [row for row in rows if row["factor"] != 1 and row["change"]["beyond"]]
    ways = {
        "higher": [f"{row['factor']:g}" for row in other if row["change"]["mean"] > 0],
        "lower": [f"{row['factor']:g}" for row in other if row["change"]["mean"] < 0],
    }
    parts = [f"{way} at {spoken(factors)}" for way, factors in ways.items() if factors]
    differs = (
        f"Beyond two paired standard errors accuracy is {' and '.join(parts)}."
        if parts
        else "At no other factor does accuracy differ beyond two paired standard errors."
    )
    highest = (
        "It is highest at the factor 1."
        if not best["change"]["mean"]
        else f"It is highest at {best['factor']:g}, by {_change(best['change'])}; whoever takes "
        "that factor has chosen on these examples, and should confirm on others."
    )
    return f"{differs} {highest}"


def _who(analysis: Analysis) -> str:
    seeds = [str(seed) for seed in analysis["seeds"]]
    numbered = f"seed{'s' if len(seeds) > 1 else ''} {spoken(seeds)}"
    return (
        f"{shortened(analysis['label'], 80)}, {numbered}, on "
        f"{count_of(analysis['examples'], analysis['split'] + ' example')}"
    )


def _over(analysis: Analysis) -> str:
    return "examples and seeds" if len(analysis["seeds"]) > 1 else "examples"


def _pairing(analysis: Analysis) -> str:
    return "example by example" + (" and seed by seed" if len(analysis["seeds"]) > 1 else "")


def _counts_said(analysis: Analysis) -> str:
    counts = analysis["counts"]
    return "; ".join(
        f"{EFFECTS[effect]} {_ratio(counts[effect]['operations']['all'])}"
        for effect in EFFECTS
        if counts[effect]["change"]
    )


def _effect_said(analysis: Analysis) -> str:
    """Say what lowering does on average and how often, and hold the controls against it."""
    counts = analysis["counts"]
    lowered = [cell for cell in analysis["cells"] if cell["effect"] == "lowers"]
    if not lowered:
        return "No operation lowered a norm, so that this says nothing of a Low-Norm Effect."
    change = counts["lowers"]["change"]
    count = counts["lowers"]["operations"]["all"]
    marked = [c for c in lowered if c["change"]["beyond"] and c["change"]["mean"] > 0]
    controls = {e: counts[e] for e in ("raises", "keeps") if counts[e]["change"]}
    held = [
        f"with norms {EFFECTS[effect]} it is {_ratio(found['operations']['all'])}, "
        f"{_change(found['change'])}"
        for effect, found in controls.items()
    ]
    if change["beyond"] and change["mean"] > 0:
        higher = [
            EFFECTS[effect]
            for effect, found in controls.items()
            if found["change"]["mean"] >= change["mean"]
        ]
        verdict = (
            f"The mean gain is beyond two errors, but it is as large with norms {spoken(higher)}: "
            "that is no effect of low norms."
            if higher
            else "That is a gain beyond two errors, and larger than in any control."
        )
    elif change["beyond"]:
        verdict = "On average lowering norms hurts, beyond two errors."
    else:
        verdict = "On average no effect is shown."
    by_chance = 0.023 * len(lowered)  # of a normal variable beyond two standard deviations
    single = (
        f" One by one, {len(marked)} of the {len(lowered)} lowered cells gain beyond two errors; "
        f"about {by_chance:.1g} would by chance alone, and cells share their examples."
    )
    seeds = (
        " One seed is one seed: errors over examples do not know how another would do."
        if len(analysis["seeds"]) == 1
        else ""
    )
    against = f"; {', and '.join(held)}" if held else ""
    return (
        f"Accuracy rises in {_ratio(count)} cells whose norm is lowered, and changes by "
        f"{_change(change)} on average{against}. {verdict}{single}{seeds}"
    )


def _ratio(count: Mapping[str, int] | None) -> str:
    return f"{count['rises']} of {count['of']}" if count else "–"


def _change(estimate: Estimate) -> str:
    return f"{points(estimate['mean'])} (SE {points(estimate['error'], sign=False, unit=False)})"


def _with_error(estimate: Estimate) -> str:
    error = points(estimate["error"], sign=False, unit=False)
    return f"{points(estimate['mean'], unit=False)} ± {error}"
