"""Rows of a task as a model takes them, made once a process and only when they are asked for.

Training rows are made once for all processes that share a cache (`common.kept_tensors`).
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.backbones import Preprocessor, load_preprocessor
from common.config import Adapter, Backbone, Task
from common.features import (
    Features,
    as_tensors,
    extract_features,
    from_tensors,
    shortest_first,
)
from common.kept_tensors import kept_or_made
from common.models import Model, load_model
from common.tasks import (
    SERVER,
    ImageInput,
    LabelledTask,
    Split,
    TextInput,
    ZippedPicture,
    held_out,
    load_tasks,
)


class TrainingRows:
    """The training rows of a task; where the model has a stem, past it.

    Preprocessing is of all rows at once; the stem, which costs more, of those that clients of this
    process have asked for.
    """

    def __init__(self, features: Features, model: Model) -> None:
        self._features, self._model = features, model
        self._past_stem: Features | None = None
        self._done = torch.zeros(len(features), dtype=torch.bool)

    def select(self, rows: Tensor) -> Features:
        """Return the rows at these positions."""
        if not self._model.has_stem:
            return self._features.select(rows)
        missing = rows[~self._done[rows]]
        if len(missing):
            found = self._model.past_stem(self._features.select(missing))
            if self._past_stem is None:
                self._past_stem = found.room_for(len(self._features))
            self._past_stem.put(missing, found)
            self._done[missing] = True
        assert self._past_stem is not None
        return self._past_stem.select(rows)


@functools.lru_cache(maxsize=8)
def load_training_rows(
    task: Task, member: str, backbone: Backbone, adapter: Adapter, device: str, site: str = SERVER
) -> TrainingRows:
    """Return the training rows of one member of a task, or of a site's folder; once a process."""
    labelled = _member(task, member, site)
    model = load_model(backbone, labelled.kind, adapter, device)
    return TrainingRows(_plain(task, member, backbone, site), model)


@functools.lru_cache(maxsize=8)
def load_held_out_rows(
    task: Task, member: str, backbone: Backbone, adapter: Adapter, device: str
) -> Features:
    """Return the rows that models are scored on, once a process."""
    labelled = _member(task, member)
    model = load_model(backbone, labelled.kind, adapter, device)
    preprocessor = load_preprocessor(backbone, labelled.kind)
    split = held_out(labelled, task.evaluate_on)
    return model.past_stem(shortest_first(extract_features(preprocessor, split)))


@functools.lru_cache(maxsize=8)
def _plain(task: Task, member: str, backbone: Backbone, site: str) -> Features:
    labelled = _member(task, member, site)
    preprocessor = load_preprocessor(backbone, labelled.kind)

    def extract() -> Mapping[str, Tensor]:
        return as_tensors(extract_features(preprocessor, labelled.train))

    return from_tensors(kept_or_made(_decided_by(labelled.train, preprocessor, backbone), extract))


def _decided_by(split: Split, preprocessor: Preprocessor, backbone: Backbone) -> Iterator[bytes]:
    """Yield all that features depend on: rows, and the files that say how they are preprocessed."""
    yield b"features"
    yield backbone.model_dump_json().encode()
    for file in sorted(Path(preprocessor.location).glob("*")):
        if file.suffix in (".json", ".txt"):
            yield file.name.encode() + file.read_bytes()
    yield split.labels.tobytes()
    yield from map(_identity, split.inputs)


def _identity(row: TextInput | ImageInput) -> bytes:
    if isinstance(row, Path):
        found = row.stat()
        return f"{row.absolute()}|{found.st_size}|{found.st_mtime_ns}".encode()
    if isinstance(row, ZippedPicture):
        return row.content
    if isinstance(row, Image.Image):
        return f"{row.mode}|{row.size}|".encode() + row.tobytes()
    return json.dumps(row).encode()


def _member(task: Task, name: str, site: str = SERVER) -> LabelledTask:
    return next(labelled for labelled in load_tasks(task, site) if labelled.name == name)
