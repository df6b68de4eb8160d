"""How well a client's own model does on rows like its own."""

from common.adapters import AdaptedBackbone
from common.config import Experiment
from common.errors import DataError
from common.rows import load_held_out_rows
from common.scoring import losses_and_hits, own_scores
from common.shards import Shard


def evaluate_own(
    model: AdaptedBackbone, experiment: Experiment, shard: Shard
) -> tuple[float, float]:
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
