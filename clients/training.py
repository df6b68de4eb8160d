"""The local loop: one client, one round. Takes all it needs as values and owns no globals."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import Copra, Train
from common.copra import draw_switches, keep_probability, switched
from common.features import Batch, Features
from common.models import Model
from common.prompt_transfer import decay_groups, warmed_cosine
from common.rules import NO_RULES, LocalRules
from common.seeds import child_seed, torch_generator
from common.tails import kept_directions, tail_size
from common.tensors import Tensors, part_of

# From a batch and its logits to a term of the loss.
Penalty = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class LocalRun:
    """What one client does in one round.

    Attributes:
        seed: of this client in this round; batches, switches and dropout draw from it.
        first_step: the global step at which the round starts.
        steps: local steps of this round.
        total_steps: T, the steps of the whole run.
        trains: the parts that are trained; the others stay as they were loaded.
        rules: what the method asks for beside.
        rank: the directions that are trained; behind them a slot may hold pruned ones.
        round, rounds: 1-based, of how many.
    """

    seed: int
    first_step: int
    steps: int
    total_steps: int
    trains: tuple[str, ...]
    rules: LocalRules = NO_RULES
    rank: int = 0
    round: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class Trained:
    """What training tells: the mean loss of its steps, and the sum of their learning rates."""

    loss: float
    total_rate: float


def train_locally(
    model: Model,
    rows: Features,
    run: LocalRun,
    train: Train,
    copra: Copra,
    correction: Tensors | None = None,
    penalty: Penalty | None = None,
) -> Trained:
    """Train the loaded model in place.

    Cross-entropy per example, and what the rules and `penalty` add to it; gradients are clipped at
    `max_grad_norm`, then `correction` is added to them, name by name (SCAFFOLD's `c - c_k`). The
    optimiser starts afresh: after a merge the factors' basis has turned, and old moments mean
    nothing.
    """
    parameters = {n: p for n, p in model.parameters().items() if part_of(n) in run.trains}
    for name, parameter in model.parameters().items():
        parameter.requires_grad_(name in parameters)
    optimiser = _optimiser(parameters, train)
    epoch = math.ceil(len(rows) / min(train.batch_size, len(rows)))
    device = model.device
    corrections = {n: t.to(device) for n, t in (correction or {}).items() if n in parameters}
    penalties = _penalties(parameters, run)
    penalties += [penalty] if penalty else []
    total_rate = 0.0
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
            rate = _learning_rate(step, run, train, epoch)
            for group in optimiser.param_groups:
                group["lr"] = rate
            total_rate += rate
            optimiser.zero_grad(set_to_none=True)
            with _dropped_blocks(blocks, run, step, copra, switch_stream):
                batch = rows.batch(next(batches), device)
                with _precision(train, device):
                    logits = model.logits(batch)
                    # Here too: what asks the model again must be answered in the same precision.
                    added = [penalty(batch, logits) for penalty in penalties]
                loss = functional.cross_entropy(logits, batch.labels)
                objective = sum(added, start=loss)
                objective.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.max_grad_norm)
            _correct(parameters, corrections)
            optimiser.step()
            total_loss += loss.detach()
    optimiser.zero_grad(set_to_none=True)
    model.module.eval()
    return Trained(float(total_loss) / run.steps, total_rate)


def _optimiser(parameters: Mapping[str, nn.Parameter], train: Train) -> torch.optim.Optimizer:
    groups: Any = parameters.values()
    if not train.decay_biases:
        groups = decay_groups(parameters, train.weight_decay)
    made = _OPTIMISERS[train.optimiser]
    momentum = {"momentum": train.momentum} if train.momentum else {}
    return made(groups, lr=train.learning_rate, weight_decay=train.weight_decay, **momentum)


_OPTIMISERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def _penalties(parameters: Mapping[str, nn.Parameter], run: LocalRun) -> list[Penalty]:
    """Return the terms that the rules add to the loss."""
    rules, penalties = run.rules, list[Penalty]()
    if rules.proximal:
        sent = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        penalties.append(lambda *_: rules.proximal / 2 * _squared_distance(parameters, sent))
    if rules.tail_penalty:
        kept = kept_directions(run.rank, rules.tail_share)
        penalties.append(lambda *_: rules.tail_penalty * tail_size(parameters, kept))
    return penalties


def _squared_distance(parameters: Tensors, others: Tensors) -> Tensor:
    """Return `||x - y||²` over all names."""
    return torch.stack([(p - others[n]).square().sum() for n, p in parameters.items()]).sum()


def _correct(parameters: Mapping[str, nn.Parameter], corrections: Tensors) -> None:
    for name, correction in corrections.items():
        gradient = parameters[name].grad
        # A branch that was dropped has no gradient; the correction holds for it all the same.
        parameters[name].grad = correction.clone() if gradient is None else gradient + correction


def _keep_statistics(module: nn.Module) -> None:
    """Leave batch statistics as they were pretrained: they would leak from client to client."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def _dropped_blocks(
    blocks: list[list[Any]], run: LocalRun, step: int, copra: Copra, stream: torch.Generator
) -> AbstractContextManager[None]:
    if not copra.enabled or step >= run.steps - math.ceil(copra.whole * run.steps):
        return nullcontext()
    at, of = {
        "run": (run.first_step + step, run.total_steps),
        "round": (step, run.steps),
    }[copra.over]
    probability = keep_probability(at, of, copra)
    if probability >= 1:
        return nullcontext()
    return switched(blocks, draw_switches(len(blocks), probability, stream))


def _precision(train: Train, device: torch.device) -> AbstractContextManager[Any]:
    if train.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _learning_rate(step: int, run: LocalRun, train: Train, epoch: int = 1) -> float:
    """Return the rate of a local step: warm-up within the round, decay over the whole run.

    `epoch` is the number of steps in one pass over the shard.
    """
    warmup_steps = math.ceil(train.warmup * run.steps)
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    at = min(run.first_step + step, run.total_steps)
    return train.learning_rate * warm * _DECAYS[train.decay](at, run.total_steps, epoch)


def _by_epochs(step: int, steps: int, epoch: int, *, from_zero: bool) -> float:
    """Return `warmed_cosine` of whole epochs; what is left of the last one belongs to it."""
    epochs = max(1, steps // epoch)
    at = min(step // epoch, epochs - 1)
    return warmed_cosine(at, epochs, min(10, epochs // 2), from_zero=from_zero)


# From the step of the run, the run's steps, and the steps of an epoch.
_DECAYS: Mapping[str, Callable[[int, int, int], float]] = {
    "none": lambda step, steps, _: 1.0,
    "linear": lambda step, steps, _: 1.0 - step / steps,
    "cosine": lambda step, steps, _: 0.5 * (1.0 + math.cos(math.pi * step / steps)),
    "warmed-cosine": functools.partial(_by_epochs, from_zero=False),
    "vpt": functools.partial(_by_epochs, from_zero=True),
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
