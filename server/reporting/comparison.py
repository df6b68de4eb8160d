"""Compare finished runs by their records: means over seeds, paired differences, and what they show.

Pure: plain records go in, a plain `comparison.json` comes out; no file, no clock, no random number.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import special

from common.errors import DataError

Record = Mapping[str, Any]
Groups = Mapping[str, Sequence[Record]]
Comparison = dict[str, Any]
Quantity = Callable[[Record], float | None]

SIGNIFICANCE = 0.05

# What a label may have received by a budget: bytes differ by a few per cent between methods and
# seeds for no reason but headers, and must not cost any of them a whole round.
BUDGETS, SLACK = (0.25, 0.5, 1.0), 0.01
DIRECTIONS = ("up", "down")

METHOD = (
    "Final values are those of the last round, never the best one. Per label: mean over seeds with "
    "a two-sided 95% Student t interval (n - 1 degrees of freedom), not cut off at 0 or 1; with "
    "fewer than two seeds there is no interval. Between labels: the difference to the first label "
    "within each seed that both have, then mean, t interval and t test of these paired "
    "differences, because runs of one seed share data partition, initial weights and sampling. "
    "p values are two-sided; p_holm corrects them for the number of labels compared with the first "
    "(Holm's step-down method, each measure as one family; the CopRA pairs are families of their "
    "own). The verdict is about accuracy: 'better' or 'worse' if p_holm < 0.05, which is "
    "when the interval widened by Holm's correction leaves out zero; otherwise 'no difference "
    "shown', which is not the same as 'equal'. The printed interval is the uncorrected one, so it "
    "can leave out zero where the verdict does not. Differences that do not vary at all over the "
    "seeds leave a t test nothing to judge by: p is null unless they are all zero. A run without a "
    "finite value leaves its label without a mean, rather than with a flattering one. "
    "Personalised methods have no single model: they stand only under 'own', a family apart, in "
    "which every label is judged on rows weighted like each client's labels, mean over clients. "
    "The area is that under the curve over rounds, by trapezoids from the start (round 0) to the "
    "last round, divided by the number of rounds; a round that was not scored lies on the straight "
    "line between its neighbours. Budgets are 25, 50 and 100% of the bytes, both ways, of the "
    "method that sends least; counted is the last score known by then, with 1% of slack."
)


def compare(records: Sequence[Record]) -> Comparison:
    """Return the comparison of the runs; the label of the first record is what others are held to.

    Labels keep the order of first appearance. Two records of one label and seed are a mistake:
    a seed must count once, or the intervals would be too narrow. Under `own` every label stands
    with the scores on its clients' own labels; all else leaves personalised labels out.
    """
    groups = by_label(records)
    single = single_models(groups)
    limits = byte_budgets(groups)
    return {
        "method": METHOD,
        "rows": [_row(record, limits) for record in records],
        "summary": [_summary(label, members) for label, members in single.items()],
        "paired": _against_first(single, _SCORES),
        "copra": _copra_family(single, _SCORES),
        "own": {
            "summary": [_own_summary(label, members) for label, members in groups.items()],
            "paired": _against_first(groups, _OWN_SCORES),
            "copra": _copra_family(personalised(groups), _OWN_SCORES),
        },
        "budgets": {"bytes": limits, "labels": at_budgets(groups, limits)},
        "ledger": ledger(groups),
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


def personalised(groups: Groups) -> dict[str, Sequence[Record]]:
    """Return the labels whose clients each have a model of their own, by the method's intent."""
    return {k: members for k, members in groups.items() if members[0]["strategy"]["personalised"]}


def single_models(groups: Groups) -> dict[str, Sequence[Record]]:
    """Return the labels that are not personalised: methods with one model, and controls."""
    apart = personalised(groups)
    return {label: members for label, members in groups.items() if label not in apart}


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
    """Accuracy after the last round; None where there is no single model."""
    return finite(record["final"]["accuracy"])


def loss(record: Record) -> float | None:
    """Loss after the last round."""
    return finite(record["final"]["loss"])


