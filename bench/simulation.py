"""How busy the workers are: `python -m bench.simulation [EXPERIMENT] [KEY=VALUE ...]`.

Efficiency is client training seconds over (wall seconds x workers), from the first round's start
to the end of the last, and once more with Ray's start and all loading counted in. The rest is
broken down by what the server was doing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from common.config import load_experiment, parse_assignments
from server.environment import prepare_environment


def main() -> None:
    """Print one JSON object."""
    prepare_environment()
    file, *assignments = sys.argv[1:] or ["experiments/text.toml"]
    print(json.dumps(measure(Path(file), parse_assignments(assignments)), indent=1))


def measure(file: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run the experiment once and say where its time went, in seconds."""
    experiment = load_experiment(file, overrides)
    started = time.perf_counter()
    from server.simulation import simulate

    [finished] = simulate([experiment], lambda index, row: None)
    whole = time.perf_counter() - started
    rounds = [row["seconds"] for row in finished.outcomes.rounds]
    total = {phase: sum(seconds[phase] for seconds in rounds) for phase in rounds[0]}
    workers = max(1, experiment.federation.workers)
    return {
        "experiment": file.stem,
        "workers": workers,
        "efficiency_of_rounds": total["training"] / (total["wall"] * workers),
        "efficiency_with_start": total["training"] / (whole * workers),
        "seconds": total | {"start": whole - total["wall"], "whole": whole},
        "idle_worker_seconds_while_waiting": total["waiting"] * workers - total["training"],
    }


if __name__ == "__main__":
    main()
