"""Server optimisers: a merge's `Δ = merged - x` is the pseudo-gradient of a step on the server.

Any method whose state is a vector `x` that travels can be wrapped: `optimised(inner, rule)`. Hsu et
al., arXiv 1909.06335 (FedAvgM); Reddi et al., arXiv 2003.00295, algorithm 2 (FedAdagrad, FedYogi,
FedAdam, without bias correction). Sums run in float64; moments are kept in float32 under
`server/m/` and `server/v/`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from common.tensors import Tensors, part_of
from strategies.base import Merged, Probe, Setting, Strategy, Update, noting
from strategies.over import OverOptions, underlying

Moments = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """A server optimiser for one tensor.

    Attributes:
        start: the moments before the first step of a tensor like this one, by their letters.
        step: from the moments and Δ to the new moments and what is added to the tensor.
    """

    start: Callable[[Tensor], Moments]
    step: Callable[[Moments, Tensor], tuple[Moments, Tensor]]


def optimised(inner: Strategy, rule: Rule) -> Strategy:
    """Let `rule` decide how far the state goes where `inner` merges to.

    Only tensors that a client of the round has trained take a step: momentum does not move the head
    of a task that nobody holds.
    """

    def merge(state: Tensors, updates: Iterable[Update], probe: Probe | None) -> Merged:
        held: set[str] = set()
        merged = inner.merge(state, noting(updates, held), probe)
        trains = inner.trains(state)
        stepped = dict(merged.state)
        for name in sorted(name for name in held if part_of(name) in trains):
            before = state[name].double()
            moments, step = rule.step(
                _moments(state, name, rule), merged.state[name].double() - before
            )
            stepped |= {f"server/{m}/{name}": tensor.float() for m, tensor in moments.items()}
            stepped[name] = (before + step).float()
        return Merged(stepped, merged.diagnostics)

    return replace(inner, merge=merge)


def _moments(state: Tensors, name: str, rule: Rule) -> Moments:
    """Return the moments of a tensor, float64; those of the start if it has never taken a step."""
    start = rule.start(state[name])
    return {m: state.get(f"server/{m}/{name}", tensor).double() for m, tensor in start.items()}


class FedAvgMOptions(OverOptions):
    """Options of FedAvgM; without momentum and at learning rate 1 it is the method underneath.

    Attributes:
        learning_rate: η.
        momentum: β.
    """

    learning_rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)


def fedavgm(options: FedAvgMOptions, setting: Setting) -> Strategy:
    """Step by `v ← βv + Δ`, `x ← x + ηv`."""

    def step(moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        v = options.momentum * moments["v"] + delta
        return {"v": v}, options.learning_rate * v

    rule = Rule(lambda tensor: {"v": torch.zeros_like(tensor)}, step)
    return optimised(underlying(options, setting), rule)


class _AdaptiveOptions(OverOptions):
    """Options of the adaptive rules, by the letters of arXiv 2003.00295.

    Attributes:
        learning_rate: η, of the paper's grid; the best depends on the task.
        beta1: of the first moment, `m ← β1 m + (1-β1) Δ`.
        tau: τ, how adaptive the step is: `x ← x + η m/(√v + τ)`, and `v = τ²` at the start.
    """

    learning_rate: float = Field(0.01, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    tau: float = Field(1e-3, gt=0)


class FedAdagradOptions(_AdaptiveOptions):
    """Options of FedAdagrad; without a first moment, as usual."""

    beta1: float = Field(0.0, ge=0, lt=1)


class FedAdamOptions(_AdaptiveOptions):
    """Options of FedAdam and FedYogi.

    Attributes:
        beta2: β2, of the second moment; 1 leaves it at τ².
    """

    beta2: float = Field(0.99, ge=0, le=1)


def fedadagrad(options: FedAdagradOptions, setting: Setting) -> Strategy:
    """Step by the adaptive rule with `v ← v + Δ²`."""
    return _adaptive(options, setting, lambda v, squared: v + squared)


def fedadam(options: FedAdamOptions, setting: Setting) -> Strategy:
    """Step by the adaptive rule with `v ← β2 v + (1-β2) Δ²`."""
    beta2 = options.beta2
    return _adaptive(options, setting, lambda v, squared: beta2 * v + (1 - beta2) * squared)


def fedyogi(options: FedAdamOptions, setting: Setting) -> Strategy:
    """Step by the adaptive rule with `v ← v - (1-β2) Δ² sgn(v - Δ²)`."""
    return _adaptive(
        options,
        setting,
        lambda v, squared: v - (1 - options.beta2) * squared * torch.sign(v - squared),
    )


def _adaptive(
    options: _AdaptiveOptions, setting: Setting, second: Callable[[Tensor, Tensor], Tensor]
) -> Strategy:
    """Step by `x ← x + η m/(√v + τ)`; `second` is from (v, Δ²) to the new v."""
    beta1, tau = options.beta1, options.tau

    def start(tensor: Tensor) -> Moments:
        return {"m": torch.zeros_like(tensor), "v": torch.full_like(tensor, tau**2)}

    def step(moments: Moments, delta: Tensor) -> tuple[Moments, Tensor]:
        m = beta1 * moments["m"] + (1 - beta1) * delta
        v = second(moments["v"], delta.square())
        return {"m": m, "v": v}, options.learning_rate * m / (v.sqrt() + tau)

    return optimised(underlying(options, setting), Rule(start, step))
