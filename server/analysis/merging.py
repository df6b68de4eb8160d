"""One-shot merges of PEFT LoRA folders: the average of effective deltas, cut to rank R.

A module's merged delta is the best of rank R to `Σ_k w_k s_k B_k A_k`, Σ w = 1, by the factored SVD
of the copra-merge specification, 7.1; no base model is needed and no full matrix is formed. A
module that an adapter does not touch counts as a delta of zero there. Heads, and whatever else was
saved whole, are averaged with the same weights over the adapters that hold them, for the others do
not say what their base has in this place. Biases of adapters with `lora_bias` average as the deltas
do. Nothing here says whether the merged adapter is any good: that takes rows of a task.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.lowrank import (
    GAUGES,
    Span,
    Term,
    factor_names,
    kept_share,
    named_factors,
)
from common.peft_folders import (
    PREFIX,
    PeftFolder,
    bias_name,
    exact_pattern,
    read_peft_folder,
    scale_of,
    target_names,
    write_peft_folder,
)
from common.tensors import weighted_mean
from server.folders import appearing_whole, write_json
from strategies.base import revive_dead_directions

NUMBERS = "merge.json"
_ENOUGH = 0.99  # of the energy, in the rank that is advised
# PEFT demands a saved head of adapters for these tasks.
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        weights: one an adapter, of any sum; empty for equal ones.
        rank: R of every module; 0 for the largest that any adapter's configuration gives it.
        alpha: of the merged adapter; 0 for that which keeps the first adapter's scale s.
        gauge: how the singular values are split over B and A, a key of `GAUGES`.
        any_base: merge adapters whose base models go by different names.
        without_heads: drop whatever was saved whole.
    """

    weights: tuple[float, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    gauge: str = "balanced"
    any_base: bool = False
    without_heads: bool = False


@dataclass(frozen=True)
class MergePlan:
    """Adapters that can be merged, and what the merged one will be.

    Attributes:
        weights: one an adapter, with sum 1.
        config: of the merged adapter: the first one's but for what merging decides.
        ranks: by module, sorted.
        scales: s of the merged adapter, by module.
        biased: whether any adapter has `lora_bias`.
    """

    adapters: tuple[PeftFolder, ...]
    weights: tuple[float, ...]
    options: MergeOptions
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    biased: bool


def plan_merge(folders: Sequence[Path], options: MergeOptions) -> MergePlan:
    """Open the folders and settle all that can be before their numbers are read.

    Raises:
        ConfigError: the adapters cannot be merged with each other, or not in this way.
        DataError: a folder is no plain LoRA adapter.
    """
    weights = _checked_weights(folders, options)
    adapters = tuple(read_peft_folder(folder) for folder in folders)
    _check_together(adapters, options)
    ranks = _ranks(adapters, options)
    first, rank = adapters[0], max(ranks.values())
    usual = scale_of(first.config["lora_alpha"], first.config["r"], first.rslora)
    alpha = options.alpha or _alpha_of(usual, rank, first)
    scale = scale_of(alpha, rank, first.rslora)
    alphas = {
        module: alpha if r == rank else _alpha_of(scale, r, first) for module, r in ranks.items()
    }
    scales = {module: scale_of(alphas[module], r, first.rslora) for module, r in ranks.items()}
    biased = any(bias_name(module) in a.shapes for a in adapters for module in a.modules)
    config = dict(first.config) | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(m): alphas[m] for m, r in ranks.items() if r != rank},
        "modules_to_save": _modules_to_save(adapters) or None,
    }
    if isinstance(config.get("init_lora_weights"), str):
        config["init_lora_weights"] = True  # a start that not every rank has
    if biased:
        config["lora_bias"] = True
    if list(ranks) != list(first.modules):
        config["target_modules"] = target_names(list(ranks))
        for narrowing in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            config[narrowing] = None
    if options.without_heads:
        config["modules_to_save"] = None
        if config.get("task_type") in _WITH_HEADS:
            config["task_type"] = None
    return MergePlan(adapters, weights, options, config, ranks, scales, biased)


def write_merged(
    plan: MergePlan, out: Path, on_module: Callable[[str], None] = lambda module: None
) -> dict[str, Any]:
    """Write the merged adapter as a PEFT folder with `merge.json` beside it; return its numbers.

    Factors are float32; what was saved whole keeps its type.

    Raises:
        ConfigError: the folder exists.
        DataError: a tensor holds NaN or infinite numbers.
    """
    with appearing_whole(out) as unfinished:
        merged = _Merged(len(plan.adapters))
        for module in plan.ranks:
            merged.add(_merge_module(module, plan))
            on_module(module.removeprefix(PREFIX))
        whole = {} if plan.options.without_heads else _averaged_whole(plan)
        numbers = _describe(plan, merged)
        write_peft_folder(unfinished, plan.config, merged.tensors | whole)
        write_json(unfinished / NUMBERS, numbers)
    return numbers


