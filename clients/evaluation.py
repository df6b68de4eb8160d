"""How well a client's own model does on rows like its own."""

import functools

from common.adapters import AdaptedBackbone, load_adapted_backbone
from common.config import Adapter, Backbone, Experiment, Task
from common.features import Features, extract_features, shortest_first
from common.scoring import losses_and_hits, own_scores
from common.shards import Shard
from common.tasks import held_out, load_tasks


def evaluate_own(
    model: AdaptedBackbone, experiment: Experiment, shard: Shard
) -> tuple[float, float]:
    """Return (accuracy, loss) of the loaded model on held-out rows weighted like the shard's."""
    rows = _held_out_features(
        experiment.task,
        shard.task.name,
        experiment.backbone,
        experiment.adapter,
        experiment.train.device,
    )
    losses, hits = losses_and_hits(model, rows, experiment.train.precision)
    return own_scores(losses, hits, rows.labels, shard.label_counts)


@functools.lru_cache(maxsize=16)
def _held_out_features(
    task: Task, member: str, backbone: Backbone, adapter: Adapter, device: str
) -> Features:
    labelled = next(one for one in load_tasks(task) if one.name == member)
    pretrained = load_adapted_backbone(backbone, labelled.kind, adapter, device).backbone
    split = held_out(labelled, task.evaluate_on)
    return shortest_first(extract_features(pretrained, labelled.kind, split))
