"""Name-wise arithmetic over `{name: tensor}`, the form in which trainable state travels."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from common.errors import UpdateRefusedError

Tensors = Mapping[str, Tensor]


def head_prefix(task: str) -> str:
    """Return how the names of a task's head begin; a dot in the task's name is written `%2E`."""
    return f"head.{task.replace('%', '%25').replace('.', '%2E')}."


def part_of(name: str) -> str:
    """Return what a tensor is: `lora_A`, `lora_B`, `head` or `residual`; else its parent's name.

    Of a tensor that stands for another one, as `control/...` does, it is what comes first.
    """
    kind, slash, _ = name.partition("/")
    if slash:
        return kind
    return "head" if name.startswith("head.") else name.rpartition(".")[0].rpartition(".")[2]


def is_prompt(name: str) -> bool:
    """Say whether a tensor is a soft prompt: `prompt.*`, shared, or the context of task classes.

    The last axis of a prompt is the vector; all others count positions.
    """
    return name.startswith("prompt.") or (part_of(name) == "head" and name.endswith(".context"))


class RunningMean:
    """`Σ w_k x_k / Σ w_k`, name by name, over members that come one at a time.

    Sums run in float64 in the order given and come back in the dtype of the first holder. A name
    that only some members hold (the head of one task among several) is averaged over these. Holds
    two float32 members' worth of memory, however many come.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, weight: float, member: Tensors) -> None:
        """Count one member in."""
        sums, weights = self._sums, self._weights
        for name, tensor in member.items():
            if name in sums:
                sums[name].add_(tensor, alpha=weight)
                weights[name] += weight
            else:
                sums[name] = tensor.to(torch.float64, copy=True).mul_(weight)
                weights[name] = weight
                self._dtypes[name] = tensor.dtype

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of every name, sorted by name; the sums are spent on the way."""
        return {
            name: self._sums.pop(name).div_(self._weights[name]).to(self._dtypes[name])
            for name in sorted(self._sums)
        }


def weighted_mean(members: Iterable[tuple[float, Tensors]]) -> dict[str, Tensor]:
    """Return the `RunningMean` of these `(weight, tensors)`, read once."""
    running = RunningMean()
    for weight, member in members:
        running.add(weight, member)
        del member  # before the next one is asked for
    return running.mean()


def only(tensors: Tensors, names: Sequence[str] | set[str]) -> dict[str, Tensor]:
    """Return the tensors called `names`, in the order of `tensors`."""
    return {name: tensor for name, tensor in tensors.items() if name in names}


def check_names(received: Tensors, expected: Iterable[str]) -> None:
    """Raise `UpdateRefusedError`, naming one tensor, unless these and no others are there."""
    if missing := sorted(set(expected) - received.keys()):
        raise UpdateRefusedError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(received.keys() - set(expected)):
        raise UpdateRefusedError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")


def check_update(received: Tensors, expected: Mapping[str, torch.Size]) -> None:
    """Raise `UpdateRefusedError`, naming the tensor, unless `received` is what was asked for.

    The key set and every shape must be as expected and every number finite: PEFT's own loader
    accepts a missing key, an unknown key and NaN without a word.
    """
    check_names(received, expected)
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
