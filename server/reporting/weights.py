"""The panel of weights: how far a merge departs from what the data alone would say."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from server.reporting.comparison import Groups, Record
from server.reporting.drawing import SERIES, Cells, draw, opacity, paint_cells, square
from server.reporting.figures import Key, Panel
from server.reporting.wording import count_of, spoken

_SAME = 1e-6


def weight_panels(groups: Groups) -> list[Panel]:
    """Return one panel a label whose merges gave weights of their own: of its first seed."""
    departing = {
        label: record
        for label, members in groups.items()
        if (record := next((r for r in members if _departs(_ratios(r))), None))
    }
    return [
        _panel(label, record, number) for number, (label, record) in enumerate(departing.items())
    ]


def _departs(ratios: Cells) -> bool:
    found = ratios[~np.isnan(ratios)]
    return bool((abs(found - 1) > _SAME).any())


def _ratios(record: Record) -> Cells:
    """Return (clients, rounds): weight over share of the round's examples; NaN where absent."""
    clients = [client["client"] for client in record["task"]["clients"]]
    ratios = np.full((len(clients), len(record["rounds"])), math.nan)
    for column, entry in enumerate(record["rounds"]):
        sound = [c for c in entry.get("clients", []) if c["status"] == "ok"]
        total = sum(c["num_examples"] for c in sound)
        for client in sound:
            if total and client["client"] in clients:
                share = client["num_examples"] / total
                ratios[clients.index(client["client"]), column] = client["weight"] / share
    return ratios


def _panel(label: str, record: Record, number: int) -> Panel:
    ratios = _ratios(record)
    largest = max(float(np.nanmax(ratios)), 1.0)
    clients = [client["client"] for client in record["task"]["clients"]]
    rounds = [entry["round"] for entry in record["rounds"]]
    left_out = np.argwhere(ratios == 0)

    def paint(axes: Axes) -> None:
        paint_cells(axes, np.nan_to_num(ratios) / largest, SERIES[0])
        axes.plot(left_out[:, 1], left_out[:, 0], "x", color=SERIES[1], markersize=5)
        axes.set(xlabel="round", ylabel="client")
        step = math.ceil(len(rounds) / 12)
        axes.set_xticks(range(0, len(rounds), step), [str(n) for n in rounds[::step]])
        step = math.ceil(len(clients) / 16)
        axes.set_yticks(range(0, len(clients), step), [str(k) for k in clients[::step]])

    return Panel(
        name=f"weights-by-client-{number}",
        heading="Whom did the merge count more, and whom less?",
        shows=f"{label}, seed {record['seed']}: the weight of each client's update over its share "
        "of the round's examples, by client (rows) and round (columns). A cross: left out. Blank: "
        "not there.",
        conclusion=_conclusion(ratios, clients),
        drawing=draw(
            f"weights-by-client-{number}",
            "Weights by client and round",
            paint,
            height=min(6.0, 1.1 + 0.2 * max(len(clients), 6)),
        ),
        legend=[
            Key(f"{share * largest:.2g} times its share", square(SERIES[0], opacity(share)))
            for share in sorted({round(1 / largest, 3), 1.0})
        ],
    )


def _conclusion(ratios: Cells, clients: Sequence[int]) -> str:
    there = ~np.isnan(ratios)
    changed = there & (abs(np.nan_to_num(ratios, nan=1.0) - 1) > _SAME)
    rounds = int(changed.any(axis=0).sum())
    said = f"In {rounds} of {count_of(ratios.shape[1], 'round')} weights were not the data's."
    gone = (ratios == 0).sum(axis=1)
    often = [f"client {clients[k]} ({gone[k]} times)" for k in np.argsort(-gone) if gone[k]]
    return f"{said} Left out: {spoken(often[:5])}." if often else f"{said} Nobody was left out."
