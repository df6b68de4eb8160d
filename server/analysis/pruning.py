"""Pruning: how good a served model still is with parts of its adapter removed, and no retraining.

Removed are whole adapters (every other block, all but a third of the blocks, all but one kind of
module, all but the blocks of highest Shapley value), or the smallest entries of the delta. The
frozen base and the trained head always stay. Source: copra specification, 5.

The criterion of the paper's unstructured pruning is not known; here it is magnitude, over all
modules together. Its phase of "every other block" is not known either: both are scored.

Errors are paired over rows. Of several seeds the rows are averaged first, and the error over seeds
is added in quadrature: `√(rows² + seeds²)`, a little too wide rather than too narrow.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Experiment
from common.copra import block_of
from common.errors import ConfigError, DataError
from common.lowrank import Term, adapted_modules, factor_names
from common.paths import standard_error
from common.residuals import residual_name
from common.tensors import Tensors
from server.analysis.shapley import Part, block_parts, module_parts, read_shapley
from server.analysis.stored_run import Scored, Scorer, StoredRun, only_in
from strategies.base import Served

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
# Differences within this many standard errors are not called any.
ERRORS = 2
ALL = "all"

METHOD = (
    "No retraining; base and trained head stay. Rows: those that the runs are evaluated on. Of "
    "several seeds, scores are averaged row by row. error = sqrt(row_error^2 + seed_error^2): "
    "row_error is sd/sqrt(n) over rows, of paired differences where it is a difference; seed_error "
    "is sd/sqrt(n) over seeds, null for one seed. A change is against the same runs with all "
    "adapters, a difference against the first label with the same parts kept. beyond says that it "
    "is more than two errors from zero, with no correction for how many are looked at. Sparsity: "
    "the entries of the whole delta that are smallest in magnitude, over all modules together, are "
    "set to zero; the paper's criterion is not known."
)

_RunName = tuple[str, str]  # the label, and the settings but for the seed


@dataclass(frozen=True)
class Cut:
    """One way to prune a model.

    Attributes:
        family: `parts`, `shapley` or `sparsity`.
        amount: how many blocks are kept, or the share of entries that are zero.
        of: how many blocks there are; 1 for a share.
        blocks: those kept at least in part, by name; none where entries are pruned.
        model: makes the pruned model.
    """

    name: str
    family: str
    amount: float
    of: int
    blocks: tuple[str, ...]
    model: Callable[[], Served]


# What is cut.


def cuts_of(
    served: Served, scale: float, best_first: Sequence[str], sparsities: Sequence[float]
) -> list[Cut]:
    """Return every way to prune this model, the whole and nothing included.

    Arguments:
        scale: s of the served factors.
        best_first: names of blocks by falling Shapley value; empty where there are none.
    """
    blocks = block_parts(served.tensors)

    def keeping(name: str, family: str, kept: Sequence[Part]) -> Cut:
        modules = [module for part in kept for module in part.modules]
        names = tuple(dict.fromkeys(part.block for part in kept))
        return Cut(name, family, len(names), len(blocks), names, partial(_kept, served, modules))

    parts = [(ALL, blocks), *_every_other(blocks), *_thirds(blocks), *_kinds(served.tensors)]
    by_name = {part.name: part for part in blocks}
    return [
        *(keeping(name, "parts", kept) for name, kept in (*parts, ("none", []))),
        *(
            keeping(
                f"best {k} of {len(blocks)} blocks", "shapley", [by_name[b] for b in best_first[:k]]
            )
            for k in range(1, len(best_first))
        ),
        *(
            Cut(
                f"{100 * share:g}% zeros",
                "sparsity",
                share,
                1,
                (),
                partial(sparse, served, scale, share),
            )
            for share in sparsities
        ),
    ]


def _kept(served: Served, modules: Sequence[str]) -> Served:
    return Served(only_in(served.tensors, modules), served.rank)


def _stacks(blocks: Sequence[Part]) -> list[list[Part]]:
    """Return the blocks by the stack that they are in: an encoder and a decoder are two."""
    stacks: dict[str, list[Part]] = {}
    for block in blocks:
        stacks.setdefault(block_of(block.modules[0])[0], []).append(block)
    return list(stacks.values())


def _every_other(blocks: Sequence[Part]) -> Iterator[tuple[str, list[Part]]]:
    stacks = _stacks(blocks)
    if min(map(len, stacks)) >= 2:
        for start, rest in ((0, "from 1st"), (1, "from 2nd")):
            yield f"every other {rest}", [b for stack in stacks for b in stack[start::2]]


def _thirds(blocks: Sequence[Part]) -> Iterator[tuple[str, list[Part]]]:
    stacks = _stacks(blocks)
    if min(map(len, stacks)) >= 3:
        for third, name in enumerate(("low", "middle", "high")):
            yield (
                f"{name} third",
                [
                    block
                    for stack in stacks
                    for block in stack[
                        round(third * len(stack) / 3) : round((third + 1) * len(stack) / 3)
                    ]
                ],
            )


def _kinds(tensors: Tensors) -> Iterator[tuple[str, list[Part]]]:
    parts = module_parts(tensors)
    kinds = list(dict.fromkeys(part.kind for part in parts))
    if len(kinds) > 1:
        for kind in kinds:
            yield f"only {kind}", [part for part in parts if part.kind == kind]


def sparse(served: Served, scale: float, share: float) -> Served:
    """Return the model with this share of the entries of its whole delta set to zero.

    The delta `s·B·A`, with the residual where there is one, is loaded as a residual beside B = 0.
    Zeroed are the `round(share·n)` smallest of the n entries of all modules together, and those
    that equal the largest of them.
    """
    tensors, deltas = dict(served.tensors), {}
    for module in adapted_modules(tensors):
        term = Term.of(tensors, module)
        delta = scale * term.B.double() @ term.A.double()
        if residual_name(module) in tensors:
            delta += tensors[residual_name(module)].double()
        deltas[module] = delta
    sizes = torch.cat([delta.abs().flatten() for delta in deltas.values()])
    zeros = round(share * len(sizes))
    limit = float(sizes.kthvalue(zeros).values) if zeros else -1.0
    for module, delta in deltas.items():
        name_B, _ = factor_names(module)
        tensors[name_B] = torch.zeros_like(tensors[name_B])
        tensors[residual_name(module)] = torch.where(delta.abs() <= limit, 0.0, delta).float()
    return Served(tensors, served.rank)


def break_even(tensors: Tensors) -> float:
    """Return the sparsity from which on the delta has fewer entries left than its factors have."""
    factors = entries = 0
    for module in adapted_modules(tensors):
        term = Term.of(tensors, module)
        factors += term.B.numel() + term.A.numel()
        entries += term.B.shape[0] * term.A.shape[1]
    return max(0.0, 1 - factors / entries)


# What runs are called, and which go together.


def grouped(runs: Sequence[StoredRun]) -> dict[str, list[StoredRun]]:
    """Group runs that differ in their seed alone, by label; unlike settings of one label are said.

    Raises:
        ConfigError: two runs are the same.
    """
    groups: dict[_RunName, dict[int, StoredRun]] = {}
    for run in runs:
        members = groups.setdefault((run.record["label"], json.dumps(_settings(run))), {})
        seed = int(run.record["seed"])
        if seed in members:
            raise ConfigError(
                f"{members[seed].folder} and {run.folder} are both {run.label}, with the same "
                "settings; give every run once"
            )
        members[seed] = run
    named = {}
    for (label, settings), members in groups.items():
        others = [json.loads(other) for name, other in groups if name == label]
        mine = json.loads(settings)
        differing = [
            key
            for key in dict.fromkeys(key for other in others for key in other)
            if len({json.dumps(other.get(key)) for other in others}) > 1
        ]
        said = [f"{key}={json.dumps(mine.get(key))}" for key in differing]
        named[" · ".join([label, *said])] = list(members.values())
    return named


def _settings(run: StoredRun) -> dict[str, Any]:
    """Return the settings by dotted key, without the seed and what does not change the numbers."""
    leaves = dict(_leaves(run.experiment.model_dump(mode="json")))
    unimportant = ("seed", "workers", "timeout", "evaluate_every")
    return {
        key: value
        for key, value in leaves.items()
        if key not in {f"federation.{name}" for name in unimportant}
    }


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _rows_of(experiment: Experiment) -> str:
    """Return what decides which rows a run is evaluated on, and in which order."""
    task = experiment.task.model_dump(mode="json", exclude={"limit", "probe_examples"})
    return json.dumps([task, experiment.backbone.model_dump(mode="json", exclude={"quantised"})])


def _scored_alike(experiment: Experiment) -> str:
    parts = (experiment.task, experiment.backbone, experiment.adapter)
    train = experiment.train
    return json.dumps([*(p.model_dump(mode="json") for p in parts), train.device, train.precision])


# The analysis.


@dataclass(frozen=True)
class Plan:
    """What is to be scored; whatever can be refused has been.

    Attributes:
        groups: the runs by label, the first of which the others are held to.
        cuts: by folder of a run.
        notes: what is left out, and why.
    """

    groups: Mapping[str, Sequence[StoredRun]]
    cuts: Mapping[Path, Sequence[Cut]]
    sparsities: Sequence[float]
    notes: Sequence[str]

    @property
    def models(self) -> int:
        """Return how many models there are to score."""
        return sum(map(len, self.cuts.values()))


def plan_pruning(runs: Sequence[StoredRun], sparsities: Sequence[float] = SPARSITIES) -> Plan:
    """Group the runs and say how each is cut.

    Raises:
        ConfigError: a run without a single model, one given twice, or a sparsity that is none.
        DataError: a `shapley.json` of another model, or one that cannot be read.
    """
    for share in sparsities:
        if not 0 < share < 1:
            raise ConfigError(f"--sparsity {share:g}: choose shares of entries above 0 and below 1")
    for run in runs:
        run.check_adapters()
        run.one_model()
    groups = grouped(runs)
    orders, notes = _orders(groups)
    cuts = {
        run.folder: cuts_of(
            run.one_model(),
            run.experiment.adapter.scale(run.one_model().rank),
            orders.get(run.folder, ()),
            sorted(set(sparsities)),
        )
        for run in runs
    }
    return Plan(groups, cuts, sorted(set(sparsities)), notes)


def measure_pruning(
    plan: Plan, examples: int = 0, advance: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Return scores of all runs with parts of their adapters removed, ready for JSON.

    Arguments:
        examples: how many of the rows that runs are evaluated on; 0 for all.
    """
    groups, runs = plan.groups, [run for members in plan.groups.values() for run in members]
    scorers: dict[str, Scorer] = {}
    scored: dict[Path, dict[str, Scored]] = {}
    for run in runs:
        key = _scored_alike(run.experiment)
        if key not in scorers:
            scorers[key] = Scorer(run.experiment, run.experiment.task.evaluate_on, examples)
        scored[run.folder] = {}
        for cut in plan.cuts[run.folder]:
            scored[run.folder][cut.name] = scorers[key](cut.model())
            advance(f"{run.label}: {cut.name}")
    same_rows = len({_rows_of(run.experiment) for run in runs}) == 1
    first = runs[0].record
    return {
        "label": first["label"],
        "seed": first["seed"],
        "digest": first["digest"],
        "method": METHOD,
        "same_rows": same_rows,
        "sparsities": list(plan.sparsities),
        "labels": [
            {
                "label": label,
                "seeds": [run.record["seed"] for run in members],
                "control": bool(members[0].record["strategy"]["control"]),
                "split": members[0].experiment.task.evaluate_on,
                "examples": len(scored[members[0].folder][ALL].hits),
                "blocks": len(block_parts(members[0].one_model().tensors)),
                "break_even": break_even(members[0].one_model().tensors),
            }
            for label, members in groups.items()
        ],
        "cuts": _cut_rows(groups, plan.cuts, scored, same_rows=same_rows),
        "notes": list(plan.notes),
    }


