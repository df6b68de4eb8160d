"""Clients that do harm, for experiments on what a method makes of them."""

import torch
from torch import Tensor

from common.config import Harm
from common.seeds import torch_generator
from common.tensors import Tensors


def random_labels(labels: Tensor, classes: int, seed: int, client: int) -> Tensor:
    """Return labels (n,) drawn at random, the same ones in every round."""
    stream = torch_generator(seed, "random labels", client)
    return torch.randint(classes, labels.shape, generator=stream)


def harmed(harm: Harm, client: int, start: Tensors, end: Tensors) -> Tensors:
    """Return what a client says that training has led to: `start + factor·(end - start)`."""
    if harm.kind != "scaled-update" or client not in harm.clients:
        return end
    return {
        name: start[name] + harm.factor * (tensor - start[name]) for name, tensor in end.items()
    }
