"""Scoring a loaded model on rows; the same on the server and at clients."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.cores import in_pieces
from common.features import Features
from common.models import Model

_ROWS_AT_ONCE: Mapping[str, int] = {"cpu": 64}  # so that several cores have work
_ROWS_AT_ONCE_ELSEWHERE = 256


def losses_and_hits(
    model: Model, rows: Features, precision: str, cores: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the loss of every row and whether it is classified rightly, both (n,), on the CPU.

    `cores` is how many of them a model on the CPU may keep busy.
    """
    # One thread a batch, as in training: the sums must not depend on the machine's cores.
    torch.set_num_threads(1)
    device = model.device
    model.module.eval()

    def score(positions: Tensor) -> tuple[Tensor, Tensor]:
        batch = rows.batch(positions, device)
        # Modes are a thread's own.
        with torch.inference_mode(), _autocast(device.type, precision):
            logits = model.logits(batch)
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            return losses.float().cpu(), (logits.argmax(dim=1) == batch.labels).cpu()

    size = _ROWS_AT_ONCE.get(device.type, _ROWS_AT_ONCE_ELSEWHERE)
    busy = cores if device.type == "cpu" else 1
    losses, hits = zip(*in_pieces(score, rows.positions(size), busy), strict=True)
    return torch.cat(losses), torch.cat(hits)


def own_scores(
    losses: Tensor, hits: Tensor, labels: Tensor, label_counts: Sequence[int]
) -> tuple[float, float] | None:
    """Return (accuracy, loss) on rows weighted so that labels are spread as in a client's shard.

    `Σ_c p(c)·mean over the rows of label c`, p(c) the client's share of label c: what the client
    would see on new rows of its own. Labels that no row has are left out of p; None if that leaves
    nothing.
    """
    counts = torch.bincount(labels, minlength=len(label_counts)).double()
    shares = torch.tensor(label_counts, dtype=torch.float64) * (counts > 0)
    if not shares.any():
        return None
    weights = (shares / shares.sum() / counts.clamp_min(1))[labels]
    return float(weights @ hits.double()), float(weights @ losses.double())


def _autocast(device: str, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)
