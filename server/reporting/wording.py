"""How the report writes numbers and lists, in figures, tables and sentences alike."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share: 0.931 is 93.1%.

    >>> percent(0.931), percent(None)
    ('93.1%', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f}%".replace("-", "−")


def rough_percent(share: float) -> str:
    """Write a share that may be tiny with two significant digits.

    >>> rough_percent(0.00031), rough_percent(0.123)
    ('0.031%', '12%')
    """
    return f"{100 * share:.2g}%" if share >= 1e-5 or share == 0 else "less than 0.001%"


def relative_error(error: float | None) -> str:
    """Write an aggregation error: a share, or a power of ten where only rounding is left.

    >>> relative_error(0.058), relative_error(6e-8), relative_error(0)
    ('5.8%', '6·10⁻⁸', '0')
    """
    if error is None:
        return "–"
    return rough_percent(error) if error >= 1e-5 else power_of_ten(error) if error else "0"


def points(difference: float | None, *, sign: bool = True, unit: bool = True) -> str:
    """Write a difference between shares in percentage points.

    >>> points(-0.0123)
    '−1.2 points'
    """
    if difference is None:
        return "–"
    written = f"{100 * difference:{'+' if sign else ''}.1f}".replace("-", "−")
    return f"{written} points" if unit else written


def interval(bounds: Mapping[str, float | None], write: Callable[[float], str]) -> str:
    """Write the bounds of an interval, or nothing where there is none or no width.

    >>> interval({"low": 0.92, "high": 0.94}, percent)
    '92.0% to 94.0%'
    """
    low, high = bounds["low"], bounds["high"]
    return "" if low is None or high is None or low == high else f"{write(low)} to {write(high)}"


def amount_of_bytes(count: float | None) -> str:
    """Write bytes in decimal units with three significant digits.

    >>> amount_of_bytes(1_234_567), amount_of_bytes(-500)
    ('1.23 MB', '−500 B')
    """
    if count is None:
        return "–"
    exponent = min(4, int(math.log10(abs(count)) // 3)) if abs(count) >= 1 else 0
    unit = ("B", "kB", "MB", "GB", "TB")[exponent]
    return f"{_three_digits(count / 1000**exponent)} {unit}"


def duration(seconds: float | None) -> str:
    """Write seconds in a unit in which they are easy to read.

    >>> duration(0.0123), duration(75)
    ('12.3 ms', '1.25 min')
    """
    if seconds is None:
        return "–"
    scales = ((1.0, 1000.0, "ms"), (60.0, 1.0, "s"), (3600.0, 1 / 60, "min"))
    for limit, factor, unit in scales:
        if 0 < abs(seconds) < limit or (seconds == 0 and unit == "s"):
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def power_of_ten(value: float) -> str:
    """Write a number as a power of ten, with a factor where it is none.

    >>> power_of_ten(1e-8), power_of_ten(0.02)
    ('10⁻⁸', '2·10⁻²')
    """
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if abs(factor - 1) < 1e-6 else f"{factor:.2g}·10{raised}"


def _three_digits(number: float) -> str:
    text = f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}"
    return text.replace("-", "−")


def spoken(names: Sequence[str]) -> str:
    """Join names as one says them.

    >>> spoken(["a", "b", "c"])
    'a, b and c'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def shortened(name: str, length: int) -> str:
    """Leave out the middle of a name that is longer than `length`: both ends tell names apart.

    >>> shortened("copra-merge · copra.enabled=true", 17)
    'copra-me…led=true'
    """
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def short_names(names: Sequence[str]) -> list[str]:
    """Leave out what all dotted names have in common, at either end or at every place.

    >>> short_names(["vit.layers.0.attn.q_proj", "vit.layers.1.attn.v_proj"])
    ['0.q_proj', '1.v_proj']
    >>> short_names(["model.in.q", "model.q"]), short_names(["model.q"])
    (['in.q', 'q'], ['q'])
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [row[-1] for row in parts]
    if len({len(row) for row in parts}) == 1:
        differs = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        kept = [list(itertools.compress(row, differs)) for row in parts]
    else:
        shared = 0
        while len({row[shared] if len(row) > shared + 1 else None for row in parts}) == 1:
            shared += 1
        kept = [row[shared:] for row in parts]
    return [".".join(row) for row in kept]


def is_or_are(names: Sequence[str], one: str, several: str) -> str:
    """Say `it is a control` or `they are controls`."""
    return f"it is {one}" if len(names) == 1 else f"they are {several}"


def count_of(number: int, noun: str) -> str:
    """Say `1 client` or `3 clients`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def range_of(numbers: Sequence[int]) -> str:
    """Say `20 to 80`, or the number that all are."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def round_line(row: Mapping[str, Any]) -> str:
    """Say in one line what a round gave and cost."""
    scores = {"accuracy": row["accuracy"], "loss": row["loss"]}
    if row["accuracy"] is None:
        scores = {"own accuracy": row["own_accuracy"], "own loss": row["own_loss"]}
    said = [f"{name} {value:.3f}" for name, value in scores.items() if value is not None]
    up, down = (row["bytes"][direction]["total"] / 1e6 for direction in ("up", "down"))
    return (
        f"round {row['round']}: {', '.join(said) or 'not evaluated'}, up {up:.2f} MB, "
        f"down {down:.2f} MB, {row['seconds']['wall']:.1f} s"
    )
