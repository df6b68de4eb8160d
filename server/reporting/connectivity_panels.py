"""Panels of `fedcopra connectivity`: losses along straight lines, and on a plane through three."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator

from server.reporting.drawing import (
    DASHES,
    MUTED,
    SERIES,
    SURFACE,
    TEXT,
    Line,
    Mark,
    draw,
    opacity,
    paint_lines,
    square,
)
from server.reporting.figures import Key, Panel
from server.reporting.wording import count_of, percent, points, spoken

Analysis = Mapping[str, Any]

MARKS = {
    "deltas": Mark(SERIES[0], DASHES[0], "o"),
    "factors": Mark(SERIES[1], DASHES[1], "s"),
}
BASELINE = Mark(MUTED, DASHES[2], "")


@dataclass(frozen=True)
class Kind:
    """How paths of one kind are spoken of; `{to}` in `shows` is the end of the first one."""

    short: str
    heading: str
    shows: str
    line: str


KINDS: Mapping[str, Kind] = {
    "clients": Kind(
        short="client to client",
        heading="Does a straight line join the clients?",
        shows="from one client's adapter to another's, as they were returned in the last round",
        line="pair",
    ),
    "sent": Kind(
        short="sent to client",
        heading="Does a straight line lead from the server's model to each client's?",
        shows="from what a client was sent in the last round (λ = 0) to what it returned (λ = 1)",
        line="client",
    ),
    "served": Kind(
        short="served to client",
        heading="Does a straight line lead from the merged model to each client's?",
        shows="from the model that the last round merged and the run serves (λ = 0) to what a "
        "client had returned for it (λ = 1)",
        line="client",
    ),
    "runs": Kind(
        short="run to run",
        heading="Does a straight line join the models of the two runs?",
        shows="from the model that this run serves (λ = 0) to that of {to} (λ = 1)",
        line="pair of runs",
    ),
}


@dataclass(frozen=True)
class Summary:
    """One way over all paths of a kind.

    Attributes:
        kind: of the paths.
        way: `factors` or `deltas`.
        paths: those that there are by this way.
        left_out: how many there are not, and why, or nothing.
    """

    kind: str
    way: str
    paths: Sequence[Analysis]
    left_out: str

    @property
    def bumps(self) -> int:
        """Return on how many paths the barrier is beyond noise."""
        return sum(path[self.way]["barrier"]["beyond_noise"] for path in self.paths)

    @property
    def highest(self) -> Analysis:
        """Return the path with the highest barrier."""
        return max(self.paths, key=lambda path: path[self.way]["barrier"]["height"])

    def middle(self, name: str) -> list[float]:
        """Return a number of the middle, path by path."""
        return [path[self.way]["middle"][name] for path in self.paths]


def connectivity_panels(analysis: Analysis) -> list[Panel]:
    """Return the panels of one `connectivity.json`: one for each kind of path, and the surface."""
    kinds = list(dict.fromkeys(path["kind"] for path in analysis["paths"]))
    lines = [_along(analysis, kind, first=kind == kinds[0]) for kind in kinds]
    return [*lines, _over_plane(analysis)]


def summaries(analysis: Analysis) -> list[Summary]:
    """Return what each kind of path shows by each way, in the order of the file."""
    kinds = list(dict.fromkeys(path["kind"] for path in analysis["paths"]))
    return [_summary(analysis, kind, way) for kind in kinds for way in MARKS]


def _summary(analysis: Analysis, kind: str, way: str) -> Summary:
    paths = [path for path in analysis["paths"] if path["kind"] == kind]
    there = [path for path in paths if "left_out" not in path[way]]
    reasons = list(dict.fromkeys(path[way]["left_out"] for path in paths if path not in there))
    left_out = f"{len(paths) - len(there)} of {len(paths)}: {'; '.join(reasons)}" if reasons else ""
    return Summary(kind, way, there, left_out)


def summary_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Return, for a table: kind, way, bumps beyond noise, highest barrier, its λ, and the middle.

    The middle is accuracy at λ = 1/2 less the mean of the ends, mean over lines.
    """
    rows: list[tuple[str, ...]] = []
    for summary in summaries(analysis):
        start = (KINDS[summary.kind].short, summary.way)
        if not summary.paths:
            rows.append((*start, "left out", summary.left_out, "–", "–"))
            continue
        bumps = f"{summary.bumps} of {len(summary.paths)}"
        middle = points(fmean(summary.middle("accuracy_gap")))
        rows.append((*start, bumps, *_barrier(summary.highest[summary.way]), middle))
    return rows


