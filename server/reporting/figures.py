"""The report's figures: each a question, a drawing, what it shows, and what the data say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from server.reporting.comparison import (
    BUDGETS,
    Groups,
    Record,
    at_budgets,
    byte_budgets,
    curve,
    finite,
    methods_of,
    personalised,
    sent_by,
    single_models,
)
from server.reporting.drawing import (
    MUTED,
    SERIES,
    SURFACE,
    Cells,
    Line,
    Mark,
    draw,
    marks,
    opacity,
    paint_cells,
    paint_lines,
    square,
)
from server.reporting.findings import (
    EXACT,
    climb,
    exactness,
    own_standing,
    price,
    skew,
    standing,
    time_spent,
    within_budgets,
    worth_of_exactness,
)
from server.reporting.wording import (
    amount_of_bytes,
    count_of,
    duration,
    interval,
    is_or_are,
    percent,
    power_of_ten,
    range_of,
    relative_error,
    rough_percent,
    short_names,
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
    single, low_rank = single_models(groups), with_lora(groups)
    return [
        *([accuracy_by_round(single, chosen), accuracy_by_bytes(single, chosen)] if single else []),
        *([own_accuracy_by_round(groups, chosen)] if personalised(groups) else []),
        examples_by_client(groups),
        *(
            [aggregation_error_by_round(low_rank, chosen), aggregation_error_by_layer(low_rank)]
            if low_rank
            else []
        ),
        seconds_by_part(groups),
    ]


def with_lora(groups: Groups) -> dict[str, Sequence[Record]]:
    """Return the labels whose clients train low-rank adapters, and not prompts."""
    return {
        label: members
        for label, members in groups.items()
        if members[0]["experiment"]["adapter"]["kind"] == "lora"
    }


# The figures.


def accuracy_by_round(groups: Groups, chosen: Mapping[str, Mark]) -> Panel:
    """Draw accuracy over rounds, the start included, for every label with a single model."""
    metric = _metric(groups)
    lines = _curves(groups, chosen, "accuracy")
    return Panel(
        name="accuracy-by-round",
        heading=f"How does {metric} grow with the rounds?",
        shows=f"{metric.capitalize()} on the server's held-out examples before training (round 0) "
        f"and after each round that was scored. {_spread_note(groups)}",
        conclusion=f"{standing(groups)} {climb(lines)}",
        drawing=_drawn_by_round("accuracy-by-round", metric, lines),
        legend=legend_of(groups, chosen),
    )


def own_accuracy_by_round(groups: Groups, chosen: Mapping[str, Mark]) -> Panel:
    """Draw accuracy on clients' own labels over rounds, for every label."""
    metric = _metric(groups)
    lines = _curves(groups, chosen, "own_accuracy")
    return Panel(
        name="own-accuracy-by-round",
        heading=f"How does {metric} on clients' own labels grow?",
        shows=f"{metric.capitalize()} of the model that each client has, on held-out examples "
        "weighted like the client's own labels, mean over all clients. With one model for all, it "
        f"is that model which every client has. {_spread_note(groups)}",
        conclusion=f"{own_standing(groups)} {climb(lines)}",
        drawing=_drawn_by_round("own-accuracy-by-round", f"own {metric}", lines),
        legend=legend_of(groups, chosen),
    )


def _drawn_by_round(name: str, quantity: str, lines: Sequence[Line]) -> Markup:
    def paint(axes: Axes) -> None:
        paint_lines(axes, lines)
        axes.set(xlabel="round", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    return draw(name, f"{quantity.capitalize()} by round", paint)


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
    logarithmic = bool(totals) and max(totals) > 20 * min(totals)
    limits = byte_budgets(groups)
    bought = at_budgets(groups, limits)

    def paint(axes: Axes) -> None:
        for limit in limits:
            axes.axvline(limit, color=MUTED, linewidth=0.8, dashes=(2, 3))
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
    shares = spoken([percent(share, 0) for share in BUDGETS])
    return Panel(
        name="accuracy-by-bytes",
        heading=f"What does {metric} cost in traffic?",
        shows=f"The same {metric}, over the bytes that all clients together have sent and received "
        f"by then{_averaged(groups)}. Upright lines: {shares} of what the method that sends least "
        f"needs in all; the table has the last score known by then.{scale}{controls}",
        conclusion=f"{price(lines)} {within_budgets(bought, limits)}"
        if drawable
        else "No federated method sent anything.",
        drawing=draw("accuracy-by-bytes", f"{metric.capitalize()} by bytes sent", paint)
        if drawable
        else "",
        legend=legend_of(methods, chosen) if drawable else (),
        columns=("Method", *(f"by {amount_of_bytes(limit)}" for limit in limits), "in all"),
        numbers=[
            [
                row["label"],
                *(_with_interval(value) for value in row["accuracy"]),
                amount_of_bytes(row["bytes"]),
            ]
            for row in bought
            if limits
        ],
    )


def _with_interval(value: Mapping[str, float | None]) -> Markup:
    bounds = interval(value, percent)
    small = Markup("<small>{}</small>").format(bounds) if bounds else ""
    return escape(percent(value["mean"])) + small


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
        paint_cells(axes, counts / largest, SERIES[0])
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
            Key(f"{math.ceil(share * largest)} examples", square(SERIES[0], opacity(share)))
            for share in (0.125, 0.5, 1.0)
        ],
    )


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
        legend=legend_of({label: groups[label] for label in lines}, chosen),
    )


