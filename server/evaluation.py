"""Server-side evaluation of the model that users would get, and the probing of candidates.

Test rows and probe rows never overlap, and nothing here tells a strategy anything of the test.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.adapters import AdaptedBackbone, load_adapted_backbone
from common.config import Experiment
from common.errors import ConfigError, DataError
from common.features import Features, extract_features
from common.metrics import Scores, mean_scores
from common.tasks import LabelledTask, Split, load_tasks
from common.tensors import Tensors
from strategies.base import Probe, Served, for_task

_BATCH = 256


@dataclass(frozen=True)
class _Rows:
    """Preprocessed rows of one task."""

    task: LabelledTask
    features: Features


class Evaluator:
    """The server's model and its held-out rows, for one experiment.

    Raises:
        ConfigError: tasks of unlike kinds, or an adapter that does not fit the backbone.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.tasks = load_tasks(experiment.task)
        kinds = {task.kind for task in self.tasks}
        if len(kinds) > 1:
            raise ConfigError("task.members mix texts and images; one backbone serves one kind")
        self.model: AdaptedBackbone = load_adapted_backbone(
            experiment.backbone, kinds.pop(), experiment.adapter, experiment.train.device
        )
        self._bfloat16 = experiment.train.precision == "bfloat16"
        held_out = [_held_out(task, experiment.task.evaluate_on) for task in self.tasks]
        self._held_out = [
            self._rows(task, split) for task, split in zip(self.tasks, held_out, strict=True)
        ]
        self._probe_rows: dict[tuple[int, str], list[_Rows]] = {}

    def initial(self, seed: int) -> dict[str, Tensor]:
        """Return the common start of all clients, heads of every task included."""
        with self.model.in_use:
            return self.model.initial(self.tasks, seed)

    def evaluate(self, served: Sequence[Served]) -> Scores:
        """Score on the held-out rows: mean over models, then over tasks."""
        by_task = {
            rows.task.name: mean_scores(
                [
                    self._score(model, rows)
                    for model in served
                    if model.task in (None, rows.task.name)
                ]
            )
            for rows in self._held_out
        }
        overall = mean_scores(list(by_task.values()))
        return Scores(overall.accuracy, overall.loss, by_task if len(self.tasks) > 1 else {})

    def probe(self, examples: int, rank: int) -> Probe | None:
        """Return the probe on `examples` rows, shared evenly by the tasks; None for 0."""
        if not examples:
            return None

        def losses(tensors: Tensors, part: slice) -> Tensor:
            model = Served(tensors, rank)
            probed = self._rows_to_probe(examples, part)
            return torch.cat([self._losses(model, rows)[0] for rows in probed])

        return losses

    def _rows_to_probe(self, examples: int, part: slice) -> list[_Rows]:
        each = slice(examples // len(self.tasks))
        with self.model.in_use:
            key = (examples, repr(part))
            if key not in self._probe_rows:
                self._probe_rows[key] = [
                    self._rows(task, task.probe.cut(each).cut(part)) for task in self.tasks
                ]
            return self._probe_rows[key]

    def _rows(self, task: LabelledTask, split: Split) -> _Rows:
        features = extract_features(self.model.backbone, task.kind, split)
        return _Rows(task, _shortest_first(features))

    def _score(self, model: Served, rows: _Rows) -> Scores:
        losses, right = self._losses(model, rows)
        return Scores(float(right.double().mean()), float(losses.double().mean()))

    def _losses(self, model: Served, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return the loss of every row and whether it is classified rightly, both (n,)."""
        # One thread, as in the clients: the sums must not depend on the machine's cores.
        torch.set_num_threads(1)
        losses, right = [], []
        with self.model.in_use:
            self.model.load(for_task(model.tensors, rows.task.name), model.rank, rows.task)
            self.model.module.eval()
            with torch.inference_mode(), self._precision():
                for batch in rows.features.batches(_BATCH, self.model.backbone.device):
                    logits = self.model.logits(batch)
                    losses.append(functional.cross_entropy(logits, batch.labels, reduction="none"))
                    right.append(logits.argmax(dim=1) == batch.labels)
        return torch.cat(losses).float().cpu(), torch.cat(right).cpu()

    def _precision(self) -> Any:
        device = self.model.backbone.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self._bfloat16 else nullcontext()


def _held_out(task: LabelledTask, name: str) -> Split:
    split = {"test": task.test, "validation": task.validation}[name]
    if not len(split):
        raise DataError(f"task.evaluate_on = {name!r}: task {task.name} has no {name} rows")
    return split


def _shortest_first(features: Features) -> Features:
    """Order texts by length, so that batches carry little padding; pictures stay as they are."""
    if "attention_mask" not in features.inputs:
        return features
    order = features.inputs["attention_mask"].sum(dim=1).argsort(stable=True)
    inputs = {name: tensor[order] for name, tensor in features.inputs.items()}
    return Features(inputs, features.labels[order])