def _barrier(found: Analysis) -> tuple[str, str]:
    """Write height and λ of a barrier."""
    bump = found["barrier"]
    if not bump["height"]:
        return "none", "–"
    return f"{nats(bump['height'])} ± {nats(bump['error'])}", f"{bump['at']:g}"


# Along lines.


def _along(analysis: Analysis, kind: str, *, first: bool) -> Panel:
    """Draw the lines of one kind; the first panel of an analysis says what all of them mean."""
    words = KINDS[kind]
    found = [_summary(analysis, kind, way) for way in MARKS]
    drawn = {summary.way: summary for summary in found if summary.paths}
    lines = {way: _line(analysis, summary) for way, summary in drawn.items()}
    straight = Line("straight line between the ends", BASELINE)
    for x, y in zip((0, 1), (lines["deltas"].mean[0], lines["deltas"].mean[-1]), strict=True):
        straight.add(x, [y])
    count = len(found[0].paths)
    name = f"connectivity-{kind}-{analysis['digest'][:8]}"

    def paint(axes: Axes) -> None:
        paint_lines(axes, [straight, *lines.values()])
        axes.set(xlabel="λ, from one end to the other", ylabel="loss, nats")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    spread = (
        f" Lines: mean over {count_of(count, words.line)}; bands: from the lowest to the highest."
        if count > 1
        else ""
    )
    left_out = "".join(
        f" No path by {summary.way} for {summary.left_out}."
        for summary in found
        if summary.left_out
    )
    return Panel(
        name=name,
        heading=words.heading,
        shows=f"{analysis['run']}: mean loss on {_rows(analysis)}, on the straight line "
        f"{words.shows.format(to=_all(analysis, kind)[0]['to'])}.{_MEANING if first else ''}"
        f"{spread}{left_out}{' ' + analysis['caution'] if first else ''}",
        conclusion=" ".join([*map(_verdict, drawn.values()), *_cost_of_factors(analysis, kind)]),
        drawing=draw(name, "Loss along straight lines between adapters", paint),
        legend=[
            *(Key(f"by {way}", MARKS[way].swatch()) for way in lines),
            Key("straight line between the losses of the ends", BASELINE.swatch()),
        ],
        columns=(
            "Line",
            "Barrier, nats",
            "at λ",
            "Middle, accuracy",
            "less mean of ends",
            "Least loss at λ",
        ),
        numbers=[_numbers(path, s.way) for path in _all(analysis, kind) for s in found],
    )


_MEANING = (
    " By deltas the products sBA are mixed, by factors A and B apart, as a server does that "
    "averages factors; heads are mixed alike in both. A barrier is the highest bump over the "
    "straight line between the losses of the ends."
)


def _all(analysis: Analysis, kind: str) -> list[Analysis]:
    return [path for path in analysis["paths"] if path["kind"] == kind]


def _line(analysis: Analysis, summary: Summary) -> Line:
    line = Line(summary.way, MARKS[summary.way])
    for number, position in enumerate(analysis["positions"]):
        line.add(position, [path[summary.way]["loss"][number] for path in summary.paths])
    return line


def _rows(analysis: Analysis) -> str:
    return f"{analysis['examples']} {analysis['split']} examples, the same at every point"


def _between(path: Analysis) -> str:
    if path["kind"] in {"sent", "served"}:
        return str(path["to"])
    return f"{path['from']} and {path['to'].removeprefix('client ')}"


