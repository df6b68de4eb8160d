"""How well a client's own model does on rows like its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.upload import rank_of
from common.config import Experiment
from common.errors import DataError
from common.messages import Plan
from common.models import Model, load_model
from common.rows import load_held_out_rows, load_training_rows
from common.scoring import losses_and_hits, own_scores
from common.seeds import numpy_generator
from common.shards import Shard, shard_of
from common.tensors import Tensors, head_prefix


def evaluate_own(model: Model, experiment: Experiment, shard: Shard) -> tuple[float, float]:
    """Return (accuracy, loss) of the loaded model on held-out rows weighted like the shard's."""
    rows = load_held_out_rows(
        experiment.task,
        shard.task.name,
        experiment.backbone,
        experiment.adapter,
        experiment.train.device,
    )
    losses, hits = losses_and_hits(model, rows, experiment.train.precision)
    scores = own_scores(losses, hits, rows.labels, shard.label_counts)
    if scores is None:
        raise DataError(f"client {shard.client} holds only labels that no held-out row has")
    return scores


def judge(candidates: Sequence[Tensors], experiment: Experiment, plan: Plan) -> list[Tensor]:
    """Return the losses (n,) of each candidate on the same rows of this client's shard.

    `n` is what the plan's rules say, or all rows there are. They are rows that the client trains
    on: a candidate that leaves its own update out looks a little worse to it than it is.
    """
    seed = experiment.federation.seed
    shard = shard_of(experiment.task, experiment.partition, seed, plan.client)
    stream = numpy_generator(seed, "judge", plan.client, "round", plan.round)
    chosen = stream.permutation(len(shard.rows))[: plan.rules.judge_rows]
    device, task = experiment.train.device, shard.task
    model = load_model(experiment.backbone, task.kind, experiment.adapter, device)
    rows = load_training_rows(
        experiment.task, task.name, experiment.backbone, experiment.adapter, device, shard.site
    ).select(torch.from_numpy(shard.rows[chosen]))
    losses = []
    with model.in_use:
        for candidate in candidates:
            model.load(_for_task(candidate, task.name), rank_of(candidate), task)
            losses.append(losses_and_hits(model, rows, experiment.train.precision)[0])
    return losses


def _for_task(tensors: Tensors, task: str) -> Tensors:
    mine = head_prefix(task)
    return {n: t for n, t in tensors.items() if not n.startswith("head.") or n.startswith(mine)}
