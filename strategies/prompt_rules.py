"""Server rules for soft prompts: what becomes of their norms when they are averaged.

Notation, for one position of a prompt: client k, of weight `q_k = n_k/Σn` among those that hold the
prompt, was sent `v_k⁰` and returns `v_k` in R^d.

    v̄ = Σ q_k v_k      ρ = Σ q_k ‖v_k‖      m = Σ q_k v_k/‖v_k‖      R = ‖m‖
    d_k = v_k - v_k⁰   d̄ = Σ q_k d_k

`‖v̄‖ ≤ ρ` (Jensen), so that averaging shortens a prompt the more the clients disagree. `promptfl`
leaves it at that (Guo et al., arXiv 2208.11625); the other rules are ours, around what Nemesis says
of norms (Fu et al., arXiv 2408.13979, on one machine). They act on every tensor of
`common.tensors.is_prompt`; all others are averaged by examples, and a prompt that no client of the
round holds stays as it is. Sums run in float64, results are float32.

A guarded rule falls back to v̄ at a position where directions cancel, R < 0.1, or where a norm that
it divides by is below 1e-12; how often is in the diagnostics. Every rule needs sums over clients
only, but for secure aggregation clients would have to send `v_k/‖v_k‖`, `‖v_k‖`, or `‖d_k‖` too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from common.tensors import Tensors, is_prompt, weighted_mean
from strategies.base import Merged, Options, Probe, Setting, Strategy, Update, model_of, noting
from strategies.fedavg import FedAvgOptions, fedavg

MIN_RESULTANT = 0.1
MIN_NORM = 1e-12


class PromptFLOptions(Options):
    """PromptFL has no options."""


def promptfl(_: PromptFLOptions, setting: Setting) -> Strategy:
    """Serve v̄: FedAvg of everything."""
    return fedavg(FedAvgOptions(), setting)


class MeanDirOptions(Options):
    """Options of mean-dir.

    Attributes:
        lam: λ, from the norm of the mean prompt (0, promptfl to the bit) to the clients' mean norm.
    """

    lam: float = Field(1.0, ge=0, le=1)


def mean_dir(options: MeanDirOptions, setting: Setting) -> Strategy:
    """Serve `r·v̄/‖v̄‖`, `r = (1-λ)‖v̄‖ + λρ`; guarded. Clients with long prompts steer the most."""
    lam = options.lam
    if lam == 0:
        return promptfl(PromptFLOptions(), setting)

    def rule(means: Means, _: Tensor) -> tuple[Tensor, Tensor]:
        length = norms(means.vector)
        wanted = (1 - lam) * length + lam * means.norm
        return wanted * means.vector / length.clamp_min(MIN_NORM), means.cancelled | _zero(length)

    return _ruled(rule, setting)


class DirMagOptions(Options):
    """dir-mag has no options."""


def dir_mag(_: DirMagOptions, setting: Setting) -> Strategy:
    """Serve `ρ·m/‖m‖`, norms and directions averaged apart; guarded. All norms steer alike."""

    def rule(means: Means, _: Tensor) -> tuple[Tensor, Tensor]:
        unit = means.direction / norms(means.direction).clamp_min(MIN_NORM)
        return means.norm * unit, means.cancelled

    return _ruled(rule, setting)


class UpdateNormOptions(Options):
    """Options of update-norm.

    Attributes:
        cap: the most that the mean change is stretched by.
    """

    cap: float = Field(4.0, ge=1)


def update_norm(options: UpdateNormOptions, setting: Setting) -> Strategy:
    """Serve `v + d̄·min(cap, Σ q_k‖d_k‖/‖d̄‖)`: a step as long as the clients' are on average.

    `v` is the server's own prompt. Guarded where d̄ vanishes; R is of no concern here, since what
    may cancel are changes, and there the cap holds.
    """

    def rule(means: Means, before: Tensor) -> tuple[Tensor, Tensor]:
        length = norms(means.change)
        stretch = (means.change_norm / length.clamp_min(MIN_NORM)).clamp_max(options.cap)
        return before + stretch * means.change, _zero(length)

    return _ruled(rule, setting)


class ShrinkOptions(Options):
    """Options of shrink.

    Attributes:
        factor: g, what every prompt is multiplied by in every round; 1 is the rule underneath.
        over: the rule underneath, with its usual options.
    """

    factor: float = Field(0.9, gt=0, le=1)
    over: Literal["promptfl", "mean-dir", "dir-mag"] = "promptfl"


def shrink(options: ShrinkOptions, setting: Setting) -> Strategy:
    """Serve `g·v`, v of the rule underneath: Nemesis by the server, round after round."""
    return _afterwards(_UNDER_SHRINK[options.over](setting), lambda v: options.factor * v)


_UNDER_SHRINK: Mapping[str, Callable[[Setting], Strategy]] = {
    "promptfl": lambda setting: promptfl(PromptFLOptions(), setting),
    "mean-dir": lambda setting: mean_dir(MeanDirOptions(), setting),
    "dir-mag": lambda setting: dir_mag(DirMagOptions(), setting),
}


class NormProxOptions(Options):
    """Options of norm-prox.

    Attributes:
        threshold: t, what every norm loses in every round; PUN with A = 1 takes about 0.0125 of 16
            vectors in ten steps of SGD at rate 0.002 with momentum 0.9.
    """

    threshold: float = Field(0.01, ge=0)


def norm_prox(options: NormProxOptions, setting: Setting) -> Strategy:
    """Serve `max(0, 1 - t/‖v̄‖)·v̄`: the exact proximal step of `t·Σ ‖v‖`, PUN by the server."""

    def threshold(v: Tensor) -> Tensor:
        # At v = 0 both factors are finite, and the product is 0.
        return (1 - options.threshold / norms(v).clamp_min(MIN_NORM)).clamp_min(0) * v

    return _afterwards(promptfl(PromptFLOptions(), setting), threshold)


@dataclass(frozen=True)
class Means:
    """What the server makes of one prompt in a round: means over clients, float64.

    Attributes:
        vector: v̄ (..., d).
        norm: ρ (..., 1).
        direction: m (..., d).
        vanished: the share of clients (..., 1), by weight, whose norm is below 1e-12.
        change: d̄ (..., d).
        change_norm: `Σ q_k ‖d_k‖` (..., 1).
    """

    vector: Tensor
    norm: Tensor
    direction: Tensor
    vanished: Tensor
    change: Tensor
    change_norm: Tensor

    @property
    def cancelled(self) -> Tensor:
        """Say at which positions (..., 1) m has no meaning."""
        return (norms(self.direction) < MIN_RESULTANT) | (self.vanished > 0)


# From the means, and the server's prompt before (..., d) in float64, to the prompt after (..., d)
# and to where that has no meaning (..., 1).
_Rule = Callable[[Means, Tensor], tuple[Tensor, Tensor]]
_STATISTICS = ("norm", "direction", "vanished", "change", "change_norm")


def norms(vectors: Tensor) -> Tensor:
    """Return the L2 norms (..., 1) of vectors (..., d)."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return lengths


