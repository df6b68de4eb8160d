"""Panels of PAN: at which positions of soft prompts shrinking the vector helps, and when.

PAN (Nemesis, arXiv 2408.13979) asks so of some positions at every step, and weighs their norms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.reporting.comparison import Groups, Record
from server.reporting.drawing import Cells, Line, Mark, draw, paint_lines
from server.reporting.figures import Panel, legend_of
from server.reporting.prompt_maps import MAPS, Kind, drawn_map, first_and_last, shades_of
from server.reporting.wording import percent, points, spoken


@dataclass(frozen=True)
class Questions:
    """How often PAN asked about each position, and at how many of these shrinking helped.

    Both (positions, rounds), over clients and prompts. Where clients are asked once a round and
    share their answers, `helped` is how likely the server takes it to be that shrinking helps, and
    `asked` 1; then they are not `counted`.
    """

    asked: Cells
    helped: Cells
    counted: bool

    @property
    def by_position(self) -> Cells:
        """Return the share of yeses (positions,) over all rounds; NaN where nothing was asked."""
        return _share(self.helped.sum(axis=1), self.asked.sum(axis=1))


def _share(helped: Cells, asked: Cells) -> Cells:
    shares: Cells = np.divide(helped, asked, out=np.full_like(asked, math.nan), where=asked > 0)
    return shares


def _questions(record: Record, kind: Kind) -> Questions | None:
    """Return what PAN asked about these prompts; None if nothing."""
    by_round = [_answers(entry, kind) for entry in record["rounds"]]
    positions = max((len(asked) for answers in by_round for asked, _ in answers), default=0)
    if not positions:
        return None
    asked, helped = np.zeros((2, positions, len(by_round)))
    for number, answers in enumerate(by_round):
        for questions, yeses in answers:
            asked[:, number] += questions
            helped[:, number] += yeses
    return Questions(asked, helped, record["experiment"]["nemesis"]["probing"] == "step")


def _answers(entry: Mapping[str, Any], kind: Kind) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Return questions and yeses by position in a round, for each client and prompt."""
    shared = (entry["merge"] or {}).get("probed", {})
    return [
        *(
            (asked, client["chosen"][name])
            for client in entry["clients"]
            for name, asked in client.get("asked", {}).items()
            if kind.holds(name)
        ),
        *(([1.0] * len(likely), likely) for name, likely in shared.items() if kind.holds(name)),
    ]


def selection_panels(groups: Groups, chosen: Mapping[str, Mark], kind: Kind) -> list[Panel]:
    """Return at which positions shrinking helped, and in which rounds, of labels with PAN."""
    found: dict[str, list[Questions]] = {}
    for label, members in groups.items():
        of_seeds = [of for record in members if (of := _questions(record, kind))]
        if len(of_seeds) == len(members):
            found[label] = of_seeds
    if not found:
        return []
    shown = {label: of_seeds[0] for label, of_seeds in islice(found.items(), MAPS)}
    most = max(float(np.nanmax(_share(of.helped, of.asked))) for of in shown.values())
    return [
        _selection_panel({label: groups[label] for label in found}, found, chosen, kind),
        *(
            _selection_map(groups[label][0], of, most, f"{kind.suffix}-{number}", kind)
            for number, (label, of) in enumerate(shown.items())
            if of.asked.shape[1] > 1
        ),
    ]