# --- what may be merged --------------------------------------------------------------------------


def _checked_weights(folders: Sequence[Path], options: MergeOptions) -> tuple[float, ...]:
    """Return the weights, with sum 1."""
    if options.gauge not in GAUGES:
        raise ConfigError(f"--gauge {options.gauge!r}: choose from {', '.join(GAUGES)}")
    if options.rank < 0:
        raise ConfigError(f"--rank {options.rank}: a rank is at least 1")
    if not 0 <= options.alpha < math.inf:
        raise ConfigError(f"--alpha {options.alpha:g}: alpha is positive")
    weights = options.weights or (1.0,) * len(folders)
    given = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(folders):
        raise ConfigError(
            f"--weights {given}: {len(weights)} weights for {len(folders)} adapters; give one each"
        )
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise ConfigError(
            f"--weights {given}: weights are finite, not negative, and not all zero; they are "
            "divided by their sum"
        )
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _check_together(adapters: Sequence[PeftFolder], options: MergeOptions) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if other.base != first.base and not options.any_base:
            raise ConfigError(
                f"{first.folder} is of base {_named(first.base)}, {other.folder} of "
                f"{_named(other.base)}; if these are the same weights, say --any-base"
            )
        kinds = [adapter.config.get("task_type") for adapter in (first, other)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"{first.folder} is of task_type {kinds[0]}, {other.folder} of {kinds[1]}; "
                "adapters for different kinds of task cannot be merged"
            )
    for holder, other, module in _shared(adapters, lambda adapter: adapter.modules):
        sizes = [adapter.size(module) for adapter in (holder, other)]
        if sizes[0] != sizes[1]:
            (out, into), (other_out, other_in) = sizes
            raise ConfigError(
                f"{module} is {out}x{into} in {holder.folder} and {other_out}x{other_in} in "
                f"{other.folder}: these adapters are of different base models"
            )
    if not options.without_heads:
        _check_whole(adapters)


def _named(base: tuple[str | None, str | None]) -> str:
    name, revision = base
    return f"{name}" + (f" (revision {revision})" if revision else "")


def _shared(
    adapters: Sequence[PeftFolder], names_of: Callable[[PeftFolder], Sequence[str]]
) -> Iterator[tuple[PeftFolder, PeftFolder, str]]:
    """Yield every name with its first holder and each of its other holders."""
    first: dict[str, PeftFolder] = {}
    for adapter in adapters:
        for name in names_of(adapter):
            if first.setdefault(name, adapter) is not adapter:
                yield first[name], adapter, name


def _check_whole(adapters: Sequence[PeftFolder]) -> None:
    unlike = [
        (holder, other, name)
        for holder, other, name in _shared(adapters, lambda adapter: adapter.saved_whole)
        if holder.shapes[name] != other.shapes[name]
    ]
    if unlike:
        holder, other, name = unlike[0]
        names = ", ".join(sorted({name.removeprefix(PREFIX) for *_, name in unlike}))
        raise ConfigError(
            f"heads of unlike shape cannot be averaged: {names}; {name.removeprefix(PREFIX)} is "
            f"{holder.shapes[name]} in {holder.folder} and {other.shapes[name]} in {other.folder}; "
            "--without-heads merges the rest"
        )
    for saver, other in itertools.permutations(adapters, 2):
        for key in saver.config.get("modules_to_save") or []:
            for module in target_names(other.modules):
                if re.match(rf"(^|.*\.){key}($|\..*)", module):
                    raise ConfigError(
                        f"{saver.folder} has saved {key} whole, and {other.folder} has LoRA "
                        f"factors of {module}: the two cannot be averaged"
                    )


def _modules_to_save(adapters: Sequence[PeftFolder]) -> list[str]:
    lists = [adapter.config.get("modules_to_save") or [] for adapter in adapters]
    return list(dict.fromkeys(name for names in lists for name in names))


def _ranks(adapters: Sequence[PeftFolder], options: MergeOptions) -> dict[str, int]:
    """Return the rank of every module of any adapter, sorted by name."""
    sizes = {m: adapter.size(m) for adapter in adapters for m in adapter.modules}
    if options.rank > (most := max(min(size) for size in sizes.values())):
        raise ConfigError(
            f"--rank {options.rank}: the largest module has {most} directions; choose at most that"
        )
    return {m: options.rank or max(adapter.rank(m) for adapter in adapters) for m in sorted(sizes)}


