"""Compare finished runs by their records: means over seeds, paired differences, and what they show.

Pure: plain records go in, a plain `comparison.json` comes out; no file, no clock, no random number.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from common.errors import DataError

Record = Mapping[str, Any]
Groups = Mapping[str, Sequence[Record]]
Comparison = dict[str, Any]
Quantity = Callable[[Record], float | None]

SIGNIFICANCE = 0.05

METHOD = (
    "Final values are those of the last round, never the best one. Per label: mean over seeds with "
    "a two-sided 95% Student t interval (n - 1 degrees of freedom), not cut off at 0 or 1; with "
    "fewer than two seeds there is no interval. Between labels: the difference to the first label "
    "within each seed that both have, then mean, t interval and t test of these paired "
    "differences, because runs of one seed share data partition, initial weights and sampling. "
    "p values are two-sided; p_holm corrects them for the number of labels compared with the first "
    "(Holm's step-down method, accuracy and loss each as one family; the CopRA pairs are families "
    "of their own). The verdict is about accuracy: 'better' or 'worse' if p_holm < 0.05, which is "
    "when the interval widened by Holm's correction leaves out zero; otherwise 'no difference "
    "shown', which is not the same as 'equal'. The printed interval is the uncorrected one, so it "
    "can leave out zero where the verdict does not. Differences that do not vary at all over the "
    "seeds leave a t test nothing to judge by: p is null unless they are all zero. A run without a "
    "finite value leaves its label without a mean, rather than with a flattering one."
)


def compare(records: Sequence[Record]) -> Comparison:
    """Return the comparison of the runs; the label of the first record is what others are held to.

    Labels keep the order of first appearance. Two records of one label and seed are a mistake:
    a seed must count once, or the intervals would be too narrow.
    """
    groups = by_label(records)
    first, *others = groups
    return {
        "method": METHOD,
        "rows": [_row(record) for record in records],
        "summary": [_summary(label, members) for label, members in groups.items()],
        "paired": _paired_family(
            [
                {"label": label, "against": first, **_paired(groups[label], groups[first])}
                for label in others
            ]
        ),
        "copra": _paired_family(
            [
                {
                    "strategy": groups[on][0]["strategy"]["name"],
                    "label": on,
                    "against": off,
                    **_paired(groups[on], groups[off]),
                    "bytes": _paired_difference(groups[on], groups[off], total_bytes),
                    "training_seconds": _paired_difference(groups[on], groups[off], training_time),
                }
                for on, off in copra_pairs(groups)
            ]
        ),
    }


def by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group the records by label, in order of first appearance."""
    if not records:
        raise DataError("There is no run to compare")
    groups: dict[str, list[Record]] = {}
    for record in records:
        members = groups.setdefault(record["label"], [])
        if any(member["seed"] == record["seed"] for member in members):
            raise DataError(
                f"Two runs are called {record['label']} and have seed {record['seed']}: "
                "give one run for each label and seed"
            )
        members.append(record)
    return groups


def methods_of(groups: Groups) -> dict[str, Sequence[Record]]:
    """Return the labels that are federated methods, not controls."""
    return {
        label: members for label, members in groups.items() if not members[0]["strategy"]["control"]
    }


def copra_pairs(groups: Groups) -> list[tuple[str, str]]:
    """Return (label with CopRA, label without) wherever every other setting is the same."""
    settings = {label: _settings_without_copra(members[0]) for label, members in groups.items()}
    enabled = [label for label, members in groups.items() if copra_enabled(members[0])]
    pairs = []
    for on in enabled:
        partners = [off for off in groups if off not in enabled and settings[off] == settings[on]]
        # One partner is enough: where CopRA is off its other settings have no effect.
        pairs += [(on, off) for off in partners[:1]]
    return pairs


def copra_enabled(record: Record) -> bool:
    """Say whether the run trained with CopRA."""
    return bool(record["experiment"].get("copra", {}).get("enabled"))


def _settings_without_copra(record: Record) -> str:
    settings = {key: value for key, value in record["experiment"].items() if key != "copra"}
    federation = dict(settings.get("federation", {}))
    federation.pop("seed", None)
    return json.dumps({**settings, "federation": federation}, sort_keys=True)


# What is compared, each as a function of one record.