def _orders(groups: Mapping[str, Sequence[StoredRun]]) -> tuple[dict[Path, list[str]], list[str]]:
    """Return each run's blocks by falling value, for labels whose runs all have values; and notes.

    Raises:
        DataError: the values beside a run are of another model.
    """
    orders: dict[Path, list[str]] = {}
    notes = []
    for label, runs in groups.items():
        if runs[0].experiment.task.evaluate_on == "validation":
            notes.append(
                f"{label} is evaluated on validation rows, which its Shapley values come from: "
                "blocks chosen by them are not scored on the same rows."
            )
            continue
        found = {run.folder: read_shapley(run.folder).get("blocks", {}) for run in runs}
        if missing := [folder for folder, values in found.items() if not values]:
            notes.append(
                f"{label} has no Shapley values of blocks, so it is not pruned by them; they are "
                f"made by: fedcopra shapley {missing[0]}"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            )
            continue
        for run in runs:
            orders[run.folder] = _best_first(run, found[run.folder])
    return orders, notes


def _best_first(run: StoredRun, analysis: Mapping[str, Any]) -> list[str]:
    blocks = {part.name for part in block_parts(run.one_model().tensors)}
    try:
        values = {row["player"]: row["minus_loss"]["value"] for row in analysis["values"]}
        mine = analysis["digest"] == run.record["digest"] and values.keys() == blocks
        honest = analysis["split"] == "validation"
    except (KeyError, TypeError):
        mine = honest = False
    if not (mine and honest):
        raise DataError(
            f"{run.folder}: shapley.json holds no values of this run's blocks on validation rows; "
            f"make it anew: fedcopra shapley {run.folder}"
        )
    return sorted(values, key=lambda name: -values[name])


