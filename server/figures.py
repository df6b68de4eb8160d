"""The report's figures: each a question, a drawing, what it shows, and what the data say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from server.comparison import Groups, Record, finite, methods_of
from server.drawing import SERIES, SURFACE, Line, Mark, draw, marks, paint_lines, square
from server.findings import EXACT, climb, exactness, price, skew, standing, time_spent
from server.wording import (
    amount_of_bytes,
    count_of,
    duration,
    is_or_are,
    power_of_ten,
    range_of,
    shortened,
    spoken,
)

ERROR_FLOOR = 1e-8


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    swatch: Markup


@dataclass(frozen=True)
class Panel:
    """One figure with its words; without a drawing there was nothing to draw."""

    name: str
    heading: str
    shows: str
    conclusion: str
    drawing: str = ""
    legend: Sequence[Key] = ()
    columns: Sequence[str] = ()
    numbers: Sequence[Sequence[str]] = ()


def panels(groups: Groups) -> list[Panel]:
    """Return the report's figures, in its order."""
    chosen = marks(groups)
    return [
        accuracy_by_round(groups, chosen),
        accuracy_by_bytes(groups, chosen),
        examples_by_client(groups),
        aggregation_error_by_round(groups, chosen),
        seconds_by_part(groups),
    ]


# The figures.


