"""Nemesis: the norms of soft prompts, pulled in while they train.

A prompt is a tensor whose last axis is a vector and whose last but one is the position; whatever
stands in front (classes, the prompts of PLOT, layers) is averaged over. Source: Nemesis (arXiv
2408.13979), as its public code has it; where that is ambiguous or does not run, each function says
what is done here.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from scipy import special
from torch import Tensor

from common.errors import ConfigError
from common.tensors import Tensors

NORMS: Mapping[str, float] = {"one": 1.0, "two": 2.0, "inf": math.inf}


def vector_norms(prompt: Tensor, norm: str = "two") -> Tensor:
    """Return `||v||_p` of every vector: shape (..., d) gives (...).

    In float32, or float64 if the prompt is, also under autocast: in float16 the sum of squares
    overflows, and updates as small as Nemesis's are lost. The gradient of a zero vector is zero; of
    several largest entries under `inf`, each gets an equal share.

    Raises:
        ConfigError: there is no such norm.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm = {norm!r} is not known; choose one of {', '.join(NORMS)}")
    with torch.autocast(prompt.device.type, enabled=False):
        wide = prompt.to(torch.promote_types(prompt.dtype, torch.float32))
        # sqrt(sum(v²)) would have the gradient NaN at zero, even where its weight is 0.
        lengths: Tensor = torch.linalg.vector_norm(wide, NORMS[norm], dim=-1)
    return lengths


def norm_term(prompts: Tensors, weights: Tensors, norm: str = "two") -> Tensor:
    """Return `N(P; a) = 1/n(a)·Σ_i a_i·||v_i||_p`, summed over the prompts; a scalar.

    n(a) is how many a_i are not zero, at least 1; if all are zero, so are term and gradient.
    `||v_i||` is the mean over the axes in front of the positions: that of one class, prompt or
    layer counts as much as if it were alone. The public code sums over them, which makes the term
    as many times larger as there are classes or prompts, and so ties its strength to their number.
    For visual prompts no source has a formula; they follow the same rule.

    Args:
        prompts: by name, each (..., M, d).
        weights: of the same names, each (M,), finite and not negative.
        norm: a key of `NORMS`.

    Raises:
        ValueError: weights of another shape than (M,), or negative or not finite.
        FloatingPointError: a vector holds NaN or infinity.
    """
    if not prompts:
        raise ValueError("there is no prompt whose norms could be taken")
    terms = [_term(name, prompt, weights[name], norm) for name, prompt in prompts.items()]
    return functools.reduce(torch.add, terms)


def _term(name: str, prompt: Tensor, weights: Tensor, norm: str) -> Tensor:
    if weights.shape != prompt.shape[-2:-1]:
        raise ValueError(
            f"the weights of {name} have shape {tuple(weights.shape)}, "
            f"not one for each position of {tuple(prompt.shape)}"
        )
    lowest, highest = torch.stack(weights.aminmax()).tolist()
    if not 0 <= lowest <= highest < math.inf:
        raise ValueError(f"the weights of {name} must be 0 or more: {weights.tolist()}")
    lengths = vector_norms(prompt, norm)
    means = lengths.flatten(0, -2).mean(dim=0) if lengths.ndim > 1 else lengths
    shares = weights.to(means) / max(1, int(weights.count_nonzero()))
    term = (shares * means).sum()
    # A weight of 0 hides nothing: 0·NaN and 0·inf are NaN.
    if not math.isfinite(term.item()):
        bad = int((~lengths.isfinite()).sum())
        raise FloatingPointError(f"{bad} vectors of {name} hold NaN or infinity")
    return term


def uniform_weights(prompts: Tensors, strength: float) -> dict[str, Tensor]:
    """Return PUN's weights, `a_i = A` at every position: its term is A times the mean norm."""
    return {n: torch.full(p.shape[-2:-1], strength, device=p.device) for n, p in prompts.items()}


