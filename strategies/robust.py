"""Robust reductions: a minority of malicious clients moves the model by a bounded amount.

- `median`: of every entry. Yin et al., arXiv 1803.01498, definition 1.
- `trimmed-mean`: of every entry, without the extremes on both sides. The same, definition 2.
- `multi-krum`: the mean of the clients that lie closest to their neighbours. Blanchard et al.,
  arXiv 1703.02757.

All on increments of the delta `s·B·A`. On factors a median means nothing: `(BQ, Q⁻¹A)` is the same
model with another median. Every client counts once, since the number of its examples is its own
claim. Heads are reduced likewise, each among the clients that hold it: over several tasks a
malicious client is in the minority only if it is so among the clients of its task. Multi-Krum
judges the whole of what a client changed, head and all, and so may drop a task of few clients.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.lowrank import Term, adapted_modules
from common.tensors import Tensors
from strategies.base import Merged, Options, Probe, Setting, Strategy, Update, heads_of, model_of
from strategies.increments import add_entrywise, add_mean, merging_increments


class MedianOptions(Options):
    """The median has no options."""


class TrimmedMeanOptions(Options):
    """Options of the trimmed mean.

    Attributes:
        trim: share of clients left out on either side, rounded up to whole clients, but so that
            one or two remain. Below ½.
    """

    trim: float = Field(0.2, ge=0, lt=0.5)


class MultiKrumOptions(Options):
    """Options of Multi-Krum.

    Attributes:
        byzantine: f, how many clients of a cohort may be malicious. It takes 2f+3 clients; a
            cohort that has lost some uses the largest f that it admits. 0 for that one always.
        keep: m, how many clients are averaged, at most K-f; 0 for K-f.
    """

    byzantine: int = Field(0, ge=0)
    keep: int = Field(0, ge=0)


def median(_: MedianOptions, setting: Setting) -> Strategy:
    """Add the median of every entry, and truncate to the largest rank; ranks may differ."""
    return _trimming(0.5, setting)


def trimmed_mean(options: TrimmedMeanOptions, setting: Setting) -> Strategy:
    """Add the trimmed mean of every entry, and truncate to the largest rank; ranks may differ."""
    return _trimming(options.trim, setting)


def _trimming(share: float, setting: Setting) -> Strategy:
    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        heads = heads_of(state)
        for name, head in heads.items():
            held = [u.tensors[name].double() for u in updates if name in u.tensors]
            if held:
                heads[name] = middle_mean(torch.stack(held), share).to(head.dtype)

        def rule(_: str, increments: Tensor) -> Tensor:
            return middle_mean(increments, share)

        merged = add_entrywise(state, updates, setting, rule, heads)
        found = {"trimmed_each_side": trimmed_each_side(len(updates), share)}
        return Merged(merged.state, {**merged.diagnostics, **found, **_equal(updates, updates)})

    return merging_increments(setting, merge)


def trimmed_each_side(clients: int, share: float) -> int:
    """Return ⌈share·K⌉, a share of a client being a client, but at most ⌊(K-1)/2⌋."""
    return min(math.ceil(round(share * clients, 9)), (clients - 1) // 2)


def middle_mean(values: Tensor, share: float) -> Tensor:
    """Return the mean over dim 0 of what is left in the middle; at a share of ½, the median."""
    cut = trimmed_each_side(len(values), share)
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def multi_krum(options: MultiKrumOptions, setting: Setting) -> Strategy:
    """Average the K-f clients (or `keep`) with the lowest Krum scores; ranks may differ."""
    everyone, wanted = len(setting.clients), options.byzantine
    if wanted > _admitted(everyone):
        raise ConfigError(
            f"strategy.multi-krum.byzantine = {wanted}: needs cohorts of {2 * wanted + 3} and "
            f"there are {everyone} clients; choose at most {_admitted(everyone)}"
            ", where 0 is for as many as a cohort admits"
        )

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        admitted = _admitted(len(updates))
        f = min(wanted or admitted, admitted)
        keep = min(options.keep or len(updates), len(updates) - f)
        scores = krum_scores(squared_distances(updates), f)
        best = sorted(range(len(updates)), key=lambda k: scores[k])[:keep]
        chosen = [updates[k] for k in sorted(best)]
        merged = add_mean(state, ((1.0, u) for u in chosen), setting)
        found = {"byzantine": f, "selected": [u.client.client for u in chosen]}
        if not admitted:
            found["decision"] = (
                f"a cohort of {len(updates)} is too small to suspect anyone: that takes 5"
            )
        elif f < wanted:
            found["decision"] = f"a cohort of {len(updates)} admits f = {f}, not {wanted}"
        return Merged(merged.state, {**merged.diagnostics, **found, **_equal(updates, chosen)})

    return merging_increments(setting, merge)


def _admitted(clients: int) -> int:
    return max(0, (clients - 3) // 2)


def krum_scores(distances: Tensor, byzantine: int) -> list[float]:
    """Return for each client the sum of (K, K) squared distances to its K-f-2 nearest others."""
    nearest = distances.sort(dim=1).values[:, 1:]  # without itself
    return nearest[:, : max(1, len(distances) - byzantine - 2)].sum(dim=1).tolist()


def squared_distances(updates: Sequence[Update]) -> Tensor:
    """Return `‖x_i - x_j‖²` (K, K), x_k all increments of client k: every module and the head."""
    products = inner_products(updates)
    lengths = products.diagonal()
    return (lengths[:, None] + lengths - 2 * products).clamp_min(0)


def inner_products(updates: Sequence[Update]) -> Tensor:
    """Return `<x_i, x_j>` (K, K), x_k all increments of client k: every module and the head.

    Those of low-rank matrices come from Gram matrices: with the factors of all ΔW_k and
    -S_k stacked as columns P and rows Q, `(PᵀP) ∘ (QQᵀ)` holds those of all pairs of directions.
    The head of another task counts as unchanged.
    """
    products = _head_products(updates)
    for module in adapted_modules(model_of(updates[0].tensors)):
        signed = [
            (sign * u.client.scale, k, Term.of(tensors, module))
            for k, u in enumerate(updates)
            for sign, tensors in ((1, u.tensors), (-1, u.sent))
        ]
        P = torch.cat([c * term.B.double() for c, _, term in signed], dim=1)
        Q = torch.cat([term.A.double() for *_, term in signed])
        owners = torch.tensor([k for _, k, term in signed for _ in range(term.rank)])
        owned = functional.one_hot(owners, len(updates)).double()
        products += owned.T @ ((P.T @ P) * (Q @ Q.T)) @ owned
    return products


def _head_products(updates: Sequence[Update]) -> Tensor:
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in sorted({name for u in updates for name in heads_of(u.tensors)}):
        held = [k for k, u in enumerate(updates) if name in u.tensors]
        x = torch.stack(
            [(updates[k].tensors[name].double() - updates[k].sent[name]).flatten() for k in held]
        )
        products[torch.tensor(held)[:, None], held] += x @ x.T
    return products


def _equal(updates: Sequence[Update], counted: Sequence[Update]) -> dict[str, Any]:
    """Return the weights of a merge in which those of `counted` count alike, the others not."""
    weights = {str(u.client.client): 0.0 for u in updates}
    return {"weights": weights | {str(u.client.client): 1 / len(counted) for u in counted}}
