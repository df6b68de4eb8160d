"""A finished run, opened again: its record, its models, and rows to score models on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import Experiment
from common.errors import ConfigError, DataError
from common.features import Features, extract_features, shortest_first
from common.lowrank import adapted_modules, factor_names
from common.models import Model, load_model
from common.residuals import residual_name
from common.scoring import losses_and_hits
from common.seeds import numpy_generator
from common.tasks import LabelledTask, Split, load_tasks
from common.tensors import Tensors
from server.record import read_run, read_updates
from strategies.base import Served, Update, for_task


@dataclass(frozen=True)
class StoredRun:
    """One run: its record and experiment, the served model, and kept updates in client order.

    Attributes:
        served: None where the run serves a model a client, and so no single one.
    """

    folder: Path
    record: Mapping[str, Any]
    experiment: Experiment
    served: Served | None
    updates: tuple[Update, ...]

    @property
    def label(self) -> str:
        """Return what reports call it: its method, with the seed."""
        return f"{self.record['label']}, seed {self.record['seed']}"

    def check_adapters(self) -> None:
        """Refuse a run without low-rank adapters.

        Raises:
            ConfigError: it has trained soft prompts.
        """
        if (kind := self.experiment.adapter.kind) != "lora":
            raise ConfigError(
                f"{self.folder}: adapter.kind = {kind!r}, and this looks at low-rank adapters; "
                "choose a run with adapter.kind = 'lora' (of soft prompts: fedcopra low-norm)"
            )

    def one_model(self) -> Served:
        """Return the served model.

        Raises:
            ConfigError: the run serves a model a client.
        """
        if self.served is None:
            raise ConfigError(
                f"{self.folder}: {self.record['label']} gives every client a model of its own, "
                "and this looks at a single one; choose a run of another strategy"
            )
        return self.served


def open_run(folder: Path) -> StoredRun:
    """Return the run in `folder`.

    Raises:
        ConfigError: there is no run in it.
        DataError: it cannot be read.
    """
    record, experiment, tensors = read_run(folder)
    single = not record["strategy"]["personalised"] and not any("/" in name for name in tensors)
    rank = next((t.shape[0] for n, t in tensors.items() if n.endswith(".lora_A.weight")), 0)
    served = Served(tensors, rank) if single else None
    return StoredRun(folder, record, experiment, served, tuple(read_updates(folder, record)))


@dataclass(frozen=True)
class Scored:
    """Loss of every row and whether it is classified rightly: both (n,), rows always alike."""

    losses: Tensor
    hits: Tensor

    @property
    def loss(self) -> float:
        """Return the mean loss, in nats."""
        return float(self.losses.double().mean())

    @property
    def accuracy(self) -> float:
        """Return the share of rows that are classified rightly."""
        return float(self.hits.double().mean())


class Scorer:
    """Scores models of one experiment on the same rows of a split.

    `examples` rows, drawn once and shared evenly by the tasks; 0 for all. A model that holds what
    some tasks need and others do not, their heads, is scored on those.

    Raises:
        DataError: the split is empty.
    """

    def __init__(self, experiment: Experiment, split: str, examples: int = 0) -> None:
        tasks = load_tasks(experiment.task)
        self.split = split
        self._model: Model = load_model(
            experiment.backbone, tasks[0].kind, experiment.adapter, experiment.train.device
        )
        self._precision = experiment.train.precision
        each = -(-examples // len(tasks))
        self._rows = [(task, self._drawn(task, each)) for task in tasks]
        self.examples = sum(len(rows) for _, rows in self._rows)

    def _drawn(self, task: LabelledTask, examples: int) -> Features:
        rows: Split = getattr(task, self.split)
        if not len(rows):
            raise DataError(f"task {task.name} has no {self.split} rows to score on")
        if 0 < examples < len(rows):
            stream = numpy_generator(0, "examples", task.name, self.split)
            rows = rows.select(np.sort(stream.permutation(len(rows))[:examples]))
        features = extract_features(self._model.preprocessor, rows)
        return self._model.past_stem(shortest_first(features))

    def __call__(self, model: Served, kept: Collection[str] | None = None) -> Scored:
        """Score a model; with `kept` as if it had adapters in these modules only."""
        tensors = model.tensors if kept is None else only_in(model.tensors, kept)
        losses, hits = [], []
        with self._model.in_use:
            for task, rows in self._rows:
                mine = for_task(tensors, task.name)
                if self._model.shapes(model.rank, task).keys() <= mine.keys():
                    self._model.load(mine, model.rank, task)
                    found = losses_and_hits(self._model, rows, self._precision)
                    losses.append(found[0])
                    hits.append(found[1])
        return Scored(torch.cat(losses), torch.cat(hits))


def only_in(tensors: Tensors, kept: Collection[str]) -> dict[str, Tensor]:
    """Return a model whose delta is zero but in the modules `kept`; heads stay."""
    cut = dict(tensors)
    for module in set(adapted_modules(tensors)) - set(kept):
        name_B, _ = factor_names(module)
        cut[name_B] = torch.zeros_like(tensors[name_B])
        cut.pop(residual_name(module), None)
    return cut