@dataclass(frozen=True)
class Layers:
    """What a label's rounds measured in each module, means over seeds: (modules, rounds)."""

    modules: Sequence[str]
    rounds: Sequence[int]
    error: Cells
    covariance: Cells


def aggregation_error_by_layer(groups: Groups) -> Panel:
    """Draw round by module what one label's merge misses, and what averaging factors would."""
    measured = {label: found for label, rows in groups.items() if (found := _layers(rows))}
    heading = "In which layers would averaging the factors go wrong?"
    if not measured:
        return Panel(
            "aggregation-error-by-layer", heading, "", "No run here measured errors by layer."
        )
    inexact = [label for label, found in measured.items() if found.error.max() > EXACT]
    label = (inexact or list(measured))[0]
    found = measured[label]
    # A method that averages the factors has their covariance for its error.
    same = np.allclose(found.error, found.covariance, rtol=1e-3, atol=EXACT)
    maps = {"factor covariance": found.covariance}
    if label in inexact and not same:
        maps = {"aggregation error": found.error, **maps}
    largest = max(float(cells.max()) for cells in maps.values()) or 1.0
    names = [shortened(name, 15) for name in short_names(found.modules)]
    step = math.ceil(len(names) / 24)

    def paint(*all_axes: Axes) -> None:
        for axes, (title, cells) in zip(all_axes, maps.items(), strict=True):
            paint_cells(axes, cells / largest, SERIES[0])
            axes.set(xlabel="round")
            axes.set_title(title, fontsize=11, loc="left")
            ticks = range(0, len(found.rounds), math.ceil(len(found.rounds) / 6))
            axes.set_xticks(ticks, [str(found.rounds[tick]) for tick in ticks])
        all_axes[0].set_yticks(range(0, len(names), step), names[::step])

    words = {
        "aggregation error": "what the served update misses of the exact mean",
        "factor covariance": "what averaging A and B apart would have missed on the same updates",
    }
    drawn = "; ".join(f"{title}: {words[title]}" for title in maps)
    twin = " Its error is this covariance, because it averages the factors." if same else ""
    return Panel(
        name="aggregation-error-by-layer",
        heading=heading,
        shows=f"{label}, by module (rows) and round (columns){_averaged(groups)}. "
        f"{drawn[0].upper()}{drawn[1:]}; relative to the exact mean of that module.{twin}",
        conclusion=worth_of_exactness(
            {name: layers.covariance for name, layers in measured.items()},
            {name: short_names(layers.modules) for name, layers in measured.items()},
            _last_covariance(groups, list(measured)),
        ),
        drawing=draw(
            "aggregation-error-by-layer",
            f"{' and '.join(maps).capitalize()} by module and round",
            paint,
            height=min(6.0, 1.2 + 0.2 * max(len(names), 6)),
            columns=len(maps),
        ),
        legend=[
            Key(rough_percent(share * largest), square(SERIES[0], opacity(share)))
            for share in (0.125, 0.5, 1.0)
        ],
        columns=("Method, module", "Error, first", "last", "Covariance, first", "last"),
        numbers=[
            [
                f"{name} · {module}",
                *(
                    relative_error(float(value))
                    for cells in (layers.error, layers.covariance)
                    for value in (cells[row, 0], cells[row, -1])
                ),
            ]
            for name, layers in measured.items()
            for row, module in enumerate(short_names(layers.modules))
        ],
    )


def _layers(members: Sequence[Record]) -> Layers | None:
    """Return the rounds and modules in which every seed measured something."""
    by_seed = [
        {entry["round"]: entry["modules"] for entry in record["rounds"] if entry.get("modules")}
        for record in members
    ]
    rounds = [n for n in by_seed[0] if all(n in seed for seed in by_seed)]
    every = [seed[n] for seed in by_seed for n in rounds]
    modules = [m for m in (every[0] if every else ()) if all(_is_measured(e.get(m)) for e in every)]
    if not modules:
        return None

    def means(quantity: str) -> Cells:
        return np.array(
            [[fmean(seed[n][m][quantity] for seed in by_seed) for n in rounds] for m in modules]
        )

    return Layers(modules, rounds, means("aggregation_error"), means("factor_covariance"))


def _is_measured(module: Mapping[str, Any] | None) -> bool:
    return module is not None and None not in map(finite, module.values())


