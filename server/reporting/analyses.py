"""Panels of analyses: what `fedcopra connectivity` and its like have left beside a run's record."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.reporting.block_panels import pruning_panels, shapley_panels
from server.reporting.connectivity_panels import connectivity_panels
from server.reporting.figures import Panel
from server.reporting.prompt_panels import low_norm_panels

# What an analysis has written, as read from its file.
Analysis = Mapping[str, Any]

# The file of an analysis is its name with `.json`, in the folder of the run that it is of.
ANALYSES: Mapping[str, Callable[[Analysis], Sequence[Panel]]] = {
    "connectivity": connectivity_panels,
    "shapley": shapley_panels,
    "pruning": pruning_panels,
    "low_norm": low_norm_panels,
}


def analysis_files(folder: Path) -> dict[str, Path]:
    """Return the analyses that there are of the run in `folder`, by name."""
    files = {name: folder / f"{name}.json" for name in ANALYSES}
    return {name: file for name, file in files.items() if file.is_file()}
