"""What the data say, in sentences: each follows from the records by a simple rule."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from server.reporting.comparison import (
    DIRECTIONS,
    Comparison,
    Groups,
    Quantity,
    accuracy,
    finite,
    methods_of,
    own_accuracy,
    personalised,
    single_models,
)
from server.reporting.drawing import Cells, Line
from server.reporting.wording import (
    amount_of_bytes,
    duration,
    interval,
    percent,
    points,
    rough_percent,
    spoken,
)

LITTLE = 0.01
EXACT = 1e-5  # float32 arithmetic over a few hundred layers stays below it


def headline(groups: Groups, comparison: Comparison) -> list[str]:
    """Answer in plain words: who is best, what supports it, and where the controls are."""
    first = next(iter(groups.values()))[0]
    summary = [row for row in comparison["summary"] if row["accuracy"]["mean"] is not None]
    methods = [row for row in summary if not row["control"]]
    controls = [row for row in summary if row["control"]]
    said = []
    metric = str(first["task"].get("metric") or "accuracy")
    if methods:
        said += _best_of(methods, comparison, metric)
        said += _rivals(single_models(groups))
    said += _own_ends(groups, comparison, metric)
    if controls:
        values = [f"{row['label']} {percent(row['accuracy']['mean'])}" for row in controls]
        noun = "Control, no federated method" if len(controls) == 1 else "Controls, no federated "
        said.append(f"{noun}{'' if len(controls) == 1 else 'methods'}: {spoken(values)}.")
    known = {row["label"] for row in summary} | _ends(personalised(groups), own_accuracy).keys()
    if failed := [label for label in groups if label not in known]:
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


def _own_ends(groups: Groups, comparison: Comparison, metric: str) -> list[str]:
    """Say how personalised methods end, on the only measure that they have."""
    ends = _ends(personalised(groups), own_accuracy)
    pairs = {pair["label"]: pair for pair in comparison["own"]["paired"]}
    said = []
    for label, values in ends.items():
        end = f"{label}, personalised, ends at {percent(fmean(values))} {metric} on clients' own "
        against = ""
        if label in pairs:
            difference = difference_and_verdict(pairs[label], "own_accuracy")
            against = f" Against {pairs[label]['against']}, judged alike, it is {difference}."
        said.append(f"{end}labels.{against}")
    return said


def _rivals(groups: Groups) -> list[str]:
    """Name the methods that the seeds do not set apart from the best one."""
    ends = _ends(methods_of(groups))
    best, *others = sorted(ends, key=lambda label: -fmean(ends[label]))
    level = [label for label in others if max(ends[label]) >= min(ends[best])]
    if not level or min(len(values) for values in ends.values()) < 2:
        return []
    names = spoken(level) if len(level) <= 3 else f"{len(level)} other methods"
    return [f"Its seeds and those of {names} overlap, so which of them is best is not settled."]


def difference_and_verdict(pair: Mapping[str, Any], measure: str = "accuracy") -> str:
    """Say what a paired difference in accuracy is, and whether the seeds support it."""
    difference = pair[measure]
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
    ] + [
        f"With CopRA, the accuracy of {pair['strategy']} on clients' own labels changes by "
        f"{difference_and_verdict(pair, 'own_accuracy')}."
        for pair in comparison["own"]["copra"]
    ]


def _ends(groups: Groups, quantity: Quantity = accuracy) -> dict[str, list[float]]:
    """Return the final accuracies of the labels of which every seed has one."""
    ends = {label: [quantity(record) for record in members] for label, members in groups.items()}
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


def own_standing(groups: Groups) -> str:
    """Say who ends where on clients' own labels: personalised methods, single models, controls."""
    ends = _ends(groups, own_accuracy)
    if not ends:
        return "No label ended with a finite value in every seed."
    apart = personalised(groups)
    kinds = {
        "personalised": [label for label in ends if label in apart],
        "with one model for all": [k for k in methods_of(groups) if k in ends and k not in apart],
        "among the controls": [k for k in ends if k not in methods_of(groups)],
    }
    best = {
        kind: max(labels, key=lambda label: fmean(ends[label]))
        for kind, labels in kinds.items()
        if labels
    }
    # The first two kinds there are stand against each other.
    rivals = sorted(list(best.values())[:2], key=lambda label: -fmean(ends[label]))
    order = sorted(best, key=lambda kind: -fmean(ends[best[kind]]))
    named = [f"{best[kind]} {kind}, {percent(fmean(ends[best[kind]]))}" for kind in order]
    highest = "Best on clients' own labels" if len(order) == 1 else "Best of each kind"
    said = f"{highest}: {'; '.join(named)}."
    if len(order) < 2:
        return said
    one, other = rivals
    if min(len(ends[one]), len(ends[other])) < 2:
        return f"{said} With one seed there is no seed spread to hold this against."
    if max(ends[other]) >= min(ends[one]):
        return f"{said} The seeds of {one} and {other} overlap."
    return f"{said} Every seed of {one} ends above every seed of {other}."