def _last_covariance(groups: Groups, labels: Sequence[str]) -> dict[str, float]:
    """Return the factor covariance over all modules in the last round that measured it."""
    found = {}
    for label in labels:
        by_round = _over_rounds(groups[label], "factor_covariance")
        if by_round:
            found[label] = fmean(by_round[max(by_round)])
    return found


# Part of a round, its ink and its opacity; what the server does, bottom of each pair of bars.
SERVER_PARTS = {
    "waiting": ("waiting for clients", SERIES[0], 0.3),
    "evaluation": ("evaluation", SERIES[1], 1.0),
    "merge": ("merge", SERIES[3], 1.0),
}
# Of clients, top: summed, though they may run at the same time.
CLIENT_PARTS = {
    "training": ("training, summed over clients", SERIES[0], 1.0),
    "startup": ("start-up, summed over clients", SERIES[2], 1.0),
}


def seconds_by_part(groups: Groups) -> Panel:
    """Draw mean seconds a round: training on the clients, and what the server spent its time on."""
    parts = (*CLIENT_PARTS, *SERVER_PARTS, "wall")
    seconds = {
        label: {part: _mean_seconds(members, part) for part in parts}
        for label, members in groups.items()
        if any(record["rounds"] for record in members)
    }

    def paint(axes: Axes) -> None:
        for row, (label, spent) in enumerate(seconds.items()):
            name = axes.text(0, row - 0.34, shortened(label, 46), va="bottom", ha="left")
            name.set_in_layout(False)
            left = 0.0
            for part, (_, ink, _) in CLIENT_PARTS.items():
                axes.barh(row - 0.16, spent[part], 0.26, left=left, color=ink)
                left += spent[part]
            left = 0.0
            for part, (_, ink, share) in SERVER_PARTS.items():
                # A faint colour lies on the card, not on the grid.
                axes.barh(row + 0.14, spent[part], 0.26, left=left, color=SURFACE)
                axes.barh(row + 0.14, spent[part], 0.26, left=left, color=ink, alpha=share)
                left += spent[part]
        axes.set_ylim(len(seconds) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set(xlabel="seconds a round")

    legend = [*CLIENT_PARTS.values(), *SERVER_PARTS.values()]
    return Panel(
        name="seconds-by-part",
        heading="Where does the time of a round go?",
        shows="Mean seconds a round, two bars each. Above: local training and what clients need to "
        "start, summed over clients, which may run at the same time. Below: the server's clock, "
        "which mostly waits for them.",
        conclusion=time_spent(seconds, _share_reused(groups)) if seconds else "No round was run.",
        drawing=draw(
            "seconds-by-part",
            "Seconds a round by part",
            paint,
            height=0.65 + 0.62 * max(len(seconds), 2),
        )
        if seconds
        else "",
        legend=[Key(name, square(ink, share)) for name, ink, share in legend],
        columns=("Method", "Training", "Start-up", "Waiting", "Evaluation", "Merge", "Round, wall"),
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


def _curves(groups: Groups, chosen: Mapping[str, Mark], quantity: str) -> list[Line]:
    return [score_line(label, rows, chosen[label], quantity) for label, rows in groups.items()]


def score_line(label: str, members: Sequence[Record], mark: Mark, quantity: str) -> Line:
    """Return the line through the rounds, from the start on, that were scored in every seed."""
    line = Line(label, mark)
    curves = [dict(curve(record, quantity)) for record in members]
    for number in curves[0]:
        if all(number in values for values in curves):
            line.add(number, [values[number] for values in curves])
    return line


def _bytes_line(label: str, members: Sequence[Record], mark: Mark) -> Line | None:
    """Return accuracy over the mean of the bytes sent up to each round; None without any point."""
    sent = [sent_by(record) for record in members]
    over_rounds = score_line(label, members, mark, "accuracy")
    if not over_rounds.x:
        return None
    over_rounds.x = [fmean(by_round[int(n)] for by_round in sent) for n in over_rounds.x]
    return over_rounds


def _mean_seconds(members: Sequence[Record], part: str) -> float:
    return fmean(
        [finite(entry["seconds"].get(part)) or 0.0 for r in members for entry in r["rounds"]]
    )


def _share_reused(groups: Groups) -> float:
    """Return the share of all trainings that another run of the comparison had done before."""
    reused = [
        bool(client.get("reused"))
        for members in groups.values()
        for record in members
        for entry in record["rounds"]
        for client in entry["clients"]
    ]
    return fmean(reused) if reused else 0.0


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


def legend_of(groups: Groups, chosen: Mapping[str, Mark]) -> list[Key]:
    """Return a legend of these labels, which says of controls that they are."""
    return [
        Key(
            f"{label} (control)" if members[0]["strategy"]["control"] else label,
            chosen[label].swatch(),
        )
        for label, members in groups.items()
    ]