def own_accuracy(record: Record) -> float | None:
    """Accuracy after the last round on clients' own labels, mean over clients."""
    return finite(record["final"]["own_accuracy"])


def own_loss(record: Record) -> float | None:
    """Loss after the last round on clients' own labels, mean over clients."""
    return finite(record["final"]["own_loss"])


_SCORES: Mapping[str, Quantity] = {"accuracy": accuracy, "loss": loss}
_OWN_SCORES: Mapping[str, Quantity] = {"own_accuracy": own_accuracy, "own_loss": own_loss}


def curve(record: Record, quantity: str) -> list[tuple[int, float]]:
    """Return (round, value) wherever the run was scored; round 0 is the start."""
    scored = [(0, record["start"]), *((entry["round"], entry) for entry in record["rounds"])]
    return [(n, value) for n, row in scored if (value := finite(row[quantity])) is not None]


def area(record: Record, quantity: str) -> float | None:
    """Area under the curve from the start to the last round, over the number of rounds.

    None where either end has no value: what lies outside two scores is not known.
    """
    points = curve(record, quantity)
    last = record["rounds"][-1]["round"] if record["rounds"] else 0
    if not last or not points or (points[0][0], points[-1][0]) != (0, last):
        return None
    return math.fsum((b - a) * (v + w) / 2 for (a, v), (b, w) in pairwise(points)) / last


def bytes_up(record: Record) -> float | None:
    """Bytes from all clients to the server, over all rounds."""
    return _total(entry["bytes"]["up"]["total"] for entry in record["rounds"])


def bytes_down(record: Record) -> float | None:
    """Bytes from the server to all clients, over all rounds."""
    return _total(entry["bytes"]["down"]["total"] for entry in record["rounds"])


def total_bytes(record: Record) -> float | None:
    """Bytes in both directions, over all clients and rounds."""
    return _total((bytes_up(record), bytes_down(record)))


def sent_by(record: Record) -> dict[int, float]:
    """Return {round: bytes in both directions up to its end}; round 0 is the start."""
    sent = {0: 0.0}
    for entry in record["rounds"]:
        both = math.fsum(entry["bytes"][direction]["total"] for direction in DIRECTIONS)
        sent[entry["round"]] = sent[max(sent)] + both
    return sent


def training_time(record: Record) -> float | None:
    """Seconds of local training, summed over clients and rounds."""
    return _total(entry["seconds"]["training"] for entry in record["rounds"])


def wall_time(record: Record) -> float | None:
    """Seconds of the server's clock, summed over rounds."""
    return _total(entry["seconds"]["wall"] for entry in record["rounds"])


def last_aggregation_error(record: Record) -> float | None:
    """Relative distance of the served update from the exact mean, in the last round."""
    return finite(record["rounds"][-1].get("aggregation_error")) if record["rounds"] else None


def _total(values: Any) -> float | None:
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if len(known) == len(numbers) else None


def _row(record: Record, limits: Sequence[float]) -> dict[str, Any]:
    return {
        "label": record["label"],
        "strategy": record["strategy"]["name"],
        "seed": record["seed"],
        "accuracy": accuracy(record),
        "loss": loss(record),
        "area": area(record, "accuracy"),
        "own_accuracy": own_accuracy(record),
        "own_loss": own_loss(record),
        "own_area": area(record, "own_accuracy"),
        "accuracy_at_budgets": None
        if record["strategy"]["control"]
        else [accuracy_within(record, limit) for limit in limits],
        "bytes_up": bytes_up(record),
        "bytes_down": bytes_down(record),
        "training_seconds": training_time(record),
        "wall_seconds": wall_time(record),
        "digest": record["digest"],
    }


def _summary(label: str, members: Sequence[Record]) -> dict[str, Any]:
    return {
        **_who(label, members),
        "accuracy": _interval(members, accuracy),
        "loss": _interval(members, loss),
        "area": interval_over_seeds([area(member, "accuracy") for member in members]),
        **_costs(members),
        "aggregation_error": _interval(members, last_aggregation_error)["mean"],
        **_per_part("tasks", members),
        **_per_part("shifts", members),
    }


