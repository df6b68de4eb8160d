"""Candidates: models that clients compare on rows of their own, so that scores alone come back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.memory import prefixed, under
from common.paths import standard_error
from common.tensors import Tensors

# By candidate, (C,): how far the mean loss falls from that of the first, and its standard error.
GAINS, ERRORS = "score/gains", "score/errors"


def packed(candidates: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return the candidates under names that tell them apart."""
    named: dict[str, Tensor] = {}
    for number, candidate in enumerate(candidates):
        named |= prefixed(f"candidate/{number}/", candidate)
    return named


def unpacked(tensors: Tensors) -> list[Tensors]:
    """Return the candidates that `packed` has named, in order."""
    numbers = {int(name.split("/")[1]) for name in tensors if name.startswith("candidate/")}
    return [under(f"candidate/{number}/", tensors) for number in sorted(numbers)]


def scores(losses: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what is sent of the losses (n,) of each candidate: gains over the first, paired."""
    gains = [losses[0].double() - others.double() for others in losses]
    return {
        GAINS: torch.stack([gain.mean() for gain in gains]).float(),
        ERRORS: torch.tensor([standard_error(gain) for gain in gains]),
    }
