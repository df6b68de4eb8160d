"""Prompt transfer: a source prompt, learned on text, becomes the prompt of a vision model.

The three transfers of Zhang et al. (ICLR 2025, OpenReview SYnIf4LxAG). S (n, d_s) is the source
prompt and constant, P (l, d) the target's:

    frozen       P = S
    projection   P = S Wᵀ + 1 bᵀ
    attention    P = [softmax(Q Kᵀ) V ; T],  K = S W_kᵀ + 1 b_kᵀ,  V = S W_vᵀ + 1 b_vᵀ

A transfer is a function of what is trained, `{name: tensor}`, float32. Once trained it is folded:
P is a constant then, and a plain prompt is all that is served. Names of the tensors:

- `transfer.prompt.weight` (d, d_s), `.bias` (d,);
- `transfer.prompt.key_weight`, `.key_bias`, `.value_weight`, `.value_bias`, and `.gain` (1,) where
  rows are normalised;
- `transfer.own.queries` (l_s, d) and `own.image` (1, l_t, d), T: what a client may keep to itself.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from common.seeds import torch_generator
from common.tensors import Tensors

TARGET = "own.image"
WEIGHT, BIAS = "transfer.prompt.weight", "transfer.prompt.bias"
QUERIES, GAIN = "transfer.own.queries", "transfer.prompt.gain"
KEY_WEIGHT, KEY_BIAS = "transfer.prompt.key_weight", "transfer.prompt.key_bias"
VALUE_WEIGHT, VALUE_BIAS = "transfer.prompt.value_weight", "transfer.prompt.value_bias"


class Transfer(Protocol):
    """A way from a source prompt to a target prompt."""

    @property
    def length(self) -> int:
        """Return l, the vectors of P."""

    def shapes(self) -> dict[str, torch.Size]:
        """Return name and shape of everything that is trained; the source is not."""

    def start(self, seed: int) -> dict[str, Tensor]:
        """Return where training starts, a function of the seed."""

    def prompt(self, tensors: Tensors) -> Tensor:
        """Return P (l, d); gradients flow to what is trained, and to nothing else."""


def fold(transfer: Transfer, tensors: Tensors) -> Tensor:
    """Return the plain prompt (l, d) that a trained transfer stands for, bit by bit."""
    with torch.no_grad():
        return transfer.prompt(tensors).detach().clone()


@dataclass(frozen=True, eq=False)
class Frozen:
    """`P = S`: nothing is trained but the head.

    Raises:
        ConfigError: the source is of another width than the target.
    """

    source: Tensor
    width: int

    def __post_init__(self) -> None:
        if self.source.shape[1] != self.width:
            raise ConfigError(
                f"transfer 'frozen': the source prompt has width {self.source.shape[1]} and the "
                f"target {self.width}; 'projection' and 'attention' bridge widths"
            )

    @property
    def length(self) -> int:
        """Return l = n."""
        return len(self.source)

    def shapes(self) -> dict[str, torch.Size]:
        """Return nothing."""
        return {}

    def start(self, seed: int) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def prompt(self, tensors: Tensors) -> Tensor:
        """Return S."""
        return self.source


@dataclass(frozen=True, eq=False)
class Projection:
    """`P = S Wᵀ + 1 bᵀ`, one linear map for all rows.

    P is linear in (W, b): the mean of clients' projectors is the projector of their mean prompt.

    Attributes:
        source: S (n, d_s).
        width: d.
        begin: what W starts as, a key of `PROJECTOR_STARTS`. The published one is `uniform`, a
            random map that keeps nothing of a row's direction, and 0.58 of its norm.
    """

    source: Tensor
    width: int
    begin: str = "identity"

    def __post_init__(self) -> None:
        if self.begin not in PROJECTOR_STARTS:
            choices = ", ".join(PROJECTOR_STARTS)
            raise ConfigError(f"start {self.begin!r} is not known; choose one of {choices}")

    @property
    def length(self) -> int:
        """Return l = n."""
        return len(self.source)

    def shapes(self) -> dict[str, torch.Size]:
        """Return those of W and b."""
        return _linear_shapes(WEIGHT, BIAS, self.width, self.source.shape[1])

    def start(self, seed: int) -> dict[str, Tensor]:
        """Return W and b; b is 0 unless W is `uniform`, whose bias PyTorch draws as well."""
        return PROJECTOR_STARTS[self.begin](WEIGHT, BIAS, self.width, self.source.shape[1], seed)

    def prompt(self, tensors: Tensors) -> Tensor:
        """Return P (n, d)."""
        return functional.linear(self.source, tensors[WEIGHT], tensors[BIAS])


@dataclass(frozen=True, eq=False)
class Attention:
    """`P = [A V ; T]`: l_s vectors that attend to the source, and l - l_s of the target's own.

    As published, softmax sees Q Kᵀ as it is: rows of large norm then get nearly all weight from the
    first step on. Repaired, which is the default here, scores are divided by √d and rows of S have
    norm 1 times one learned gain.

    Attributes:
        source: S (n, d_s), of one prompt or of several below each other.
        width: d.
        bound: of T's start, U(-bound, bound): see `vpt_bound`.
        length: l.
        concentrated: l_s, from 1 to l.
        scaled: whether scores are divided by √d.
        unit_rows: whether rows of S are normalised.
        top: how many source vectors a query may attend to, the best; 0 for all. Ours.

    Raises:
        ConfigError: l_s or `top` is out of range.
    """

    source: Tensor
    width: int
    bound: float
    length: int = 100
    concentrated: int = 50
    scaled: bool = True
    unit_rows: bool = True
    top: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.concentrated <= self.length:
            raise ConfigError(
                f"transfer 'attention': {self.concentrated} concentrated vectors must be 1 to the "
                f"{self.length} of the prompt"
            )
        if not 0 <= self.top <= len(self.source):
            raise ConfigError(
                f"transfer 'attention': top = {self.top} of {len(self.source)} source vectors"
            )

    def shapes(self) -> dict[str, torch.Size]:
        """Return those of Q, W_k, b_k, W_v, b_v, T, and of the gain."""
        of_source = self.source.shape[1]
        shapes = {
            QUERIES: torch.Size((self.concentrated, self.width)),
            **_linear_shapes(KEY_WEIGHT, KEY_BIAS, self.width, of_source),
            **_linear_shapes(VALUE_WEIGHT, VALUE_BIAS, self.width, of_source),
        }
        if self.unit_rows:
            shapes[GAIN] = torch.Size((1,))
        if own := self.length - self.concentrated:
            shapes[TARGET] = torch.Size((1, own, self.width))
        return shapes

    def start(self, seed: int) -> dict[str, Tensor]:
        """Return Q ~ N(0, 1), linear maps as PyTorch draws them, T uniform, and a gain of 1."""
        shapes = self.shapes()
        of_source = self.source.shape[1]
        queries = torch.randn(shapes[QUERIES], generator=torch_generator(seed, QUERIES))
        state = {
            QUERIES: queries,
            **_uniform(KEY_WEIGHT, KEY_BIAS, self.width, of_source, seed),
            **_uniform(VALUE_WEIGHT, VALUE_BIAS, self.width, of_source, seed),
        }
        if GAIN in shapes:
            state[GAIN] = torch.ones(1)
        if TARGET in shapes:
            state[TARGET] = uniform(shapes[TARGET], self.bound, torch_generator(seed, TARGET))
        return state

    def weights(self, tensors: Tensors) -> Tensor:
        """Return A (l_s, n): how much each query takes of each source vector; rows sum to 1."""
        keys = functional.linear(self._rows(tensors), tensors[KEY_WEIGHT], tensors[KEY_BIAS])
        scores = tensors[QUERIES] @ keys.T
        if self.scaled:
            scores = scores / self.width**0.5
        if self.top:
            least = scores.topk(self.top, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        return scores.softmax(dim=1)

    def prompt(self, tensors: Tensors) -> Tensor:
        """Return P (l, d)."""
        rows = self._rows(tensors)
        values = functional.linear(rows, tensors[VALUE_WEIGHT], tensors[VALUE_BIAS])
        concentrated = self.weights(tensors) @ values
        if TARGET not in tensors:
            return concentrated
        return torch.cat([concentrated, tensors[TARGET][0]])

    def _rows(self, tensors: Tensors) -> Tensor:
        if not self.unit_rows:
            return self.source
        return tensors[GAIN] * functional.normalize(self.source, dim=1)


# --- starts -----------------------------------------------------------------------------------


def vpt_bound(patch: int, width: int, channels: int = 3) -> float:
    """Return v of the start U(-v, v) of VPT (arXiv 2203.12119): `√(6/(channels·patch² + d))`."""
    return float((6 / (channels * patch**2 + width)) ** 0.5)


def uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    """Draw U(-bound, bound)."""
    return bound * (2 * torch.rand(shape, generator=generator) - 1)


def _linear_shapes(weight: str, bias: str, out: int, into: int) -> dict[str, torch.Size]:
    return {weight: torch.Size((out, into)), bias: torch.Size((out,))}


def _uniform(weight: str, bias: str, out: int, into: int, seed: int) -> dict[str, Tensor]:
    """Return a linear map as PyTorch starts it: W and b from U(-1/√d_s, 1/√d_s)."""
    return {
        name: uniform(shape, into**-0.5, torch_generator(seed, name))
        for name, shape in _linear_shapes(weight, bias, out, into).items()
    }


def _identity(weight: str, bias: str, out: int, into: int, seed: int) -> dict[str, Tensor]:
    """Return the map that keeps rows; where widths differ, cut off or filled up with zeros."""
    return {weight: torch.eye(out, into), bias: torch.zeros(out)}


def _orthogonal(weight: str, bias: str, out: int, into: int, seed: int) -> dict[str, Tensor]:
    """Return a random rotation; where widths differ, orthonormal columns or rows."""
    drawn = nn.init.orthogonal_(torch.empty(out, into), generator=torch_generator(seed, weight))
    return {weight: drawn, bias: torch.zeros(out)}


PROJECTOR_STARTS: Mapping[str, Callable[[str, str, int, int, int], dict[str, Tensor]]] = {
    "identity": _identity,
    "orthogonal": _orthogonal,
    "uniform": _uniform,
}


# --- how transfers are trained ------------------------------------------------------------------


def warmed_cosine(epoch: int, epochs: int, warmup: int = 10, *, from_zero: bool = False) -> float:
    """Return the factor on the learning rate in the 0-based epoch e of E.

    `(e + 1)/w` below w, then `½(1 + cos(π(e - w)/(E - w)))`. VPT's begins one step lower, `e/w`:
    `from_zero`, and its first epoch teaches nothing.

    Raises:
        ValueError: e is not among 0..E-1, or the warm-up takes all epochs.
    """
    if not 0 <= epoch < epochs or not 0 <= warmup < epochs:
        raise ValueError(f"epoch {epoch} of {epochs}, {warmup} of them to warm up")
    if epoch < warmup:
        return (epoch + (not from_zero)) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def decay_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Return an optimiser's parameter groups: what has one axis, as biases, is not decayed."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]