def climb(lines: Sequence[Line]) -> str:
    """Say which mean lines still rose by more than a point in the last quarter of the rounds."""
    last = int(max((line.x[-1] for line in lines if line.x), default=0))
    quarter = last // 4
    if not quarter:
        return ""
    # Between two scores a line is straight, in the drawing too.
    gains = {
        line.label: line.mean[-1] - float(np.interp(last - quarter, line.x, line.mean))
        for line in lines
        if line.x and line.x[-1] == last
    }
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


def within_budgets(bought: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> str:
    """Say which method has the highest mean accuracy by each budget of bytes."""
    leaders = []
    for place, limit in enumerate(limits):
        means = {row["label"]: row["accuracy"][place]["mean"] for row in bought}
        known = {label: mean for label, mean in means.items() if mean is not None}
        if len(known) < 2:
            return ""
        leader = max(known, key=lambda label: known[label])
        # Before its first score every method stands where all started.
        if known[leader] > min(known.values()):
            leaders.append(f"{leader} by {amount_of_bytes(limit)} ({percent(known[leader])})")
    return f"Ahead on average: {spoken(leaders)}." if leaders else ""


def traffic(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say whose clients send and receive least and most, and how much of it is overhead."""
    both = {
        row["label"]: math.fsum(row[direction]["total"] for direction in DIRECTIONS)
        for row in ledger
        if not row["control"] and row["up"]["total"] + row["down"]["total"] > 0
    }
    if not both:
        return ["No federated method sent anything."]
    rows = {row["label"]: row for row in ledger if row["label"] in both}
    low, high = min(both, key=lambda k: both[k]), max(both, key=lambda k: both[k])
    each = f"{low} sends and receives {amount_of_bytes(both[low])} a round, both ways"
    said = [f"A client of {each}."]
    if both[high] > 1.02 * both[low]:
        said = [
            f"A client of {each}, the least here; one of {high} {amount_of_bytes(both[high])}, "
            "the most."
        ]
    elif len(both) > 1:
        said = [f"All need about the same: a client of {each}."]
    overhead = {
        label: math.fsum(row[direction]["protocol"] for direction in DIRECTIONS) / both[label]
        for label, row in rows.items()
    }
    small, large = min(overhead.values()), max(overhead.values())
    shares = percent(small) if large - small < 0.001 else f"{percent(small)} to {percent(large)}"
    said.append(f"Of that, {shares} is protocol: names, headers and the plan, no numbers.")
    said += [
        f"A client of {label} receives {row['down']['total'] / row['up']['total']:.2g} times what "
        "it sends."
        for label, row in rows.items()
        if row["up"]["total"] > 0 and row["down"]["total"] > 1.5 * row["up"]["total"]
    ]
    said += [
        f"Asking clients of {label} to score their own models took {amount_of_bytes(cost)} a run, "
        "counted nowhere else."
        for label, row in rows.items()
        if (cost := row["evaluation"])
    ]
    return said


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


def worth_of_exactness(
    covariances: Mapping[str, Cells], names: Mapping[str, Sequence[str]], last: Mapping[str, float]
) -> str:
    """Say what averaging factors would have missed in the last round, and in which module most.

    `covariances`: by label, (modules, rounds); `names` of these modules; `last` over all modules.
    """
    order = sorted(last, key=lambda label: -last[label])
    said = []
    for label in order if len(order) <= 3 else (order[0], order[-1]):
        if last[label] <= EXACT:
            said.append(f"On the updates of {label}, averaging the factors would miss nothing.")
            continue
        cells = covariances[label][:, -1]
        worst = int(cells.argmax())
        said.append(
            f"On the updates of {label}, averaging the factors would miss "
            f"{rough_percent(last[label])} of the exact mean in the last round, most in "
            f"{names[label][worst]} ({rough_percent(float(cells[worst]))})."
        )
    if len(order) > 3:
        said.append(f"The other {len(order) - 2} lie between these two.")
    if order and last[order[0]] < LITTLE:
        said.append(f"Below {percent(LITTLE, 0)}, exact merging has next to nothing to put right.")
    return " ".join(said)


def time_spent(seconds: Mapping[str, Mapping[str, float]], reused: float = 0.0) -> str:
    """Say how much of a round is merging and who is fastest, on this machine.

    `reused` is the share of clients' trainings that were taken from another run of the comparison.
    """
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
    if reused:
        said += (
            f" {percent(reused, 0)} of the trainings had been done by another run and were not "
            "done again: rounds are not to be compared by their length here."
        )
    return f"{said} Seconds are of the machine that ran this, with whatever else it was doing."