def _cut_rows(
    groups: Mapping[str, Sequence[StoredRun]],
    cuts: Mapping[Path, Sequence[Cut]],
    scored: Mapping[Path, Mapping[str, Scored]],
    *,
    same_rows: bool,
) -> list[dict[str, Any]]:
    known: dict[str, list[Cut]] = {}
    for cut in (cut for of_run in cuts.values() for cut in of_run):
        known.setdefault(cut.name, []).append(cut)
    reference = next(iter(groups))
    rows = []
    for name, same in sorted(known.items(), key=lambda item: _FAMILIES.index(item[1][0].family)):
        cut = same[0]
        alike = len({(other.amount, other.of, other.blocks) for other in same}) == 1
        holders = {
            label: members
            for label, members in groups.items()
            if all(name in scored[run.folder] for run in members)
        }
        by_label = {
            label: {m: _by_seed(members, scored, name, m) for m in _MEASURES}
            for label, members in holders.items()
        }
        whole = {
            label: {m: _by_seed(members, scored, ALL, m) for m in _MEASURES}
            for label, members in holders.items()
        }
        differences = {}
        if same_rows and reference in holders:
            differences = {
                label: {
                    m: _difference(by_label[label][m], by_label[reference][m]) for m in _MEASURES
                }
                for label in holders
                if label != reference
            }
        rows.append(
            {
                "name": name,
                "family": cut.family,
                "amount": cut.amount,
                "of": cut.of,
                # Which blocks are best is each run's own affair, and some runs have more of them.
                "blocks": list(cut.blocks) if alike and cut.family == "parts" else None,
                "scores": {
                    label: {
                        m: estimate(list(seeds.values())) for m, seeds in by_label[label].items()
                    }
                    for label in holders
                },
                "changes": {
                    label: {m: _difference(by_label[label][m], whole[label][m]) for m in _MEASURES}
                    for label in holders
                },
                "differences": differences,
            }
        )
    return rows


