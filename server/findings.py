"""What the data say, in sentences: each follows from the records by a simple rule."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from server.comparison import Comparison, Groups, accuracy, finite, methods_of
from server.drawing import Line
from server.wording import (
    amount_of_bytes,
    duration,
    interval,
    percent,
    points,
    rough_percent,
    spoken,
)

EXACT = 1e-5  # float32 arithmetic over a few hundred layers stays below it


def headline(groups: Groups, comparison: Comparison) -> list[str]:
    """Answer in plain words: who is best, what supports it, and where the controls are."""
    first = next(iter(groups.values()))[0]
    summary = [row for row in comparison["summary"] if row["accuracy"]["mean"] is not None]
    methods = [row for row in summary if not row["control"]]
    controls = [row for row in summary if row["control"]]
    said = []
    if methods:
        said += _best_of(methods, comparison, str(first["task"].get("metric") or "accuracy"))
        said += _rivals(groups)
    if controls:
        values = [f"{row['label']} {percent(row['accuracy']['mean'])}" for row in controls]
        noun = "Control, no federated method" if len(controls) == 1 else "Controls, no federated "
        said.append(f"{noun}{'' if len(controls) == 1 else 'methods'}: {spoken(values)}.")
    if failed := [label for label in groups if label not in {row["label"] for row in summary}]:
        said.append(f"No finite final value in every seed: {spoken(failed)}.")
    return said


def _best_of(
    methods: Sequence[Mapping[str, Any]], comparison: Comparison, metric: str
) -> list[str]:
    order = sorted(methods, key=lambda row: -row["accuracy"]["mean"])
    best, seeds = order[0], len(order[0]["seeds"])
    value = percent(best["accuracy"]["mean"])
    lead = (
        f"{best['label']} ends at {value} {metric}."
        if len(order) == 1
        else f"{best['label']} ends with the highest {metric} of the {len(order)} federated "
        f"methods: {value}."
    )
    bounds = interval(best["accuracy"], percent)
    within = f" (95% interval {bounds})" if bounds else ""
    support = (
        f"That is the mean of {seeds} seeds{within}."
        if seeds > 1
        else "That is one seed, which cannot say how much of it is chance."
    )
    first = comparison["summary"][0]
    paired = {pair["label"]: pair for pair in comparison["paired"]}
    if best["label"] != first["label"]:
        role = "a control" if first["control"] else "the method that all are held to"
        difference = difference_and_verdict(paired[best["label"]])
        support += f" Against {first['label']}, {role}, the difference is {difference}."
    elif len(order) > 1:
        second = order[1]["label"]
        difference = difference_and_verdict(paired[second])
        support += f" Next is {second}; its difference to {best['label']} is {difference}."
    return [lead, support]


def _rivals(groups: Groups) -> list[str]:
    """Name the methods that the seeds do not set apart from the best one."""
    ends = _ends(methods_of(groups))
    best, *others = sorted(ends, key=lambda label: -fmean(ends[label]))
    level = [label for label in others if max(ends[label]) >= min(ends[best])]
    if not level or min(len(values) for values in ends.values()) < 2:
        return []
    names = spoken(level) if len(level) <= 3 else f"{len(level)} other methods"
    return [f"Its seeds and those of {names} overlap, so which of them is best is not settled."]


def difference_and_verdict(pair: Mapping[str, Any]) -> str:
    """Say what a paired difference in accuracy is, and whether the seeds support it."""
    difference = pair["accuracy"]
    if difference["mean"] is None:
        return f"unknown ({pair['verdict']})"
    bounds = interval(difference, lambda value: points(value, unit=False))
    within = f" (paired by seed, 95% interval {bounds})" if bounds else ""
    verdicts = {
        "better": "the seeds support that it is better",
        "worse": "the seeds support that it is worse",
    }
    verdict = verdicts.get(pair["verdict"], pair["verdict"])
    if pair["verdict"] not in verdicts and bounds and difference["low"] * difference["high"] > 0:
        # The interval alone leaves out zero: without this the sentence contradicts itself.
        verdict += " once corrected for several comparisons"
    return f"{points(difference['mean'])}{within}: {verdict}"


def copra_effects(comparison: Comparison) -> list[str]:
    """Say for each pair of runs with and without CopRA what it changed."""
    return [
        f"With CopRA, the accuracy of {pair['strategy']} changes by {difference_and_verdict(pair)}."
        for pair in comparison["copra"]
    ]


def _ends(groups: Groups) -> dict[str, list[float]]:
    """Return the final accuracies of the labels of which every seed has one."""
    ends = {label: [accuracy(record) for record in members] for label, members in groups.items()}
    return {
        label: [value for value in values if value is not None]
        for label, values in ends.items()
        if None not in values
    }


def standing(groups: Groups) -> str:
    """Say who ends highest, and whether the seeds of others reach up to it."""
    ends = _ends(methods_of(groups) or groups)
    if not ends:
        return "No method ended with a finite value in every seed."
    best, *others = sorted(ends, key=lambda label: -fmean(ends[label]))
    if not others:
        starts = [
            value
            for record in groups[best]
            if (value := finite(record["start"]["accuracy"])) is not None
        ]
        before = f" from {percent(fmean(starts))}" if starts else ""
        return f"{best} goes{before} to {percent(fmean(ends[best]))}."
    if min(len(values) for values in ends.values()) < 2:
        gap = points(fmean(ends[best]) - fmean(ends[others[0]]), sign=False)
        return (
            f"{best} ends highest, {gap} above {others[0]}. With one seed there is no seed spread "
            "to hold this against: another seed may order them otherwise."
        )
    level = [label for label in others if max(ends[label]) >= min(ends[best])]
    below = [label for label in others if label not in level]
    said = []
    if level:
        said.append(
            f"{best} ends highest on average, but its seeds and those of {spoken(level)} overlap: "
            "within the seed spread these lines are not told apart."
        )
    if below:
        rest = spoken(below) if len(below) <= 3 else f"the other {len(below)} methods"
        said.append(f"Every seed of {best} ends above every seed of {rest}.")
    return " ".join(said)


def climb(lines: Sequence[Line]) -> str:
    """Say which mean lines still rose by more than a point in the last quarter of the rounds."""
    last = int(max((line.x[-1] for line in lines if line.x), default=0))
    quarter = last // 4
    if not quarter:
        return ""
    gains = {}
    for line in lines:
        means = dict(zip(line.x, line.mean, strict=True))
        gains[line.label] = means.get(last, -math.inf) - means.get(last - quarter, math.inf)
    rising = [label for label, gain in gains.items() if gain > 0.01]
    span = "round" if quarter == 1 else f"{quarter} rounds"
    if not rising:
        return f"No line gained more than a point in the last {span}."
    if len(rising) <= 3:
        who = spoken(rising)
    else:
        share = (
            "every line" if len(rising) == len(lines) else f"{len(rising)} of {len(lines)} lines"
        )
        who = f"{share} ({max(gains, key=lambda label: gains[label])} most)"
    return (
        f"In the last {span} {who} still gained more than a point: "
        "more rounds may change the picture."
    )


def price(lines: Sequence[Line]) -> str:
    """Say what it cost to reach the highest accuracy that every method reaches."""
    if len(lines) == 1:
        (line,) = lines
        target = 0.95 * line.mean[-1]
        reached = f"95% of its final value, {percent(target)},"
    else:
        target = min(max(line.mean) for line in lines)
        reached = f"{percent(target)}, the most that every method here reaches,"
    cost = {
        line.label: next(x for x, mean in zip(line.x, line.mean, strict=True) if mean >= target)
        for line in lines
    }
    cheap, dear = min(cost, key=lambda k: cost[k]), max(cost, key=lambda k: cost[k])
    if len(lines) == 1:
        total = amount_of_bytes(lines[0].x[-1])
        return f"{cheap} reaches {reached} after {amount_of_bytes(cost[cheap])} of {total}."
    if cost[dear] <= 1.02 * cost[cheap]:
        return (
            f"All need about the same traffic, {amount_of_bytes(cost[cheap])}, for {reached[:-1]}."
        )
    return (
        f"For {reached} {cheap} needs the least traffic, {amount_of_bytes(cost[cheap])}, and "
        f"{dear} the most, {amount_of_bytes(cost[dear])} (mean lines; seeds differ)."
    )


def skew(counts: Any) -> str:
    """Compare the clients' label shares with the federation's, and with what sampling would do."""
    sizes = counts.sum(axis=1)
    counts, sizes = counts[sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        return "No client holds an example."
    pooled = counts.sum(axis=0) / counts.sum()
    distance = float(np.mean(np.abs(counts / sizes[:, None] - pooled).sum(axis=1) / 2))
    # E|p̂ - p| of a binomial share, by the normal approximation, summed over labels.
    deviation = np.sqrt(2 * pooled * (1 - pooled) / (np.pi * sizes[:, None]))
    by_chance = min(float(np.mean(deviation.sum(axis=1) / 2)), 1.0)
    rules = (
        (1.5 * by_chance, "labels are spread as evenly as random dealing would"),
        (max(0.4, 1.5 * by_chance), "labels are moderately skewed"),
        (math.inf, "labels are strongly skewed"),
    )
    verdict = next(words for limit, words in rules if distance <= limit)
    return (
        f"On average {percent(distance, 0)} of a client's examples would need another label to "
        f"match the whole federation (about {percent(by_chance, 0)} by chance alone): {verdict}."
    )


def exactness(groups: Groups, lines: Mapping[str, Line]) -> str:
    """Say which methods serve the exact mean, how far off others are, and what that goes with."""
    exact = [label for label, line in lines.items() if max(line.mean) <= EXACT]
    said = []
    if exact:
        verb = "serves" if len(exact) == 1 else "serve"
        said.append(f"Up to rounding, {spoken(exact)} {verb} the exact mean.")
    said += [
        f"{label} is off by {rough_percent(line.mean[-1])} in the last round (at most "
        f"{rough_percent(max(line.mean))} in any)."
        for label, line in lines.items()
        if label not in exact
    ]
    ends = {
        label: fmean(values)
        for label, values in _ends(methods_of(groups)).items()
        if label in lines
    }
    if exact and len(exact) < len(ends):
        best = max(ends, key=lambda label: ends[label])
        said.append(
            f"The highest mean accuracy among these belongs to {best}, "
            + (
                "which is exact; that alone does not make exactness the cause."
                if best in exact
                else "which is not exact: a small error alone does not decide the accuracy."
            )
        )
    return " ".join(said)


def time_spent(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Say how much of a round is merging and who is fastest, on this machine."""
    order = sorted(seconds, key=lambda label: seconds[label]["wall"])
    dearest = max(seconds, key=lambda label: seconds[label]["merge"])
    wall = seconds[dearest]["wall"]
    share = f", {percent(seconds[dearest]['merge'] / wall)} of its round" if wall > 0 else ""
    merge = f"takes {duration(seconds[dearest]['merge'])} a round{share}"
    if len(order) == 1:
        said = f"The merge {merge}; a round lasts {duration(wall)}."
    else:
        said = (
            f"The longest merge is that of {dearest}: it {merge}. A round lasts from "
            f"{duration(seconds[order[0]]['wall'])} ({order[0]}) to "
            f"{duration(seconds[order[-1]]['wall'])} ({order[-1]})."
        )
    return f"{said} Seconds are of the machine that ran this, with whatever else it was doing."