def _per_part(kind: str, members: Sequence[Record]) -> dict[str, Any]:
    """Return `{kind: {name: accuracy over seeds}}` of tasks or shifts, or nothing without any."""
    names = list(members[0]["final"].get(kind) or {})
    found = {
        name: interval_over_seeds([finite(m["final"][kind][name]["accuracy"]) for m in members])
        for name in names
    }
    return {kind: found} if found else {}


def _own_summary(label: str, members: Sequence[Record]) -> dict[str, Any]:
    return {
        **_who(label, members),
        "personalised": bool(members[0]["strategy"]["personalised"]),
        "own_accuracy": _interval(members, own_accuracy),
        "own_loss": _interval(members, own_loss),
        "own_area": interval_over_seeds([area(member, "own_accuracy") for member in members]),
        **_costs(members),
    }


def _who(label: str, members: Sequence[Record]) -> dict[str, Any]:
    strategy = members[0]["strategy"]
    return {
        "label": label,
        "strategy": strategy["name"],
        "control": bool(strategy["control"]),
        "seeds": [member["seed"] for member in members],
    }


def _costs(members: Sequence[Record]) -> dict[str, float | None]:
    quantities = {
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "training_seconds": training_time,
        "wall_seconds": wall_time,
    }
    return {name: _interval(members, quantity)["mean"] for name, quantity in quantities.items()}


# What travelled, and what accuracy it bought.


def byte_budgets(groups: Groups) -> list[float]:
    """Return shares of the bytes, both ways, of the single-model method that sends least.

    Its dearest seed counts, so that all of its seeds fit; none where no method sends anything.
    """
    totals = [
        max(max(sent_by(record).values()) for record in members)
        for members in methods_of(single_models(groups)).values()
    ]
    sending = [total for total in totals if total > 0]
    return [share * min(sending) for share in BUDGETS] if sending else []


def accuracy_within(record: Record, limit: float) -> float | None:
    """Return the last accuracy known by the time that `limit` bytes have travelled.

    None where the run ends without an accuracy: what it had before would flatter it.
    """
    if accuracy(record) is None:
        return None
    sent = sent_by(record)
    known = [v for n, v in curve(record, "accuracy") if sent[n] <= limit * (1 + SLACK)]
    return known[-1] if known else None


def at_budgets(groups: Groups, limits: Sequence[float]) -> list[dict[str, Any]]:
    """Return each single-model method's accuracy at each budget, and the bytes of its whole run."""
    return [
        {
            "label": label,
            "accuracy": [
                interval_over_seeds([accuracy_within(record, limit) for record in members])
                for limit in limits
            ],
            "bytes": _interval(members, total_bytes)["mean"],
        }
        for label, members in methods_of(single_models(groups)).items()
    ]


def ledger(groups: Groups) -> list[dict[str, Any]]:
    """Return what travelled, by label and direction: bytes per client and round, mean over seeds.

    `kinds` are the numbers themselves; `protocol` is all the rest of the messages. `least` and
    `most` are the clients with the smallest and the largest mean a round. `evaluation` is what
    asking clients for scores of their own models took in the whole run, counted nowhere else.
    """
    return [
        {
            "label": label,
            "control": bool(members[0]["strategy"]["control"]),
            **{direction: _traffic(members, direction) for direction in DIRECTIONS},
            "evaluation": math.fsum(
                entry["bytes"].get("evaluation", {}).get("total", 0)
                for record in members
                for entry in record["rounds"]
            )
            / len(members),
        }
        for label, members in groups.items()
    ]


