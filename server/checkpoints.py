"""Checkpoints: what a run has come to after a round, from which a new run of it goes on.

A checkpoint holds the server's state, the record's rows and the scores of the start. Clients' own
memory is not in it: methods whose clients keep something from round to round start anew.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from common.config import Experiment
from common.installed_code import code_digest
from common.metrics import Scores
from common.tensors import Tensors
from server.folders import write_json

_STATE, _ROWS = "state.safetensors", "rounds.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: the state after its last round, a row a round, updates accepted so far."""

    state: Tensors
    rows: tuple[dict[str, Any], ...]
    start: Scores
    accepted: int


class Checkpoints:
    """The checkpoint of one experiment, and of this code, below a folder."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        key = hashlib.sha256(f"{code_digest()}{experiment.model_dump_json()}".encode()).hexdigest()
        self._place = folder / f".checkpoint-{key[:16]}"

    def save(self, progress: Progress) -> None:
        """Write the checkpoint in place of the one before, whole or not at all."""
        unfinished = self._place.with_name(self._place.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state = {name: tensor.contiguous() for name, tensor in progress.state.items()}
        save_file(state, unfinished / _STATE)
        write_json(
            unfinished / _ROWS,
            {
                "rows": progress.rows,
                "start": asdict(progress.start),
                "accepted": progress.accepted,
            },
        )
        shutil.rmtree(self._place, ignore_errors=True)
        unfinished.rename(self._place)

    def load(self) -> Progress | None:
        """Return how far the experiment was, or None."""
        if not self._place.is_dir():
            return None
        told = json.loads((self._place / _ROWS).read_text(encoding="utf-8"))
        return Progress(
            load_file(self._place / _STATE),
            tuple(told["rows"]),
            _scores(told["start"]),
            told["accepted"],
        )

    def remove(self) -> None:
        """Remove it: the run is done."""
        shutil.rmtree(self._place, ignore_errors=True)


def _scores(told: dict[str, Any]) -> Scores:
    parts = {
        key: {name: _scores(part) for name, part in told[key].items()}
        for key in ("tasks", "shifts")
    }
    return Scores(**{**told, **parts})
