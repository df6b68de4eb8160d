"""Server-side evaluation of the model that users would get, and the probing of candidates.

Test rows and probe rows never overlap, and nothing here tells a strategy anything of the test.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapters import AdaptedBackbone
from common.config import Experiment
from common.cores import cores_here
from common.errors import ConfigError
from common.features import Features, extract_features, shortest_first
from common.lowrank import Directions
from common.metrics import Scores, mean_scores
from common.models import Model, load_model
from common.prompted_clip import PromptedClip
from common.scoring import losses_and_hits, own_scores
from common.shards import Holding
from common.slopes import slopes
from common.tasks import LabelledTask, Split, held_out, load_shifts, load_tasks
from common.tensors import Tensors, digest
from strategies.base import Probe, Served, for_task

_SCORED_LATELY = 32  # models whose scores, two numbers a held-out row, are kept


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
        self.model: Model = load_model(
            experiment.backbone, kinds.pop(), experiment.adapter, experiment.train.device
        )
        shifts = load_shifts(experiment.task)
        self._check_answers(shifts)
        self._precision = experiment.train.precision
        self._held_out = [
            self._rows(task, held_out(task, experiment.task.evaluate_on)) for task in self.tasks
        ]
        self._shifted = [
            self._rows(task, held_out(task, experiment.task.evaluate_on)) for task in shifts
        ]
        self._probe_rows: dict[tuple[int, str], list[_Rows]] = {}
        self._scored: OrderedDict[tuple[str, int, str], tuple[Tensor, Tensor]] = OrderedDict()

    def check(self, experiment: Experiment) -> None:
        """Refuse what this model cannot do; one evaluator serves experiments that ask for more.

        Raises:
            ConfigError: the clients' loss asks about captions, and there are none.
        """
        nemesis = experiment.nemesis.kind
        if nemesis in ("pan", "blend") and not isinstance(self.model, PromptedClip):
            raise ConfigError(
                f"nemesis.kind = {nemesis!r} asks about positions of a CLIP's captions; "
                f"{experiment.backbone.label!r} has none, and 'pun' needs none"
            )

    def _check_answers(self, shifts: Sequence[LabelledTask]) -> None:
        """Refuse tasks that the model has no answers for: training gives it no head of theirs."""
        trained = {name for task in self.tasks for name in self.model.shapes(0, task)}
        for task in shifts:
            if missing := sorted(self.model.shapes(0, task).keys() - trained):
                raise ConfigError(
                    f"task.shifts names {task.name}, and nothing would train {missing[0]}: shifts "
                    "are for models that answer by the names of classes, such as a CLIP's captions"
                )

    def initial(self, seed: int, restart: int = 0) -> dict[str, Tensor]:
        """Return the common start of all clients, heads of every task included."""
        with self.model.in_use:
            return self.model.initial(self.tasks, seed, restart)

    def evaluate(self, served: Sequence[Served], holdings: Sequence[Holding]) -> Scores:
        """Score on the held-out rows: mean over models, then over tasks.

        The own scores weight the rows of a client's task like the client's labels, and are the
        mean over all clients.
        """
        by_task, own = {}, []
        for rows in self._held_out:
            holders = [held for held in holdings if held.task.name == rows.task.name]
            scored = []
            for model in served:
                if model.task not in (None, rows.task.name):
                    continue
                losses, hits = self._held_out_losses(model, rows)
                scored.append(Scores(float(hits.double().mean()), float(losses.double().mean())))
                labels = rows.features.labels
                found = [
                    own_scores(losses, hits, labels, held.label_counts)
                    for held in holders
                    if model.client in (None, held.client)
                ]
                # A client whose labels no held-out row has cannot be judged, and does not count.
                own += [Scores(*scores) for scores in found if scores is not None]
            by_task[rows.task.name] = mean_scores(scored)
        overall = mean_scores(list(by_task.values()))
        mine = mean_scores(own) if own else None
        return Scores(
            overall.accuracy,
            overall.loss,
            mine.accuracy if mine else None,
            mine.loss if mine else None,
            by_task if len(self.tasks) > 1 else {},
            {rows.task.name: self._on_shift(served, rows) for rows in self._shifted},
        )

    def _on_shift(self, served: Sequence[Served], rows: _Rows) -> Scores:
        """Score on a task of which nothing was trained on: the mean over the models."""
        scored = []
        for model in served:
            losses, hits = self._losses(model, rows)
            scored.append(Scores(float(hits.double().mean()), float(losses.double().mean())))
        return mean_scores(scored)

    def probe(self, examples: int, rank: int) -> Probe | None:
        """Return the probe on `examples` rows, shared evenly by the tasks; None for 0."""
        if not examples:
            return None

        def losses(tensors: Tensors, part: slice) -> Tensor:
            model = Served(tensors, rank)
            probed = self._rows_to_probe(examples, part)
            return torch.cat([self._losses(model, rows)[0] for rows in probed])

        def slopes_along(
            tensors: Tensors, directions: Directions, part: slice
        ) -> tuple[Tensor, Tensor]:
            if not isinstance(self.model, AdaptedBackbone):
                raise TypeError("slopes are along low-rank adapters; this model has none")
            found = []
            for rows in self._rows_to_probe(examples, part):
                with self.model.in_use:
                    self.model.load(for_task(tensors, rows.task.name), rank, rows.task)
                    found.append(slopes(self.model, rows.features, directions, cores_here()))
            found_losses, found_slopes = zip(*found, strict=True)
            return torch.cat(found_losses), torch.cat(found_slopes)

        return Probe(losses, slopes_along)

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
        features = extract_features(self.model.preprocessor, split)
        return _Rows(task, self.model.past_stem(shortest_first(features)))

    def _held_out_losses(self, model: Served, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return `_losses`, of a model scored lately as they were: all runs have one start."""
        key = digest(for_task(model.tensors, rows.task.name)), model.rank, rows.task.name
        if key not in self._scored:
            self._scored[key] = self._losses(model, rows)
        self._scored.move_to_end(key)
        while len(self._scored) > _SCORED_LATELY:
            self._scored.popitem(last=False)
        return self._scored[key]

    def _losses(self, model: Served, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return the loss of every row and whether it is classified rightly, both (n,)."""
        with self.model.in_use:
            self.model.load(for_task(model.tensors, rows.task.name), model.rank, rows.task)
            return losses_and_hits(self.model, rows.features, self._precision, cores_here())