def nemesis_term(
    prompts: Tensors,
    strength: float,
    blend: float,
    adaptive: Callable[[], Tensors],
    norm: str = "two",
) -> Tensor:
    """Return `b·L_PUN + (1 - b)·L_PAN`, which the loss adds `w` times to the cross-entropy.

    Args:
        prompts: by name, each (..., M, d).
        strength: A of PUN.
        blend: b, from 0 (PAN alone) to 1 (PUN alone).
        adaptive: asked for PAN's weights by name, each (M,): `A'·1[i in S]`, or those of
            `position_weights`. Only asked for if b < 1, since finding S takes forward passes.
        norm: a key of `NORMS`.

    Raises:
        ValueError: b is not from 0 to 1, or as for `norm_term`.
        FloatingPointError: as for `norm_term`.
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"blend = {blend} is not from 0 (PAN) to 1 (PUN)")
    if blend == 1:
        return norm_term(prompts, uniform_weights(prompts, strength), norm)
    selective = (1 - blend) * norm_term(prompts, adaptive(), norm)
    if blend == 0:
        return selective
    return blend * norm_term(prompts, uniform_weights(prompts, strength), norm) + selective


def schedule_weight(at: int, of: int, steepness: float) -> float:
    """Return `w(e) = 1 - sigmoid(k·(e - E/2))` at the 0-based e of E; the paper's code has k = 0.2.

    Raises:
        ValueError: e is not among 0..E-1.
    """
    if not 0 <= at < of:
        raise ValueError(f"{at} is not among 0..{of - 1}")
    return float(special.expit(-steepness * (at - of / 2)))


def round_weight(at: int, of: int) -> float:
    """Return `schedule_weight` at the 0-based round, with k = 10/T so that every T sees all of it.

    It falls from 0.993 to almost 0.007; of 50 rounds it is the paper's own over 50 epochs.
    """
    return schedule_weight(at, of, steepness=10 / of)


def constant_weight(at: int, of: int) -> float:
    """Return 1, which the paper's code has for Food101 and OxfordPets."""
    return 1.0


SCHEDULES: Mapping[str, Callable[[int, int], float]] = {
    "logistic": round_weight,
    "constant": constant_weight,
}


def probe_positions(count: int, probed: int, generator: torch.Generator) -> Tensor:
    """Draw `probed` distinct positions of 0..count-1, uniformly: (probed,), int64.

    Raises:
        ConfigError: there are not as many, or none is asked for.
    """
    if not 1 <= probed <= count:
        raise ConfigError(f"{probed} positions are to be probed, but the prompt has 1 to {count}")
    return torch.randperm(count, generator=generator)[:probed]


def improving_positions(hits: Tensor, original_hits: Tensor | int) -> Tensor:
    """Return where more rows are right than with the original prompt; a tie is no improvement."""
    return hits > original_hits


@torch.no_grad()
def choose_positions(
    prompt: Tensor,
    probed: Tensor,
    factor: float,
    original_hits: Tensor | int,
    hits_of: Callable[[Tensor], Tensor],
    at_once: int,
) -> Tensor:
    """Return PAN's S as a mask (M,): probed positions that do better multiplied by `factor`.

    One copy of the prompt a probed position j, in which v_j alone is rescaled (of class-specific,
    layered or several prompts, v_j of all of them together). The prompt is left as it is, and no
    random number is drawn. Copies run under the caller's autocast: their hits compare with those of
    the training forward only if both have the same precision and dropout is off in both.

    Args:
        prompt: (..., M, d).
        probed: positions, as of `probe_positions`.
        factor: CW; below 1 it lowers norms.
        original_hits: rows of the current batch that the prompt itself gets right, counted in the
            training forward.
        hits_of: is given copies (k, ..., M, d); returns how many rows each gets right, (k,).
        at_once: at most so many copies a call, which bounds the memory.

    Raises:
        ValueError: `hits_of` returns another shape than (k,).
    """
    chosen = torch.zeros(prompt.shape[-2], dtype=torch.bool, device=prompt.device)
    for positions in torch.split(probed.to(prompt.device), at_once):
        copies = torch.stack([prompt] * len(positions))
        for copy, position in zip(copies, positions, strict=True):
            copy[..., position, :] *= factor
        hits = hits_of(copies)
        if hits.shape != positions.shape:
            raise ValueError(f"{len(positions)} copies gave hits of shape {tuple(hits.shape)}")
        chosen[positions] = improving_positions(hits, original_hits)
    return chosen


def position_probability(hits: Tensor, trials: Tensor) -> Tensor:
    """Return `p_i = (Σ h + 1)/(Σ n + 2)` from sums over clients, each (M,); 1/2 where none tried.

    Federated PAN (ours, not the paper's). A trial is one comparison of a copy with the original on
    the same rows, a hit one that `improving_positions` counts.

    Raises:
        ValueError: more hits than trials somewhere, or fewer than none.
    """
    if not ((hits >= 0) & (hits <= trials)).all():
        raise ValueError(f"hits {hits.tolist()} do not fit trials {trials.tolist()}")
    return (hits + 1) / (trials + 2)


def position_weights(strength: float, probability: Tensor) -> Tensor:
    """Return next round's `a_i = A·p_i`."""
    return strength * probability