def _traffic(members: Sequence[Record], direction: str) -> dict[str, Any]:
    by_record = [_per_client_and_round(record, direction) for record in members]
    kinds = list(dict.fromkeys(kind for sums, _ in by_record for kind in sums))
    mean = {
        kind: math.fsum(s.get(kind, 0.0) for s, _ in by_record) / len(members) for kind in kinds
    }
    clients = [value for _, values in by_record for value in values]
    return {
        "kinds": {k: value for k, value in mean.items() if k not in ("protocol", "total")},
        "protocol": mean.get("protocol", 0.0),
        "total": mean.get("total", 0.0),
        "least": min(clients, default=0.0),
        "most": max(clients, default=0.0),
    }


def _per_client_and_round(record: Record, direction: str) -> tuple[dict[str, float], list[float]]:
    """Return the mean bytes by kind of a client in a round, and the mean total of each client."""
    sums: dict[str, float] = {}
    totals: dict[int, list[float]] = {}
    for entry in record["rounds"]:
        for kind, count in entry["bytes"][direction].items():
            sums[kind] = sums.get(kind, 0.0) + count
        for client in entry["clients"]:
            # A client that never answered has sent nothing.
            spent = client["bytes"].get(direction, {}).get("total", 0)
            totals.setdefault(client["client"], []).append(spent)
    asked = sum(map(len, totals.values()))
    return (
        {kind: total / asked for kind, total in sums.items()} if asked else {},
        [math.fsum(values) / len(values) for values in totals.values()],
    )


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
    # Student's t from scipy.special: scipy.stats, which asks it too, takes as long to import as a
    # whole report takes otherwise.
    quantile = float(special.stdtrit(degrees, 1 - SIGNIFICANCE / 2))
    half = quantile * sd / math.sqrt(len(known))
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


def _interval(members: Sequence[Record], quantity: Quantity) -> dict[str, float | None]:
    return interval_over_seeds([quantity(member) for member in members])


def _against_first(groups: Groups, measures: Mapping[str, Quantity]) -> list[dict[str, Any]]:
    """Hold every label to the first one; the verdict is about the first measure."""
    first, *others = list(groups) or [""]
    return _paired_family(
        [
            {"label": label, "against": first, **_paired(groups[label], groups[first], measures)}
            for label in others
        ],
        measures,
    )


def _copra_family(groups: Groups, measures: Mapping[str, Quantity]) -> list[dict[str, Any]]:
    return _paired_family(
        [
            {
                "strategy": groups[on][0]["strategy"]["name"],
                "label": on,
                "against": off,
                **_paired(groups[on], groups[off], measures),
                "bytes": _paired_difference(groups[on], groups[off], total_bytes),
                "training_seconds": _paired_difference(groups[on], groups[off], training_time),
            }
            for on, off in copra_pairs(groups)
        ],
        measures,
    )


def _paired(
    members: Sequence[Record], against: Sequence[Record], measures: Mapping[str, Quantity]
) -> dict[str, Any]:
    reference = {record["seed"] for record in against}
    return {
        "seeds": [record["seed"] for record in members if record["seed"] in reference],
        **{name: _paired_difference(members, against, of) for name, of in measures.items()},
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
    return float(2 * special.stdtr(count - 1, -abs(mean) / (sd / math.sqrt(count))))


def _paired_family(
    pairs: list[dict[str, Any]], measures: Mapping[str, Quantity]
) -> list[dict[str, Any]]:
    """Add Holm's p values over all the pairs, and what the first measure lets one say of each."""
    for name in measures:
        for pair, adjusted in zip(pairs, holm([p[name]["p"] for p in pairs]), strict=True):
            pair[name]["p_holm"] = adjusted
    judged = next(iter(measures))
    return [{**pair, "verdict": _verdict(pair["seeds"], pair[judged])} for pair in pairs]


def _verdict(seeds: Sequence[int], difference: Mapping[str, Any]) -> str:
    if not seeds:
        return "no seed in common"
    if difference["mean"] is None:
        return "cannot tell: a run has no finite accuracy"
    if len(seeds) == 1:
        return "one seed cannot tell"
    if difference["p_holm"] is None:
        return "cannot tell: the same difference in every seed"
    if difference["p_holm"] < SIGNIFICANCE:
        return "better" if difference["mean"] > 0 else "worse"
    return "no difference shown"
