"""The local loop: one client, one round. Takes all it needs as values and owns no globals."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.adapters import AdaptedBackbone, part_of
from common.config import Copra, Train
from common.copra import draw_switches, keep_probability, switched
from common.features import Features
from common.seeds import child_seed, torch_generator


@dataclass(frozen=True)
class LocalRun:
    """What one client does in one round.

    Attributes:
        seed: of this client in this round; batches, switches and dropout draw from it.
        first_step: the global step at which the round starts.
        steps: local steps of this round.
        total_steps: T, the steps of the whole run.
        trains: the parts that are trained; the others stay as they were loaded.
    """

    seed: int
    first_step: int
    steps: int
    total_steps: int
    trains: tuple[str, ...]


def train_locally(
    model: AdaptedBackbone, rows: Features, run: LocalRun, train: Train, copra: Copra
) -> float:
    """Train the loaded model in place by AdamW and return the mean loss of its steps.

    Cross-entropy per example; gradients are clipped at `max_grad_norm`. The optimiser starts
    afresh: after a merge the factors' basis has turned, and old moments mean nothing.
    """
    parameters = {n: p for n, p in model.parameters().items() if part_of(n) in run.trains}
    for name, parameter in model.parameters().items():
        parameter.requires_grad_(name in parameters)
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    device = model.backbone.device
    batches = _shuffled_batches(len(rows), train.batch_size, torch_generator(run.seed, "batches"))
    switch_stream = torch_generator(run.seed, "copra")
    blocks = model.blocks
    total_loss = torch.zeros((), device=device)
    model.module.train()
    _keep_statistics(model.module)
    # Dropout draws from the global stream: give it one of its own, and put the old one back.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(child_seed(run.seed, "dropout"))
        for step in range(run.steps):
            for group in optimiser.param_groups:
                group["lr"] = _learning_rate(step, run, train)
            optimiser.zero_grad(set_to_none=True)
            with _dropped_blocks(blocks, run, step, copra, switch_stream):
                batch = rows.batch(next(batches), device)
                with _precision(train, device):
                    logits = model.logits(batch)
                loss = functional.cross_entropy(logits, batch.labels)
                loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.max_grad_norm)
            optimiser.step()
            total_loss += loss.detach()
    optimiser.zero_grad(set_to_none=True)
    model.module.eval()
    return float(total_loss) / run.steps


def _keep_statistics(module: nn.Module) -> None:
    """Leave batch statistics as they were pretrained: they would leak from client to client."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def _dropped_blocks(
    blocks: list[list[Any]], run: LocalRun, step: int, copra: Copra, stream: torch.Generator
) -> AbstractContextManager[None]:
    if not copra.enabled:
        return nullcontext()
    probability = keep_probability(run.first_step + step, run.total_steps, copra)
    if probability >= 1:
        return nullcontext()
    return switched(blocks, draw_switches(len(blocks), probability, stream))


def _precision(train: Train, device: torch.device) -> AbstractContextManager[Any]:
    if train.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _learning_rate(step: int, run: LocalRun, train: Train) -> float:
    """Return the rate of a local step: warm-up within the round, decay over the whole run."""
    warmup_steps = math.ceil(train.warmup * run.steps)
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(1.0, (run.first_step + step) / run.total_steps)
    return train.learning_rate * warm * _DECAYS[train.decay](progress)


_DECAYS: Mapping[str, Callable[[float], float]] = {
    "none": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def _shuffled_batches(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row positions, epoch after epoch in a new order; a batch is never above the shard."""
    size = min(size, rows)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(rows, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]