def _selection_panel(
    groups: Groups,
    found: Mapping[str, Sequence[Questions]],
    chosen: Mapping[str, Mark],
    kind: Kind,
) -> Panel:
    lines = {label: Line(label, chosen[label]) for label in found}
    for label, line in lines.items():
        shares = np.stack([of.by_position for of in found[label]], axis=1)
        for position in np.flatnonzero(~np.isnan(shares).any(axis=1)):
            line.add(int(position), [float(share) for share in shares[position]])

    def paint(axes: Axes) -> None:
        paint_lines(axes, lines.values())
        axes.set(xlabel="position", ylabel="shrinking helps")
        axes.set_ylim(bottom=0, top=None if any(any(of.high) for of in lines.values()) else 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

    several = any(len(members) > 1 for members in groups.values())
    over_seeds = "; line: mean over seeds, band: from the lowest to the highest" if several else ""
    uncounted = [label for label, of_seeds in found.items() if not of_seeds[0].counted]
    estimated = (
        f" Clients of {spoken(uncounted)} answer once a round: there it is how likely the server "
        "takes a yes to be, which is also the weight, mean over rounds."
        if uncounted
        else ""
    )
    name = f"pan-selection{kind.suffix}"
    return Panel(
        name=name,
        heading="At which positions does shrinking help?",
        shows=f"{kind.called}. PAN asks whether more rows are right with the vector at one "
        "position made shorter and all else as it is, and weighs the norm where they are. The "
        "share of its questions that were answered yes, by position from 0, over all clients and "
        f"rounds{over_seeds}.{estimated}",
        conclusion=_selection_said(found),
        drawing=draw(name, "Share of questions at which shrinking helps, by position", paint),
        legend=legend_of(groups, chosen),
        columns=("Position", *found),
        numbers=[
            [str(position), *(_share_of_seeds(of_seeds, position) for of_seeds in found.values())]
            for position in range(max(len(of_seeds[0].asked) for of_seeds in found.values()))
        ],
    )


def _share_of_seeds(of_seeds: Sequence[Questions], position: int) -> str:
    """Write the share of yeses at a position, over seeds, and of how many questions."""
    if position >= len(of_seeds[0].asked):
        return "–"
    asked = sum(float(of.asked[position].sum()) for of in of_seeds)
    helped = sum(float(of.helped[position].sum()) for of in of_seeds)
    if not asked:
        return "–"
    share = percent(helped / asked)
    return f"{share} of {asked:.0f}" if of_seeds[0].counted else share


def _selection_said(found: Mapping[str, Sequence[Questions]]) -> str:
    """Say how often shrinking helps, where most and least, and how much of that counting is."""
    said = []
    for label, of_seeds in islice(found.items(), MAPS):
        asked = np.sum([of.asked.sum(axis=1) for of in of_seeds], axis=0)
        helped = np.sum([of.helped.sum(axis=1) for of in of_seeds], axis=0)
        shares, whole = _share(helped, asked), float(helped.sum() / asked.sum())
        most, least = int(np.nanargmax(shares)), int(np.nanargmin(shares))
        error = math.sqrt(whole * (1 - whole) / float(asked[asked > 0].mean()))
        counted = of_seeds[0].counted
        of_all = f" of {asked.sum():.0f} questions" if counted else ", as estimated"
        by_chance = f" (±{points(error, sign=False)})" if counted else ""
        apart = (
            f", from {percent(float(shares[least]))} at position {least} to "
            f"{percent(float(shares[most]))} at position {most}{by_chance}"
            if most != least
            else ""
        )
        said.append(f"with {label} in {percent(whole)}{of_all}{apart}")
    errors = (
        " In brackets: one standard error of a position, were all questions independent."
        if any("±" in part for part in said)
        else ""
    )
    rest = len(found) - len(said)
    others = f" The table has the other {rest}." if rest else ""
    return f"Shrinking a vector helps {'; '.join(said)}.{errors}{others}"


def _selection_map(record: Record, of: Questions, most: float, suffix: str, kind: Kind) -> Panel:
    shares = _share(of.helped, of.asked)
    rounds = [entry["round"] for entry in record["rounds"]]
    ends = (0.0, most)
    by_round = _share(of.helped.sum(axis=0), of.asked.sum(axis=0))
    asked = np.flatnonzero(~np.isnan(by_round))
    first, last = int(asked[0]), int(asked[-1])
    name = f"pan-selection-by-round{suffix}"
    return Panel(
        name=name,
        heading="Does shrinking help in every round?",
        shows=f"{kind.called}, {record['label']}, seed {record['seed']}: the share of questions "
        "that were answered yes by position (rows, from 0) and round (columns), over all clients. "
        "Blank: nobody asked. Shades run up to the largest share of all such maps here.",
        conclusion=f"With {record['label']} shrinking helps in {percent(float(by_round[first]))} "
        f"of questions in round {rounds[first]}, and in {percent(float(by_round[last]))} in round "
        f"{rounds[last]}.",
        drawing=drawn_map(name, "Share of yeses by position and round", shares, ends, rounds),
        legend=shades_of(ends, lambda share: percent(share, 0)),
        columns=("Position", *(f"round {n}" for n in first_and_last(rounds))),
        numbers=[
            [
                str(position),
                *(
                    percent(None if math.isnan(row[at]) else float(row[at]))
                    for at in first_and_last(range(len(rounds)))
                ),
            ]
            for position, row in enumerate(shares)
        ],
    )