def _alpha_of(scale: float, rank: int, first: PeftFolder) -> float:
    """Return the alpha that gives this scale, an integer where it is whole, as usual in PEFT."""
    alpha = scale / scale_of(1.0, rank, first.rslora)
    whole = round(alpha)
    return whole if whole >= 1 and math.isclose(alpha, whole, rel_tol=1e-12) else alpha


# --- merging -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MergedModule:
    """One merged module.

    Attributes:
        spectrum: all singular values of the exact average, descending.
        products: `<ΔW_i, ΔW_j>` (K + 1, K + 1), of the adapters and, last, what is written.
        stable_ranks: `‖ΔW‖²/σ_1²` of the same, and NaN where ΔW is zero.
    """

    name: str
    rank: int
    tensors: dict[str, Tensor]
    spectrum: Tensor
    products: Tensor
    stable_ranks: list[float]
    held_by: list[int]

    @property
    def kept(self) -> float:
        return kept_share([self.spectrum], self.rank)


def _merge_module(module: str, plan: MergePlan) -> _MergedModule:
    adapters, weights = plan.adapters, plan.weights
    held_by = [k for k, adapter in enumerate(adapters) if factor_names(module)[0] in adapter.shapes]
    terms = [adapters[k].term(module) for k in held_by]
    scales = [adapters[k].scale(module) for k in held_by]
    rank, scale = plan.ranks[module], plan.scales[module]
    whole = Span(terms).svd([weights[k] * s for k, s in zip(held_by, scales, strict=True)])
    best = whole.truncated(rank)
    factors = GAUGES[plan.options.gauge](best, scale)
    term = revive_dead_directions(module, factors, best.S, rank, seed=0)
    tensors = named_factors(module, term)
    if plan.biased:
        bias = torch.zeros(term.B.shape[0], dtype=torch.float64)
        for k, s in zip(held_by, scales, strict=True):
            if (held := adapters[k].bias(module)) is not None:
                bias += weights[k] * s / scale * held.double()
        tensors[bias_name(module)] = bias.float()
    owners = [*held_by, len(adapters)]
    products, stable_ranks = _products([*terms, term], [*scales, scale], owners, len(adapters) + 1)
    return _MergedModule(module, rank, tensors, whole.S, products, stable_ranks, held_by)


def _products(
    terms: Sequence[Term], scales: Sequence[float], owners: Sequence[int], count: int
) -> tuple[Tensor, list[float]]:
    """Return `<s_i B_i A_i, s_j B_j A_j>` (count, count), and the stable ranks.

    With the factors stacked as columns P and rows Q, `(PᵀP) ∘ (QQᵀ)` holds the inner products of
    all pairs of directions: no delta is formed (specification 7.1).
    """
    P = torch.cat([s * term.B.double() for s, term in zip(scales, terms, strict=True)], dim=1)
    Q = torch.cat([term.A.double() for term in terms])
    left, right = P.T @ P, Q @ Q.T
    directions = torch.tensor(
        [k for k, term in zip(owners, terms, strict=True) for _ in range(term.rank)]
    )
    owned = functional.one_hot(directions, count).double()
    products = owned.T @ (left * right) @ owned
    stable_ranks = [math.nan] * count
    for k in owners:
        mine = directions == k
        # The squared singular values of B·A are the eigenvalues of (BᵀB)(AAᵀ).
        squares = torch.linalg.eigvals(left[mine][:, mine] @ right[mine][:, mine]).real
        if products[k, k] > 0:
            stable_ranks[k] = float(products[k, k] / squares.max())
    return products, stable_ranks


