"""What panels of soft prompts share: kinds of prompts, and maps by position and round."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from server.reporting.drawing import SERIES, SHADES, Cells, draw, opacity, paint_cells, square
from server.reporting.figures import Key

# Labels whose positions are drawn apart, each in a panel of its own.
MAPS = 4
_FAINTEST = 1 / SHADES


@dataclass(frozen=True)
class Kind:
    """The prompts that belong into one panel: their norms are of one size.

    Attributes:
        suffix: of the panels' names.
        called: how sentences begin.
    """

    suffix: str
    called: str

    def holds(self, name: str) -> bool:
        """Say whether a prompt is of this kind."""
        return _SUFFIXES.get(name, "") == self.suffix


# By prompts as the model names them; all others are contexts of captions.
_SUFFIXES = {"prompt.image": "-pictures", "prompt.prefix": "-prefix"}
KINDS = (
    Kind("", "The context of captions"),
    Kind("-prefix", "Keys and values before the captions"),
    Kind("-pictures", "Prompts of pictures"),
)


def drawn_map(
    name: str, title: str, values: Cells, ends: tuple[float, float], rounds: Sequence[int]
) -> Markup:
    """Draw values by position (rows) and round (columns); those that are NaN stay blank."""
    low, high = ends
    # The least value has the faintest shade: what is blank was not measured.
    shares = (values - low) / (high - low) if high > low else np.ones_like(values)

    def paint(axes: Axes) -> None:
        paint_cells(axes, np.nan_to_num(_FAINTEST + (1 - _FAINTEST) * shares), SERIES[0])
        axes.set(xlabel="round", ylabel="position")
        step = math.ceil(len(rounds) / 12)
        axes.set_xticks(range(0, len(rounds), step), [str(n) for n in rounds[::step]])
        named = range(0, len(values), math.ceil(len(values) / 16))
        axes.set_yticks(named, [str(position) for position in named])

    return draw(name, title, paint, height=min(6.0, 1.1 + 0.2 * max(len(values), 6)))


def shades_of(ends: tuple[float, float], write: Callable[[float], str]) -> list[Key]:
    """Return the legend of a map: its least value, the middle and the largest."""
    low, high = ends
    levels = {low: _FAINTEST, (low + high) / 2: (1 + _FAINTEST) / 2} if high > low else {}
    return [
        Key(write(value), square(SERIES[0], opacity(share)))
        for value, share in {**levels, high: 1.0}.items()
    ]


def first_and_last(items: Sequence[int]) -> list[int]:
    """Return the first and the last, or the only one."""
    return list(dict.fromkeys([items[0], items[-1]]))