_FAMILIES = ("parts", "shapley", "sparsity")
_MEASURES: Mapping[str, Callable[[Scored], Tensor]] = {
    "accuracy": lambda scored: scored.hits.double(),
    "loss": lambda scored: scored.losses.double(),
}


def _by_seed(
    runs: Sequence[StoredRun],
    scored: Mapping[Path, Mapping[str, Scored]],
    name: str,
    measure: str,
) -> dict[int, Tensor]:
    return {int(r.record["seed"]): _MEASURES[measure](scored[r.folder][name]) for r in runs}


def estimate(by_seed: Sequence[Tensor]) -> dict[str, Any]:
    """Return the mean of rows (n,), one tensor a seed, with its standard errors."""
    seeds = [float(rows.mean()) for rows in by_seed]
    row_error = standard_error(torch.stack(list(by_seed)).mean(dim=0))
    seed_error = standard_error(torch.tensor(seeds)) if len(seeds) > 1 else None
    return _with_error(sum(seeds) / len(seeds), row_error, seed_error, seeds)


def _difference(these: Mapping[int, Tensor], those: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return `these - those`, paired over rows, and over seeds where both have the same ones."""
    if these.keys() == those.keys():
        found = estimate([these[seed] - those[seed] for seed in these])
    else:
        mine, other = estimate(list(these.values())), estimate(list(those.values()))
        rows = torch.stack(list(these.values())).mean(0) - torch.stack(list(those.values())).mean(0)
        known = [e["seed_error"] for e in (mine, other) if e["seed_error"] is not None]
        seed_error = sum(error**2 for error in known) ** 0.5 if known else None
        found = _with_error(float(rows.mean()), standard_error(rows), seed_error, [])
    return {**found, "beyond": abs(found["mean"]) > ERRORS * found["error"]}


def _with_error(
    mean: float, row_error: float, seed_error: float | None, seeds: list[float]
) -> dict[str, Any]:
    error = (row_error**2 + (seed_error or 0.0) ** 2) ** 0.5
    return {
        "mean": mean,
        "error": error,
        "row_error": row_error,
        "seed_error": seed_error,
        "seeds": seeds,
    }