def _verdict(summary: Summary) -> str:
    """Say whether there are bumps on these paths, and what their middles are worth."""
    top, count = summary.highest, len(summary.paths)
    bump = top[summary.way]["barrier"]
    size = f"{nats(bump['height'])} ± {nats(bump['error'])} nats, at λ = {bump['at']:g}"
    lines = f" on {count_of(count, 'line')}" if count > 1 else ""
    highest = f"; the highest is {size} of {_between(top)}" if count > 1 else f": {size}"
    if summary.bumps:
        some = f"{summary.bumps} of {count} lines meet" if count > 1 else "the line meets"
        said = f"{some} a bump beyond noise{highest}"
    elif bump["height"] > 0:
        said = f"no bump beyond noise (two standard errors){lines}{highest}"
    else:
        said = f"no bump at all{lines}"
    return f"By {summary.way}: {said}. {_middles(summary)}"


def _middles(summary: Summary) -> str:
    gaps = summary.middle("accuracy_gap")
    said = "Accuracy in the middle against the mean of the ends"
    if len(gaps) == 1:
        (error,) = summary.middle("accuracy_gap_error")
        amount = f"{points(gaps[0], unit=False)} ± {points(error, sign=False)}"
        return f"{said}: {amount}."
    span = f"{points(min(gaps), unit=False)} to {points(max(gaps), unit=False)}"
    return f"{said}: {points(fmean(gaps))} on average ({span})."


def _cost_of_factors(analysis: Analysis, kind: str) -> list[str]:
    """Say what mixing factors costs in the middle, where both ways are there."""
    costs = [path["factors_less_deltas"] for path in _all(analysis, kind)]
    costs = [cost for cost in costs if cost is not None]
    if not costs:
        return []
    said = "There, the loss by factors less that by deltas is"
    clear = sum(abs(cost["loss"]) > 2 * cost["loss_error"] for cost in costs)
    if len(costs) == 1:
        amount = f"{nats(costs[0]['loss'])} ± {nats(costs[0]['loss_error'])} nats"
        return [f"{said} {amount}, {'beyond' if clear else 'within'} two standard errors."]
    losses = [cost["loss"] for cost in costs]
    span = f"{nats(min(losses))} to {nats(max(losses))}"
    return [
        f"{said} {nats(fmean(losses))} nats on average ({span}), beyond two standard errors on "
        f"{clear} of {len(costs)} lines."
    ]


def _numbers(path: Analysis, way: str) -> list[str]:
    name = f"{_between(path)}, {way}"
    found = path[way]
    if "left_out" in found:
        return [name, "left out", "–", "–", "–", "–"]
    middle = found["middle"]
    gap = points(middle["accuracy_gap"], unit=False)
    error = points(middle["accuracy_gap_error"], sign=False)
    return [
        name,
        *_barrier(found),
        percent(middle["accuracy"]),
        f"{gap} ± {error}",
        f"{found['least_loss_at']:g}",
    ]


def nats(value: float) -> str:
    """Write a loss or a difference of losses.

    >>> nats(0.01234), nats(-1e-6), nats(0)
    ('0.0123', '−0.0000', '0')
    """
    return f"{value:.4f}".replace("-", "−") if value else "0"


# On the plane.

_BANDS = 8


