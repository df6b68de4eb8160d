"""From what a client has trained to what it sends: the rules of the method, then the wire."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.training import Trained
from common.adapters import at_rank
from common.compression import Format, decode, encode
from common.lowrank import is_factor
from common.memory import Memory, prefixed, under
from common.messages import Plan
from common.seeds import child_seed
from common.sketches import sketches
from common.tails import kept_directions, tail_size
from common.tensors import Tensors, part_of


@dataclass(frozen=True)
class Upload:
    """What is sent, and what the client keeps to itself for later."""

    tensors: Tensors
    own: Tensors


def returned(
    plan: Plan,
    seed: int,
    scale: float,
    held: Tensors,
    start: Tensors,
    end: Tensors,
    memory: Memory,
    trained: Trained,
) -> Upload:
    """Return what the plan asks for.

    `held` is the model as it was sent, `start` and `end` the loaded model before and after
    training; `scale` is s of the adapter and `seed` that of the federation.
    """
    rules = plan.rules
    rank = rank_of(held)
    start, end = (at_rank(part, rank) for part in (_trained(plan, start), _trained(plan, end)))
    own = {n: t for n, t in memory.own.items() if n.startswith(("control/", "lost/"))}
    own |= prefixed("kept/", {n: t for n, t in end.items() if part_of(n) in rules.keeps})
    tensors = {n: t for n, t in end.items() if part_of(n) not in rules.keeps}
    if rules.tail_share < 1 and _tail_shrank(start, end, rank, rules.tail_share):
        tensors = at_rank(tensors, kept_directions(rank, rules.tail_share))
    if rules.control_variates:
        change = _control_change(start, end, under("control/", held), trained.total_rate)
        before = under("control/", own)
        own |= prefixed(
            "control/", {n: before[n] + t if n in before else t for n, t in change.items()}
        )
        tensors |= prefixed("control/", change)
    if rules.sketch:
        factors = {n: t for n, t in {**held, **end}.items() if is_factor(n)}
        own |= prefixed("pending/", factors)
        tensors = {n: t for n, t in tensors.items() if not is_factor(n)}
        tensors |= sketches(factors, scale, rules.sketch, child_seed(seed, "sketch", plan.round))
    return Upload(tensors, own)


def compressed(
    tensors: Tensors, held: Tensors, own: Tensors, form: Format, feedback: bool
) -> tuple[Tensors, Tensors]:
    """Return the tensors as they travel, and `own` with what that has lost.

    Increments over `held` are compressed; with `feedback` what the last upload lost is added first.
    Losses of what is not sent this time, as where methods alternate, wait for their turn.
    """
    kept = {n: t for n, t in own.items() if not n.startswith("lost/")}
    if form == "float32":
        return tensors, kept
    lost = under("lost/", own) if feedback else {}
    sent, losing = {}, {}
    for name, tensor in tensors.items():
        wanted = tensor - _like(held, name, tensor) + _like(lost, name, tensor)
        sent[name] = encode(wanted, form)
        losing[name] = wanted - decode(sent[name], form, tensor.shape)
    return sent, {**kept, **(prefixed("lost/", {**lost, **losing}) if feedback else {})}


def rank_of(model: Tensors) -> int:
    """Return the rank of the factors in a model; 0 if it has none, as with soft prompts."""
    return next((t.shape[0] for n, t in model.items() if part_of(n) == "lora_A"), 0)


def _trained(plan: Plan, state: Tensors) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if part_of(n) in plan.trains}


def _tail_shrank(start: Tensors, end: Tensors, rank: int, share: float) -> bool:
    kept = kept_directions(rank, share)
    return bool(kept < rank and tail_size(end, kept) < tail_size(start, kept))


def _control_change(
    start: Tensors, end: Tensors, common: Tensors, total_rate: float
) -> dict[str, Tensor]:
    """Return `c_k+ - c_k = (x_t - x_k) / (J eta) - c` (SCAFFOLD, option II)."""
    return {n: (start[n] - x) / total_rate - common[n] for n, x in end.items()}


def _like(tensors: Tensors, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor called `name`, cut or filled up with zeros to the shape of `tensor`."""
    like = torch.zeros_like(tensor)
    if name in tensors:
        found = tensors[name][tuple(slice(size) for size in tensor.shape)]
        like[tuple(slice(size) for size in found.shape)] = found
    return like
