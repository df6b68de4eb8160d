"""Slopes: how the loss of every row would change along many directions, by one backward pass.

With x what an adapted layer is given and g the gradient of a row's loss by what it puts out, the
slope of that loss along a change `D = Σ_j B_j A_j` of the layer's weight is `Σ_tokens gᵀ·D·x =
Σ_tokens Σ_j (B_jᵀg)·(A_j x)`: no direction has to be loaded, and no matrix to be formed.
Source: copra specification 7.3 (d), row by row.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.adapters import AdaptedBackbone
from common.cores import in_pieces
from common.errors import ConfigError
from common.features import Features
from common.lowrank import Directions, Term
from common.tensors import Tensors

# Activations are held for the backward pass.
_BATCH = 64


def slopes(
    model: AdaptedBackbone, rows: Features, directions: Directions, cores: int = 1
) -> tuple[Tensor, Tensor]:
    """Return losses (rows,) of the loaded model, and their derivatives (rows, K) in float64.

    Dropout is off. Rows must not meet in the model, as in batch statistics that are trained.
    `cores` is how many of them a model on the CPU may keep busy.

    Raises:
        ConfigError: a head that moves is no linear layer.
    """
    torch.set_num_threads(1)
    device = model.device
    for parameter in model.parameters().values():
        parameter.requires_grad_(True)
    moves = _moves(model, directions, device)
    model.module.eval()

    with _watched(moves) as here:

        def slopes_of(positions: Tensor) -> tuple[Tensor, Tensor]:
            batch = rows.batch(positions, device)
            here.seen = seen = list[_Seen]()
            loss = functional.cross_entropy(model.logits(batch), batch.labels, reduction="none")
            gradients = torch.autograd.grad(loss.sum(), [output for _, _, output in seen])
            found = [
                move.slopes(given, gradient)
                for (move, given, _), gradient in zip(seen, gradients, strict=True)
            ]
            return loss.detach().cpu(), torch.stack(found).sum(dim=0).cpu()

        busy = cores if device.type == "cpu" else 1
        pieces = in_pieces(slopes_of, rows.positions(_BATCH), busy)
    losses, found = zip(*pieces, strict=True)
    return torch.cat(losses), torch.cat(found)


class _FactoredMove:
    """The changes of an adapted layer."""

    def __init__(self, layer: nn.Module, stack: Term, mixing: Tensor, device: torch.device) -> None:
        self.layer = layer
        self._B, self._A = stack.B.to(device, torch.float32), stack.A.to(device, torch.float32)
        self._mixing = mixing.to(device, torch.float64)

    def slopes(self, given: Tensor, gradient: Tensor) -> Tensor:
        """Return (rows, K) from what the layer was given and the gradient of what it put out."""
        products = (gradient.float() @ self._B) * functional.linear(given.float(), self._A)
        return products.double().flatten(1, -2).sum(dim=1) @ self._mixing


class _DenseMove:
    """The changes of a linear layer of a head: weight (K, m, n) and bias (K, m), or neither."""

    def __init__(self, layer: nn.Module, changes: Tensors, device: torch.device) -> None:
        self.layer = layer
        self._changes = {name: tensor.to(device, torch.float32) for name, tensor in changes.items()}

    def slopes(self, given: Tensor, gradient: Tensor) -> Tensor:
        """Return (rows, K) from what the layer was given and the gradient of what it put out."""
        given, gradient = given.float(), gradient.float()
        parts = []
        if (weight := self._changes.get("weight")) is not None:
            parts.append(torch.einsum("b...m,kmn,b...n->bk", gradient, weight, given))
        if (bias := self._changes.get("bias")) is not None:
            parts.append(torch.einsum("b...m,km->bk", gradient, bias))
        return torch.stack(parts).double().sum(dim=0)


_Move = _FactoredMove | _DenseMove


def _moves(model: AdaptedBackbone, directions: Directions, device: torch.device) -> list[_Move]:
    layers = model.layers
    moves: list[_Move] = [
        _FactoredMove(layers[module], stack, directions.mixing, device)
        for module, stack in directions.stacks.items()
    ]
    owned = {name: t for name, t in directions.entries.items() if name in model.parameters()}
    for name in sorted({name.rpartition(".")[0] for name in owned}):
        head = model.head_layer(name)
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"the head {name} is a {type(head).__name__}: slopes are known along linear "
                "layers only; choose strategy.copra-merge.screening = 'none'"
            )
        mine = {n.rpartition(".")[2]: t for n, t in owned.items() if n.rpartition(".")[0] == name}
        moves.append(_DenseMove(head, mine, device))
    return moves


# A move, what its layer was given, and what it put out.
_Seen = tuple[_Move, Tensor, Tensor]


@contextmanager
def _watched(moves: Iterable[_Move]) -> Iterator[threading.local]:
    """Note, in each thread's `seen`, what every layer is given and puts out in forward passes."""
    here = threading.local()

    def note(move: _Move) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            here.seen.append((move, inputs[0].detach(), output))

        return hook

    hooks = [move.layer.register_forward_hook(note(move)) for move in moves]
    try:
        yield here
    finally:
        for hook in hooks:
            hook.remove()