class _Merged:
    """The merged modules so far, of `count` adapters."""

    def __init__(self, count: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: list[_MergedModule] = []
        self.products = torch.zeros(count + 1, count + 1, dtype=torch.float64)

    def add(self, module: _MergedModule) -> None:
        self.tensors |= module.tensors
        self.modules.append(module)
        self.products += module.products

    def kept(self) -> float:
        """Return the share of the squared norm of the exact average that is kept, over all."""
        total = float(self._energies().sum())
        kept = sum(float(m.spectrum[: m.rank].square().sum()) for m in self.modules)
        return kept / total if total > 0 else 1.0

    def enough(self) -> int:
        """Return the smallest rank, the same in every module, that keeps enough."""
        sums = self._energies().cumsum(dim=0)
        return int((sums < _ENOUGH * sums[-1]).sum()) + 1

    def _energies(self) -> Tensor:
        """Return the squares of all first, second, ... singular values, summed over modules."""
        energies = torch.zeros(max(len(module.spectrum) for module in self.modules)).double()
        for module in self.modules:
            energies[: len(module.spectrum)] += module.spectrum.square()
        return energies


def _averaged_whole(plan: MergePlan) -> dict[str, Tensor]:
    adapters, weights = plan.adapters, plan.weights
    for name in sorted({name for adapter in adapters for name in adapter.saved_whole}):
        if not any(w > 0 and name in a.shapes for w, a in zip(weights, adapters, strict=True)):
            raise ConfigError(
                f"{name.removeprefix(PREFIX)} is held by adapters of weight 0 alone; leave them "
                "out, or say --without-heads"
            )
    return weighted_mean(
        (weight, {name: adapter.tensor(name) for name in adapter.saved_whole})
        for weight, adapter in zip(weights, adapters, strict=True)
        if weight > 0
    )


# --- what to say about it ------------------------------------------------------------------------


def _describe(plan: MergePlan, merged: _Merged) -> dict[str, Any]:
    adapters, count = plan.adapters, len(plan.adapters)
    norms = merged.products.diagonal().clamp_min(0).sqrt()
    cosines = merged.products / (norms[:, None] * norms)
    whole = sorted({name for adapter in adapters for name in adapter.saved_whole})
    worst = min(merged.modules, key=lambda module: module.kept)
    return {
        "adapters": [
            {
                "folder": str(adapter.folder),
                "weight": plan.weights[k],
                "rank": adapter.config["r"],
                "alpha": adapter.config["lora_alpha"],
                "modules": len(adapter.modules),
                "norm": float(norms[k]),
                "cosine_with_merged": _number(cosines[k, count]),
                "stable_rank": _mean_stable_rank(merged.modules, k),
            }
            for k, adapter in enumerate(adapters)
        ],
        "merged": {
            "rank": plan.config["r"],
            "alpha": plan.config["lora_alpha"],
            "gauge": plan.options.gauge,
            "modules": len(plan.ranks),
            "norm": float(norms[count]),
            "norm_of_exact_average": math.hypot(
                *(float(module.spectrum.norm()) for module in merged.modules)
            ),
            "stable_rank": _mean_stable_rank(merged.modules, count),
            "kept_energy": merged.kept(),
            "worst_module": {"module": worst.name.removeprefix(PREFIX), "kept_energy": worst.kept},
            "rank_that_keeps_99_percent": merged.enough(),
        },
        "pairwise_cosine": _pairs(adapters, cosines),
        "held_by_some": _holders(
            {
                module.name: [str(adapters[k].folder) for k in module.held_by]
                for module in merged.modules
                if len(module.held_by) < count
            }
        ),
        "saved_whole": _holders({name: _who_holds(adapters, name) for name in whole}),
        "heads_dropped": plan.options.without_heads,
        "modules": [
            {
                "module": module.name.removeprefix(PREFIX),
                "rank": module.rank,
                "kept_energy": module.kept,
                "norms": module.products.diagonal()[:count].clamp_min(0).sqrt().tolist(),
                "norm_of_merged": float(module.products[count, count].clamp_min(0).sqrt()),
                "stable_rank_of_merged": _number(module.stable_ranks[count]),
            }
            for module in merged.modules
        ],
    }


def _number(value: Tensor | float) -> float | None:
    """Return a number; None for the cosine or stable rank of a delta that is zero."""
    return float(value) if math.isfinite(value) else None


def _mean_stable_rank(modules: Sequence[_MergedModule], k: int) -> float | None:
    """Return the mean over the modules where this delta is not zero."""
    known = [m.stable_ranks[k] for m in modules if not math.isnan(m.stable_ranks[k])]
    return math.fsum(known) / len(known) if known else None


def _pairs(adapters: Sequence[PeftFolder], cosines: Tensor) -> dict[str, Any]:
    """Return the pair that is least alike and the one that is most; none without two deltas."""
    found: list[dict[str, Any]] = [
        {"cosine": float(cosines[i, j]), "between": [str(b.folder), str(a.folder)]}
        for i, a in enumerate(adapters)
        for j, b in enumerate(adapters[:i])
        if torch.isfinite(cosines[i, j])
    ]
    if not found:
        return {}
    found.sort(key=lambda pair: float(pair["cosine"]))
    return {"least": found[0], "most": found[-1]}


def _holders(names_by_holders: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Group names by who holds them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, holders in names_by_holders.items():
        groups.setdefault(tuple(holders), []).append(name.removeprefix(PREFIX))
    return [{"held_by": list(holders), "names": names} for holders, names in groups.items()]


def _who_holds(adapters: Sequence[PeftFolder], name: str) -> list[str]:
    return [str(adapter.folder) for adapter in adapters if name in adapter.shapes]
