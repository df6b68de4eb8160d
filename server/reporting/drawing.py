"""Line drawings as inline SVG that follows the page's colours, light or dark, font and width.

Drawn with matplotlib's objects (no pyplot state) in inks that stand for CSS variables.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from server.reporting.comparison import Groups

# Eight hues, (light, dark): found by searching for the largest smallest distance between any two
# in OKLab as seen with normal vision, protanopia, deuteranopia and tritanopia, at 3:1 or more
# against the page.
PALETTE = (
    ("#2d4ec2", "#7ca2fb"),
    ("#d57c13", "#febb56"),
    ("#194739", "#bcecc1"),
    ("#96247b", "#f486a1"),
    ("#199fc1", "#2edbff"),
    ("#606900", "#b39e26"),
    ("#915efc", "#986abe"),
    ("#986973", "#b46a52"),
)
DASHES = ((), (5.0, 2.0), (1.5, 1.5), (7.0, 2.0, 1.5, 2.0))
MARKERS = "os^DvPX*"
SHADES = 16

Cells = NDArray[np.float64]

# Stand-ins that matplotlib draws with; `_inline` turns each into its CSS variable.
SERIES = tuple(f"#00{number:02x}fe" for number in range(len(PALETTE)))
TEXT, MUTED, GRID, SURFACE = "#0100fd", "#0200fd", "#0300fd", "#0400fd"
INKS = {
    **{ink: f"var(--series-{number})" for number, ink in enumerate(SERIES, start=1)},
    TEXT: "var(--text)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--card)",
}

WIDTH = 4.6  # inches, 331 SVG units: on a phone one unit is about one pixel
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.color": TEXT,
    "axes.labelcolor": MUTED,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.scale_dashes": False,
}


@dataclass(frozen=True)
class Mark:
    """How one label is drawn in every figure: ink, dashes and marker."""

    ink: str
    dashes: tuple[float, ...]
    marker: str

    def swatch(self) -> Markup:
        """Return a short piece of the line as SVG."""
        return Markup(
            '<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">'
            '<path d="M1 6H29" stroke="{ink}" stroke-width="2.2" stroke-dasharray="{dashes}"/>'
            '<polygon points="{points}" fill="{ink}"/></svg>'
        ).format(
            ink=Markup(INKS[self.ink]),
            dashes=" ".join(f"{dash:g}" for dash in self.dashes) or "none",
            points=self._marker_points(),
        )

    def _marker_points(self) -> str:
        marker = MarkerStyle(self.marker)
        outline = marker.get_path().transformed(marker.get_transform())
        return " ".join(
            f"{15 + 9 * x:.1f},{6 - 9 * y:.1f}"
            for polygon in outline.to_polygons()
            for x, y in np.asarray(polygon)
        )


@dataclass
class Line:
    """A mean over seeds with its smallest and largest seed."""

    label: str
    mark: Mark
    x: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, x: float, values: Sequence[float]) -> None:
        """Append the point at `x`, one value a seed."""
        self.x.append(x)
        self.mean.append(float(np.mean(values)))
        self.low.append(min(values))
        self.high.append(max(values))


def marks(groups: Groups) -> dict[str, Mark]:
    """Give every label its mark: colours for methods, grey lines without markers for controls."""
    chosen: dict[str, Mark] = {}
    controls = methods = 0
    for label, members in groups.items():
        if members[0]["strategy"]["control"]:
            controls += 1
            chosen[label] = Mark(MUTED, DASHES[controls % len(DASHES)], "")
        else:
            # One step further in dashes on each pass through the colours keeps pairs unique.
            step = methods + methods // len(SERIES)
            chosen[label] = Mark(
                SERIES[methods % len(SERIES)],
                DASHES[step % len(DASHES)],
                MARKERS[methods % len(MARKERS)],
            )
            methods += 1
    return chosen


def draw(
    name: str,
    title: str,
    paint: Callable[..., None],
    *,
    height: float = 2.9,
    columns: int = 1,
    rows: Sequence[float] = (1.0,),
) -> Markup:
    """Let `paint` fill a figure of the common width, and return it as inline SVG.

    `paint` gets as many axes as there are columns, or `rows` of these relative heights. Those side
    by side share what is on their vertical axes, those above each other the horizontal one.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        axes = figure.subplots(
            len(rows), columns, sharex="col", sharey="row", squeeze=False, height_ratios=rows
        )
        paint(*axes.flat)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> Markup:
    """Make matplotlib's document a part of the page: its ids, colours and font, and a title."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+;?\s*", "", svg)
    # Two figures of one page both have an axes_1, and may share a clip path.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    for ink, variable in INKS.items():
        svg = svg.replace(ink, variable)
    viewbox = re.search(r'viewBox="[^"]+"', svg)
    heading = Markup(
        '<svg {viewbox} role="img" aria-labelledby="{name}-title">'
        '<title id="{name}-title">{title}</title>'
    ).format(viewbox=Markup(viewbox.group() if viewbox else ""), name=name, title=title)
    return heading + Markup(svg[svg.index(">") + 1 :])


def paint_lines(axes: Axes, lines: Iterable[Line], *, floor: float = -math.inf) -> None:
    """Draw each line with the band between its seeds; values below `floor` are drawn at it."""
    for number, line in enumerate(lines):
        low, mean, high = (np.maximum(row, floor) for row in (line.low, line.mean, line.high))
        if np.any(low < high):
            axes.fill_between(line.x, low, high, color=line.mark.ink, alpha=0.13, linewidth=0)
        every = max(1, len(line.x) // 7)
        axes.plot(
            line.x,
            mean,
            color=line.mark.ink,
            linewidth=1.8,
            dashes=line.mark.dashes or (None, None),
            marker=line.mark.marker,
            markersize=5,
            markeredgecolor=SURFACE,
            markeredgewidth=0.7,
            # Staggered, so that markers of lines that coincide do not hide each other.
            markevery=(number % every, every),
        )


def paint_cells(axes: Axes, shares: Cells, ink: str) -> None:
    """Draw a matrix of shares, 0 to 1, as cells: the larger, the stronger; 0 is left blank.

    One compound path for each shade: thousands of cells stay a few elements.
    """
    shades = np.ceil(SHADES * shares)
    for shade in range(1, SHADES + 1):
        rows, columns = np.nonzero(shades == shade)
        if not len(rows):
            continue
        corners = np.array([[0.04, 0.06], [0.96, 0.06], [0.96, 0.94], [0.04, 0.94]]) - 0.5
        cells = np.stack([columns, rows], axis=1)[:, None, :] + corners
        outline = Path.make_compound_path_from_polys(cells)
        axes.add_patch(
            PathPatch(outline, facecolor=ink, alpha=opacity(shade / SHADES), linewidth=0)
        )
    axes.set_xlim(-0.5, shares.shape[1] - 0.5)
    axes.set_ylim(shares.shape[0] - 0.5, -0.5)
    axes.grid(False)


def opacity(share: float) -> float:
    """Let the least share still differ from nothing, on a light card and on a dark one."""
    return 0.14 + 0.86 * share


def square(ink: str, opacity: float = 1.0) -> Markup:
    """Return a patch of an ink as SVG, for a legend."""
    return Markup(
        '<svg class="swatch square" viewBox="0 0 12 12" aria-hidden="true">'
        '<rect width="12" height="12" rx="2" fill="{ink}" fill-opacity="{opacity}"/></svg>'
    ).format(ink=Markup(INKS[ink]), opacity=opacity)