def _over_plane(analysis: Analysis) -> Panel:
    surface = analysis["surface"]
    name = f"connectivity-surface-{analysis['digest'][:8]}"
    heading = "What lies between three clients?"
    if "left_out" in surface:
        return Panel(name, heading, "", f"There is no surface: {surface['left_out']}.")
    losses = np.array(surface["loss"])
    levels = _levels(losses)
    # Never so strong that names on it could not be read.
    inks = [to_rgba(SERIES[0], 0.6 * opacity(n / (_BANDS - 1))) for n in range(_BANDS)]

    def paint(axes: Axes) -> None:
        axes.contourf(surface["x"], surface["y"], losses, levels=levels, colors=inks)
        axes.contour(
            surface["x"], surface["y"], losses, levels=levels, colors=[SURFACE], linewidths=0.5
        )
        for label, marker, x, y in _marked(surface):
            axes.plot(x, y, marker, color=TEXT, markersize=6, markeredgecolor=SURFACE)
            # The served model is often where the mean is: their names would cover each other.
            above = -14 if label == "served" else 6
            axes.annotate(label, (x, y), xytext=(0, above), textcoords="offset points", ha="center")
        axes.set(xlabel="distance, ‖sBA‖", ylabel="distance, ‖sBA‖", aspect="equal")
        axes.grid(visible=False)

    side = len(surface["x"])
    names = [f"client {row['client']}" for row in surface["clients"]]
    return Panel(
        name=name,
        heading=heading,
        shows=f"{analysis['run']}: mean loss on {_rows(analysis)}, on the plane through the deltas "
        f"of {spoken(names)}, on a grid of {side} "
        f"by {side} points. The stronger the colour, the higher the loss. Distances are those of "
        "the deltas over all modules; the heads follow the same shares and do not count in them. "
        f"{_served(surface)} The best client is chosen on these examples, which favours it "
        "over the mean.",
        conclusion=_plane_verdict(surface),
        drawing=draw(name, "Loss on the plane through three clients", paint, height=3.9),
        legend=[
            Key(f"{low:.2g} to {high:.2g} nats", square(SERIES[0], ink[3]))
            for low, high, ink in zip(levels[:-1], levels[1:], inks, strict=True)
        ],
        columns=("Model", "Loss, nats", "Accuracy"),
        numbers=[[f"client {row['client']}", *_scores(row)] for row in surface["clients"]]
        + [["mean of the three", *_scores(surface["mean"])]],
    )


def _levels(losses: Any) -> Any:
    """Return the bounds of the bands; by ratio where the highest loss would leave one band."""
    low, high = float(losses.min()), float(losses.max())
    spaced = np.geomspace if low > 0 and high > 3 * low else np.linspace
    levels = spaced(low, max(high, low + 1e-6), _BANDS + 1)
    # What is at the bounds belongs to the outermost bands, whatever rounding made of these.
    levels[0], levels[-1] = math.nextafter(levels[0], -1), math.nextafter(levels[-1], math.inf)
    return levels


def _marked(surface: Analysis) -> list[tuple[str, str, float, float]]:
    marked = [(f"client {row['client']}", "o", row["x"], row["y"]) for row in surface["clients"]]
    marked.append(("mean", "D", surface["mean"]["x"], surface["mean"]["y"]))
    served = surface["served"]
    if "left_out" not in served:
        marked.append(("served", "X", served["x"], served["y"]))
    return marked


def _served(surface: Analysis) -> str:
    served = surface["served"]
    if "left_out" in served:
        return f"The model that the run serves is left out: {served['left_out']}."
    return (
        "The model that the run serves is marked where it is projected to; it is "
        f"{served['off_plane']:.2g} off the plane, and the colour there is not its loss."
    )


def _plane_verdict(surface: Analysis) -> str:
    """Say how the mean of the three compares with the best of them."""
    mean = surface["mean"]
    best = min(surface["clients"], key=lambda row: row["loss"])
    gap, error = mean["against_best"], mean["against_best_error"]
    amount = f"{nats(abs(gap))} ± {nats(error)} nats"
    if abs(gap) <= 2 * error:
        return (
            f"The mean of the three deltas and heads is level with the best of them, client "
            f"{best['client']}: {amount} apart, within two standard errors."
        )
    side = "below" if gap < 0 else "above"
    return (
        f"The mean of the three deltas and heads has a loss of {nats(mean['loss'])} nats, {amount} "
        f"{side} that of the best of them, client {best['client']}, on the same examples."
    )


def _scores(row: Analysis) -> list[str]:
    return [
        f"{nats(row['loss'])} ± {nats(row['loss_error'])}",
        f"{percent(row['accuracy'])} ± {points(row['accuracy_error'], sign=False, unit=False)}",
    ]