def finite(value: Any) -> float | None:
    """Return the number, or None where there is none: absent, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


def accuracy(record: Record) -> float | None:
    """Accuracy after the last round."""
    return finite(record["final"]["accuracy"])


def loss(record: Record) -> float | None:
    """Loss after the last round."""
    return finite(record["final"]["loss"])


def bytes_up(record: Record) -> float | None:
    """Bytes from all clients to the server, over all rounds."""
    return _total(entry["bytes"]["up"]["total"] for entry in record["rounds"])


def bytes_down(record: Record) -> float | None:
    """Bytes from the server to all clients, over all rounds."""
    return _total(entry["bytes"]["down"]["total"] for entry in record["rounds"])


def total_bytes(record: Record) -> float | None:
    """Bytes in both directions, over all clients and rounds."""
    return _total((bytes_up(record), bytes_down(record)))


def training_time(record: Record) -> float | None:
    """Seconds of local training, summed over clients and rounds."""
    return _total(entry["seconds"]["training"] for entry in record["rounds"])


def last_aggregation_error(record: Record) -> float | None:
    """Relative distance of the served update from the exact mean, in the last round."""
    return finite(record["rounds"][-1].get("aggregation_error")) if record["rounds"] else None


def _total(values: Any) -> float | None:
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if len(known) == len(numbers) else None


def _row(record: Record) -> dict[str, Any]:
    return {
        "label": record["label"],
        "strategy": record["strategy"]["name"],
        "seed": record["seed"],
        "accuracy": accuracy(record),
        "loss": loss(record),
        "bytes_up": bytes_up(record),
        "bytes_down": bytes_down(record),
        "training_seconds": training_time(record),
        "digest": record["digest"],
    }


def _summary(label: str, members: Sequence[Record]) -> dict[str, Any]:
    tasks = list(members[0]["final"].get("tasks") or {})
    per_task = {
        task: interval_over_seeds([finite(m["final"]["tasks"][task]["accuracy"]) for m in members])
        for task in tasks
    }
    return {
        "label": label,
        "strategy": members[0]["strategy"]["name"],
        "control": bool(members[0]["strategy"]["control"]),
        "seeds": [member["seed"] for member in members],
        "accuracy": interval_over_seeds([accuracy(member) for member in members]),
        "loss": interval_over_seeds([loss(member) for member in members]),
        "bytes_up": _mean([bytes_up(member) for member in members]),
        "bytes_down": _mean([bytes_down(member) for member in members]),
        "aggregation_error": _mean([last_aggregation_error(member) for member in members]),
        **({"tasks": per_task} if per_task else {}),
    }


# Statistics.


def interval_over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean, 95% Student t interval and standard deviation (n - 1) of one value per seed.

    With one seed only the mean is known; with a value missing nothing is.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "low": None, "high": None, "sd": None}
    mean = float(np.mean(known))
    if len(known) < 2:
        return {"mean": mean, "low": None, "high": None, "sd": None}
    sd = float(np.std(known, ddof=1))
    # Equal numbers must have no spread, though their mean may be off in the last bit.
    if sd <= 1e-12 * max(abs(value) for value in known):
        sd = 0.0
    degrees = len(known) - 1
    half = float(stats.t.ppf(1 - SIGNIFICANCE / 2, degrees)) * sd / math.sqrt(len(known))
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values, in the order given; None is no test and does not count.

    The k-th smallest of m is multiplied by m - k + 1, and no adjusted value may fall below that
    of a smaller one: controls the chance of any false finding without assuming independence.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _mean(values: Sequence[float | None]) -> float | None:
    return interval_over_seeds(values)["mean"]


def _paired(members: Sequence[Record], against: Sequence[Record]) -> dict[str, Any]:
    reference = {record["seed"] for record in against}
    return {
        "seeds": [record["seed"] for record in members if record["seed"] in reference],
        "accuracy": _paired_difference(members, against, accuracy),
        "loss": _paired_difference(members, against, loss),
    }


def _paired_difference(
    members: Sequence[Record], against: Sequence[Record], quantity: Quantity
) -> dict[str, float | None]:
    """Return the mean difference over common seeds, its interval, and the t test against zero."""
    reference = {record["seed"]: quantity(record) for record in against}
    differences: list[float | None] = []
    largest = 0.0
    for record in members:
        if record["seed"] in reference:
            here, there = quantity(record), reference[record["seed"]]
            differences.append(None if here is None or there is None else here - there)
            largest = max(largest, abs(here or 0.0), abs(there or 0.0))
    # 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit only: rounding is no spread.
    grain = 1e-12 * largest
    known = [value for value in differences if value is not None]
    if known and max(known) - min(known) <= grain:
        level = 0.0 if abs(known[0]) <= grain else known[0]
        differences = [None if value is None else level for value in differences]
    result = interval_over_seeds(differences)
    return {**result, "p": _t_test(result, len(differences))}


def _t_test(differences: Mapping[str, float | None], count: int) -> float | None:
    mean, sd = differences["mean"], differences["sd"]
    if mean is None or sd is None:
        return None
    if sd == 0:
        return 1.0 if mean == 0 else None
    return float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(count)), count - 1))


def _paired_family(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm's p values over all the pairs, and what accuracy lets one say of each."""
    for name in ("accuracy", "loss"):
        for pair, adjusted in zip(pairs, holm([p[name]["p"] for p in pairs]), strict=True):
            pair[name]["p_holm"] = adjusted
    return [{**pair, "verdict": _verdict(pair)} for pair in pairs]


def _verdict(pair: Mapping[str, Any]) -> str:
    difference = pair["accuracy"]
    if not pair["seeds"]:
        return "no seed in common"
    if difference["mean"] is None:
        return "cannot tell: a run has no finite accuracy"
    if len(pair["seeds"]) == 1:
        return "one seed cannot tell"
    if difference["p_holm"] is None:
        return "cannot tell: the same difference in every seed"
    if difference["p_holm"] < SIGNIFICANCE:
        return "better" if difference["mean"] > 0 else "worse"
    return "no difference shown"