def _zero(norm: Tensor) -> Tensor:
    return norm < MIN_NORM


def _ruled(rule: _Rule, setting: Setting) -> Strategy:
    """Let `rule` merge the prompts, and FedAvg all else."""

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        averaged = weighted_mean(_with_statistics(updates))
        merged, hits = dict(state), {}
        for name, mean in model_of(averaged).items():
            if not is_prompt(name):
                merged[name] = mean
                continue
            means = Means(mean, *(averaged[f"{what}/{name}"] for what in _STATISTICS))
            ruled, meaningless = rule(means, state[name].double())
            merged[name] = torch.where(meaningless, mean, ruled).float()
            hits[name] = int(meaningless.sum())
        return Merged(merged, {"guard_hits": hits})

    return replace(fedavg(FedAvgOptions(), setting), merge=merge)


def _with_statistics(updates: Iterable[Update]) -> Iterator[tuple[int, Tensors]]:
    """Yield `(num_examples, tensors)`, in which prompts are float64 and have their statistics."""
    for update in updates:
        tensors = dict(update.tensors)
        for name in filter(is_prompt, update.tensors):
            vector = update.tensors[name].double()
            change, norm = vector - update.sent[name].double(), norms(vector)
            tensors |= {
                name: vector,
                f"norm/{name}": norm,
                f"direction/{name}": vector / norm.clamp_min(MIN_NORM),
                f"vanished/{name}": _zero(norm).double(),
                f"change/{name}": change,
                f"change_norm/{name}": norms(change),
            }
        yield update.num_examples, tensors
        del update


def _afterwards(inner: Strategy, step: Callable[[Tensor], Tensor]) -> Strategy:
    """Take `step`, in float64, with every prompt that a client of the round holds, once merged."""

    def merge(state: Tensors, updates: Iterable[Update], probe: Probe | None) -> Merged:
        held: set[str] = set()
        merged = inner.merge(state, noting(updates, held), probe)
        stepped = {n: step(merged.state[n].double()).float() for n in filter(is_prompt, held)}
        return Merged({**merged.state, **stepped}, merged.diagnostics)

    return replace(inner, merge=merge)
