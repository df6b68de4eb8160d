"""Name-wise arithmetic over `{name: tensor}`, the form in which trainable state travels."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.errors import UpdateRefusedError

Tensors = Mapping[str, Tensor]


def head_prefix(task: str) -> str:
    """Return how the names of a task's head begin; a dot in the task's name is written `%2E`."""
    return f"head.{task.replace('%', '%25').replace('.', '%2E')}."


def weighted_mean(weights: Sequence[float], members: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return `Σ w_k x_k / Σ w_k`, name by name, over the members that hold the name.

    Sums run in float64 in the order given and come back in the dtype of the first holder. A name
    that only some members hold (the head of one task among several) is averaged over these.
    """
    names = sorted({name for member in members for name in member})
    return {name: _mean_of(name, weights, members) for name in names}


def _mean_of(name: str, weights: Sequence[float], members: Sequence[Tensors]) -> Tensor:
    held = [(w, m[name]) for w, m in zip(weights, members, strict=True) if name in m]
    total = torch.zeros(held[0][1].shape, dtype=torch.float64)
    for weight, tensor in held:
        total += weight * tensor.to(torch.float64)
    return (total / sum(weight for weight, _ in held)).to(held[0][1].dtype)


def only(tensors: Tensors, names: Sequence[str] | set[str]) -> dict[str, Tensor]:
    """Return the tensors called `names`, in the order of `tensors`."""
    return {name: tensor for name, tensor in tensors.items() if name in names}


def check_update(received: Tensors, expected: Mapping[str, torch.Size]) -> None:
    """Raise `UpdateRefusedError`, naming the tensor, unless `received` is what was asked for.

    The key set and every shape must be as expected and every number finite: PEFT's own loader
    accepts a missing key, an unknown key and NaN without a word.
    """
    if missing := sorted(expected.keys() - received.keys()):
        raise UpdateRefusedError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(received.keys() - expected.keys()):
        raise UpdateRefusedError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
    for name, shape in expected.items():
        if received[name].shape != shape:
            got, want = tuple(received[name].shape), tuple(shape)
            raise UpdateRefusedError(f"{name} has shape {got}, not {want}")
        if not torch.isfinite(received[name]).all():
            bad = int((~torch.isfinite(received[name])).sum())
            raise UpdateRefusedError(f"{name} holds {bad} numbers that are NaN or infinite")


def digest(tensors: Tensors) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values; equal digests mean equal models."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