def accuracy_by_round(groups: Groups, chosen: Mapping[str, Mark]) -> Panel:
    """Draw accuracy over rounds, the start included, for every label."""
    metric = _metric(groups)
    lines = [_accuracy_line(label, members, chosen[label]) for label, members in groups.items()]

    def paint(axes: Axes) -> None:
        paint_lines(axes, lines)
        axes.set(xlabel="round", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    return Panel(
        name="accuracy-by-round",
        heading=f"How does {metric} grow with the rounds?",
        shows=f"{metric.capitalize()} on the server's held-out examples before training (round 0) "
        f"and after each round. {_spread_note(groups)}",
        conclusion=f"{standing(groups)} {climb(lines)}",
        drawing=draw("accuracy-by-round", f"{metric.capitalize()} by round", paint),
        legend=_legend(groups, chosen),
    )


def accuracy_by_bytes(groups: Groups, chosen: Mapping[str, Mark]) -> Panel:
    """Draw accuracy over bytes sent so far; controls send none that could be compared."""
    metric = _metric(groups)
    methods = methods_of(groups)
    lines = [
        line
        for label, members in methods.items()
        if (line := _bytes_line(label, members, chosen[label])) is not None
    ]
    totals = [line.x[-1] for line in lines if line.x[-1] > 0]
    logarithmic = bool(totals) and max(totals) > 8 * min(totals)

    def paint(axes: Axes) -> None:
        paint_lines(axes, lines)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.set_xlim(left=0)
        axes.set(xlabel="sent so far, up and down, all clients", ylabel=metric)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount_of_bytes(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    left_out = [label for label in groups if label not in methods]
    controls = (
        f" Left out, because {is_or_are(left_out, 'a control', 'controls')} whose bytes mean "
        f"nothing here: {spoken(left_out)}."
        if left_out
        else ""
    )
    scale = " The byte axis is logarithmic, so the start is off it." if logarithmic else ""
    drawable = any(line.x[-1] > 0 for line in lines)
    return Panel(
        name="accuracy-by-bytes",
        heading=f"What does {metric} cost in traffic?",
        shows=f"The same {metric}, over the bytes that all clients together have sent and received "
        f"by then{_averaged(groups)}.{scale}{controls}",
        conclusion=price(lines) if drawable else "No federated method sent anything.",
        drawing=draw("accuracy-by-bytes", f"{metric.capitalize()} by bytes sent", paint)
        if drawable
        else "",
        legend=_legend(methods, chosen) if drawable else (),
    )


def examples_by_client(groups: Groups) -> Panel:
    """Draw which client holds how many examples, by label, or by task in a by-task federation."""
    record = next(iter(groups.values()))[0]
    counts = [client["label_counts"] for client in record["task"]["clients"]]
    if not counts:
        return Panel("examples-by-client", "Who holds what?", "", "The record names no clients.")
    one_label_set = all(counts) and len({len(row) for row in counts}) == 1
    if one_label_set and not record["task"].get("tasks"):
        return _label_shares(groups, record)
    return _examples_by_task(groups, record)


def _label_shares(groups: Groups, record: Record) -> Panel:
    clients = record["task"]["clients"]
    counts = np.array([client["label_counts"] for client in clients], dtype=float)
    largest = max(float(counts.max()), 1.0)
    names = record["task"].get("labels") or [str(index) for index in range(counts.shape[1])]
    named = len(names) <= 12
    long_names = max(len(str(name)) for name in names) > 3

    def paint(axes: Axes) -> None:
        # One compound path for each shade: thousands of cells stay a few elements.
        shades = np.ceil(16 * counts / largest)
        for shade in range(1, 17):
            rows, columns = np.nonzero(shades == shade)
            if not len(rows):
                continue
            corners = np.array([[0.04, 0.06], [0.96, 0.06], [0.96, 0.94], [0.04, 0.94]]) - 0.5
            cells = np.stack([columns, rows], axis=1)[:, None, :] + corners
            axes.add_patch(
                PathPatch(
                    Path.make_compound_path_from_polys(cells),
                    facecolor=SERIES[0],
                    alpha=_opacity(shade / 16),
                    linewidth=0,
                )
            )
        axes.set_xlim(-0.5, counts.shape[1] - 0.5)
        axes.set_ylim(len(clients) - 0.5, -0.5)
        axes.grid(False)
        axes.set(xlabel="label" if named else f"label, 0 to {len(names) - 1}", ylabel="client")
        _client_ticks(axes.yaxis, clients, room=16)
        if named:
            axes.set_xticks(range(len(names)), [str(name) for name in names])
            if long_names:
                axes.tick_params(axis="x", rotation=55)

    sizes = [client["num_examples"] for client in clients]
    return Panel(
        name="examples-by-client",
        heading="Who holds which labels?",
        shows="Training examples of each label (columns) at each client (rows); the stronger "
        f"the colour, the more. {_which_partition(groups, record)}",
        conclusion=f"{skew(counts)} Clients hold {range_of(sizes)} examples.",
        drawing=draw(
            "examples-by-client",
            "Training examples by client and label",
            paint,
            height=min(6.0, 1.1 + 0.2 * max(len(clients), 6) + 0.5 * (named and long_names)),
        ),
        legend=[
            Key(f"{math.ceil(share * largest)} examples", square(SERIES[0], _opacity(share)))
            for share in (0.125, 0.5, 1.0)
        ],
    )


def _opacity(share: float) -> float:
    """Let the least share still differ from nothing, on a light card and on a dark one."""
    return 0.14 + 0.86 * share


def _examples_by_task(groups: Groups, record: Record) -> Panel:
    clients = record["task"]["clients"]
    tasks = list(dict.fromkeys(client["task"] for client in clients))
    inks = {task: SERIES[number % len(SERIES)] for number, task in enumerate(tasks)}
    sizes = {task: [c["num_examples"] for c in clients if c["task"] == task] for task in tasks}

    def paint(axes: Axes) -> None:
        axes.bar(
            range(len(clients)),
            [client["num_examples"] for client in clients],
            color=[inks[client["task"]] for client in clients],
            width=0.8,
        )
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="client", ylabel="training examples")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _client_ticks(axes.xaxis, clients, room=12)

    held = "; ".join(
        f"{task}: {sum(rows)} examples at {count_of(len(rows), 'client')}, {range_of(rows)} each"
        for task, rows in sizes.items()
    )
    return Panel(
        name="examples-by-client",
        heading="Who holds which task?",
        shows="Training examples at each client, coloured by the task that the client has. "
        f"{_which_partition(groups, record)}",
        conclusion=f"{held}.",
        drawing=draw("examples-by-client", "Training examples by client and task", paint),
        legend=[Key(str(task), square(ink)) for task, ink in inks.items()],
    )


def aggregation_error_by_round(groups: Groups, chosen: Mapping[str, Mark]) -> Panel:
    """Draw how far the served update is from the exact mean of the clients' updates."""
    lines: dict[str, Line] = {}
    for label, members in groups.items():
        line = Line(label, chosen[label])
        for number, values in _over_rounds(members, "aggregation_error").items():
            line.add(number, values)
        if line.x:
            lines[label] = line
    silent = [label for label in groups if label not in lines]
    unmeasured = f" Not measured for {spoken(silent)}." if silent and lines else ""
    every = [value for line in lines.values() for value in line.mean]
    positive = [value for value in every if value > 0]
    logarithmic = bool(positive) and (min(every) < EXACT or max(positive) > 30 * min(positive))
    clipped = logarithmic and min(every) < ERROR_FLOOR

    def paint(axes: Axes) -> None:
        paint_lines(axes, lines.values(), floor=ERROR_FLOOR if logarithmic else -math.inf)
        axes.set(xlabel="round", ylabel="relative error")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=8))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        else:
            axes.set_ylim(bottom=0, top=None if max(every) > 0 else 1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    floor = (
        f" Errors below {power_of_ten(ERROR_FLOOR)}, zero among them, are drawn at "
        f"{power_of_ten(ERROR_FLOOR)}: a logarithmic axis has no zero."
        if clipped
        else ""
    )
    return Panel(
        name="aggregation-error",
        heading="Does the server serve the mean of what clients learned?",
        shows="Distance of the served update from the exact weighted mean of the clients' updates "
        f"sBA, relative to that mean, over all modules{_averaged(groups)}.{floor}{unmeasured}",
        conclusion=exactness(groups, lines)
        if lines
        else "No run here measured an aggregation error.",
        drawing=draw("aggregation-error", "Aggregation error by round", paint) if lines else "",
        legend=_legend({label: groups[label] for label in lines}, chosen),
    )


# Part of a round, its ink and its opacity; what the server does, bottom of each pair of bars.
SERVER_PARTS = {
    "waiting": ("waiting for clients", SERIES[0], 0.3),
    "evaluation": ("evaluation", SERIES[1], 1.0),
    "merge": ("merge", SERIES[3], 1.0),
}
TRAINING = ("training, summed over clients", SERIES[0], 1.0)


def seconds_by_part(groups: Groups) -> Panel:
    """Draw mean seconds a round: training on the clients, and what the server spent its time on."""
    parts = ("training", *SERVER_PARTS, "wall")
    seconds = {
        label: {part: _mean_seconds(members, part) for part in parts}
        for label, members in groups.items()
        if any(record["rounds"] for record in members)
    }

    def paint(axes: Axes) -> None:
        for row, (label, spent) in enumerate(seconds.items()):
            name = axes.text(0, row - 0.34, shortened(label, 46), va="bottom", ha="left")
            name.set_in_layout(False)
            axes.barh(row - 0.16, spent["training"], 0.26, color=TRAINING[1])
            left = 0.0
            for part, (_, ink, opacity) in SERVER_PARTS.items():
                # A faint colour lies on the card, not on the grid.
                axes.barh(row + 0.14, spent[part], 0.26, left=left, color=SURFACE)
                axes.barh(row + 0.14, spent[part], 0.26, left=left, color=ink, alpha=opacity)
                left += spent[part]
        axes.set_ylim(len(seconds) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set(xlabel="seconds a round")

    legend = [TRAINING, *SERVER_PARTS.values()]
    return Panel(
        name="seconds-by-part",
        heading="Where does the time of a round go?",
        shows="Mean seconds a round, two bars each. Above: local training, summed over clients, "
        "which may run at the same time. Below: the server's clock, which mostly waits for them.",
        conclusion=time_spent(seconds) if seconds else "No round was run.",
        drawing=draw(
            "seconds-by-part",
            "Seconds a round by part",
            paint,
            height=0.65 + 0.62 * max(len(seconds), 2),
        )
        if seconds
        else "",
        legend=[Key(name, square(ink, opacity)) for name, ink, opacity in legend],
        columns=("Method", "Training", "Waiting", "Evaluation", "Merge", "Round, wall"),
        numbers=[
            [label, *(duration(spent[part]) for part in parts)] for label, spent in seconds.items()
        ],
    )


def _averaged(groups: Groups) -> str:
    return " (mean over seeds)" if _several_seeds(groups) else ""


def _spread_note(groups: Groups) -> str:
    if _several_seeds(groups):
        return "Line: mean over seeds; band: from the lowest to the highest seed."
    return "One seed each."


def _several_seeds(groups: Groups) -> bool:
    return any(len(members) > 1 for members in groups.values())


def _which_partition(groups: Groups, record: Record) -> str:
    seeds = {member["seed"] for members in groups.values() for member in members}
    if len(seeds) == 1:
        return ""
    return f"This is seed {record['seed']}; each seed deals out the examples anew."


# From records to lines.


def _over_rounds(members: Sequence[Record], quantity: str) -> dict[int, list[float]]:
    """Return {round: one value a seed}, for the rounds in which every seed has one."""
    values: dict[int, list[float]] = {}
    for record in members:
        for entry in record["rounds"]:
            if (value := finite(entry.get(quantity))) is not None:
                values.setdefault(entry["round"], []).append(value)
    return {key: row for key, row in sorted(values.items()) if len(row) == len(members)}


def _accuracy_line(label: str, members: Sequence[Record], mark: Mark) -> Line:
    line = Line(label, mark)
    starts = [value for r in members if (value := finite(r["start"]["accuracy"])) is not None]
    if len(starts) == len(members):
        line.add(0, starts)
    for number, values in _over_rounds(members, "accuracy").items():
        line.add(number, values)
    return line


def _bytes_line(label: str, members: Sequence[Record], mark: Mark) -> Line | None:
    """Return accuracy over the mean of the bytes sent up to each round; None without any point."""
    sent: dict[int, list[float]] = {0: [0.0] * len(members)}
    for record in members:
        so_far = 0.0
        for entry in record["rounds"]:
            for direction in ("up", "down"):
                so_far += finite(entry["bytes"][direction]["total"]) or 0.0
            sent.setdefault(entry["round"], []).append(so_far)
    over_rounds = _accuracy_line(label, members, mark)
    if not over_rounds.x:
        return None
    over_rounds.x = [fmean(sent[int(number)]) for number in over_rounds.x]
    return over_rounds


def _mean_seconds(members: Sequence[Record], part: str) -> float:
    return fmean(
        [finite(entry["seconds"].get(part)) or 0.0 for r in members for entry in r["rounds"]]
    )


def _metric(groups: Groups) -> str:
    return str(next(iter(groups.values()))[0]["task"].get("metric") or "accuracy")


# Small parts.


def _client_ticks(axis: Any, clients: Sequence[Mapping[str, Any]], *, room: int) -> None:
    """Name the clients, as many as there is room for, with their ranks where these differ."""
    step = math.ceil(len(clients) / room)
    differ = len({client.get("rank") for client in clients}) > 1
    ranked = differ and axis.axis_name == "y"
    axis.set_major_locator(FixedLocator(range(0, len(clients), step)))
    names = [
        f"{c['client']} (rank {c['rank']})" if ranked else str(c["client"]) for c in clients[::step]
    ]
    axis.set_ticklabels(names)


def _legend(groups: Groups, chosen: Mapping[str, Mark]) -> list[Key]:
    return [
        Key(
            f"{label} (control)" if members[0]["strategy"]["control"] else label,
            chosen[label].swatch(),
        )
        for label, members in groups.items()
    ]
