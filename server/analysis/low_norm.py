"""The Low-Norm Effect: how good trained prompts still are with some of their vectors corrupted.

Evaluation only, on rows that the runs are evaluated on. Corrupted are the contexts of captions,
shared or of a class; prompts of pictures stay. Source: Nemesis (arXiv 2408.13979); operations and
counts are those of `common.low_norm`. Errors are as in `server.analysis.pruning`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from common.errors import ConfigError
from common.low_norm import (
    Cell,
    Corruption,
    Effect,
    agreed,
    corrupt,
    mcnemar_test,
    norm_effect,
    rise_counts,
    sign_test,
)
from common.nemesis import vector_norms
from common.prompted_clip import PREFIX, VISUAL
from common.seeds import torch_generator
from common.tensors import Tensors, is_prompt
from server.analysis.pruning import ERRORS, estimate, grouped
from server.analysis.stored_run import Scorer, StoredRun
from strategies.base import Served

METHOD = (
    "Evaluation of trained prompts; nothing is trained again, and all but the named vectors stays. "
    "A cell is one operation at one position, or at several positions together, in every run. "
    "replace s: the vector becomes a draw from N(0, s^2 I), s a standard deviation; rescale g: it "
    "is multiplied by g; rotate: it is turned by so many degrees towards a uniformly random "
    "direction across it, which keeps its norm. Of several prompts, or contexts of classes, the "
    "vectors at a position change together, each by a draw of its own. Draws come from the run's "
    "seed and the corruption: one draw a cell and run. Prompts of pictures are left alone. "
    "effect: what happened to the Euclidean norms, judged by the norms obtained: lowers, keeps or "
    "raises where all vectors of the cell and all runs agree, else mixed. A cell rises if the mean "
    "over runs of accuracy is above that of the untouched prompts, strictly and without rounding. "
    "counts: of the cells with this effect, those that rise, by operation and in all. The rule is "
    "ours: how the paper counts, and of how many, is not known. A count alone is no evidence of a "
    "Low-Norm Effect: on a small test set a strict rise is often noise. Hold the count of lowers "
    "against those of raises and keeps, which are the controls, and read the changes with their "
    "errors. change: accuracy less that of the untouched prompts, paired row by row and seed by "
    "seed; error = sqrt(row_error^2 + seed_error^2), row_error sd/sqrt(n) over rows of the mean "
    "over seeds, seed_error sd/sqrt(n) over seeds, null for one seed; beyond: more than two errors "
    "from zero, with no correction for how many cells are looked at. counts.change: the same for "
    "the mean over all cells with this effect. mcnemar: exact and two-sided, on the rows of each "
    "run; sign_test: exact and two-sided, over seeds, of which three cannot go below p = 1/4. "
    "response: all positions multiplied by the factor; its changes are against factor 1."
)


@dataclass(frozen=True)
class Amounts:
    """How strongly vectors are corrupted.

    Attributes:
        replaced: standard deviations of what takes the vector's place; 0 or more.
        lowered: factors from 0 to below 1.
        raised: factors above 1, a control.
        turned: degrees, above 0 and to 180, a control.
        whole: factors above 0 on all positions together; 1 is always among them.

    Raises:
        ConfigError: an amount is out of these bounds, naming the option, or there is none at all.
    """

    replaced: tuple[float, ...]
    lowered: tuple[float, ...]
    raised: tuple[float, ...]
    turned: tuple[float, ...]
    whole: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        bounds: Sequence[tuple[str, tuple[float, ...], Callable[[float], bool], str]] = (
            ("--replace", self.replaced, lambda s: 0 <= s < math.inf, "standard deviations >= 0"),
            ("--rescale", self.lowered, lambda g: 0 <= g < 1, "factors from 0 to below 1"),
            ("--raise", self.raised, lambda g: 1 < g < math.inf, "factors above 1"),
            ("--rotate", self.turned, lambda d: 0 < d <= 180, "degrees above 0, up to 180"),
        )
        everywhere = ("--whole", self.whole, lambda g: 0 < g < math.inf, "factors above 0")
        for option, amounts, allowed, choices in (*bounds, everywhere):
            if bad := [amount for amount in amounts if not allowed(amount)]:
                raise ConfigError(f"{option} {bad[0]:g}: choose {choices}")
        if not any(amounts for _, amounts, *_ in bounds):
            options = ", ".join(option for option, *_ in bounds)
            raise ConfigError(f"no amount is given: name one with {options}")

    def on_all(self, positions: tuple[int, ...]) -> list[Corruption]:
        """Return the rescalings of the whole prompt, that by 1 among them."""
        return [Corruption("rescale", factor, positions) for factor in sorted({1.0, *self.whole})]

    def at(self, positions: tuple[int, ...]) -> list[Corruption]:
        """Return all corruptions of these positions together."""
        kinds = {
            "replace": self.replaced,
            "rescale": (*self.lowered, *self.raised),
            "rotate": self.turned,
        }
        return [
            Corruption(kind, amount, positions)
            for kind, amounts in kinds.items()
            for amount in sorted(set(amounts))
        ]


@dataclass(frozen=True)
class Plan:
    """What is to be scored; whatever can be refused has been.

    Attributes:
        label: what reports call the runs, which differ in their seed alone.
        corruptions: of the cells.
        response: rescalings of the whole prompt.
    """

    label: str
    runs: Sequence[StoredRun]
    corruptions: Sequence[Corruption]
    response: Sequence[Corruption]

    @property
    def models(self) -> int:
        """Return how many models there are to score."""
        return len(self.runs) * (1 + len(self.corruptions) + len(self.response))


def plan_low_norm(
    runs: Sequence[StoredRun], amounts: Amounts, groups: Sequence[tuple[int, ...]] = ()
) -> Plan:
    """Say what is done to the prompts of these runs.

    Arguments:
        groups: positions, from 0, that are corrupted together; each alone if there are none.

    Raises:
        ConfigError: a run without contexts or without a single model, runs that differ in more
            than the seed, one given twice, or a position that the prompt does not have.
    """
    for run in runs:
        _check_has_context(run)
        run.one_model()
    labels = list(grouped(runs))
    if len(labels) > 1:
        raise ConfigError(
            f"{' and '.join(labels)} are not seeds of one experiment; give runs that differ in "
            "federation.seed alone"
        )
    positions = runs[0].experiment.adapter.prompt.length
    for group in groups:
        _check_group(group, positions)
    chosen = [tuple(sorted(group)) for group in groups] or [(i,) for i in range(positions)]
    corruptions = [
        corruption for group in dict.fromkeys(chosen) for corruption in amounts.at(group)
    ]
    everywhere = tuple(range(positions))
    return Plan(labels[0], runs, corruptions, amounts.on_all(everywhere))


def _check_has_context(run: StoredRun) -> None:
    adapter = run.experiment.adapter
    if adapter.kind != "prompt":
        raise ConfigError(
            f"{run.folder}: adapter.kind = {adapter.kind!r}, which has no soft prompts to corrupt; "
            "choose a run with adapter.kind = 'prompt'"
        )
    if not adapter.prompt.length:
        raise ConfigError(
            f"{run.folder}: adapter.prompt.length = 0, so that captions have no context; choose a "
            "run with one"
        )


def _check_group(group: tuple[int, ...], positions: int) -> None:
    written = "+".join(map(str, group))
    if outside := [position for position in group if not 0 <= position < positions]:
        raise ConfigError(
            f"--positions {written}: {outside[0]} is not among the prompt's 0..{positions - 1}"
        )
    if len(set(group)) < len(group):
        raise ConfigError(f"--positions {written}: name each position once")


def measure_low_norm(
    plan: Plan, examples: int = 0, advance: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Return what corruptions do to the accuracy of the runs, ready for JSON.

    Arguments:
        examples: how many of the rows that runs are evaluated on; 0 for all.
    """
    experiment = plan.runs[0].experiment
    scorer = Scorer(experiment, experiment.task.evaluate_on, examples)

    def hits_of(model: Served, run: StoredRun, what: str) -> Tensor:
        found = scorer(model).hits
        advance(f"{run.label}: {what}")
        return found

    untouched = [hits_of(run.one_model(), run, "untouched") for run in plan.runs]

    def corrupted(corruption: Corruption) -> tuple[tuple[Effect, ...], list[Tensor]]:
        made = [corrupted_model(run, corruption) for run in plan.runs]
        hits = [
            hits_of(model, run, f"{corruption.operation} at {_written(corruption)}")
            for (model, _), run in zip(made, plan.runs, strict=True)
        ]
        return tuple(effect for _, effect in made), hits

    cells, hits_by_cell = [], []
    for corruption in plan.corruptions:
        effects, hits = corrupted(corruption)
        cells.append(Cell(corruption, effects, _right(untouched), _right(hits), _rows(hits)))
        hits_by_cell.append(hits)
    response = [corrupted(corruption)[1] for corruption in plan.response]
    whole = next(hits for by, hits in zip(plan.response, response, strict=True) if by.amount == 1.0)
    first = plan.runs[0].record
    return {
        "label": plan.label,
        "seed": first["seed"],
        "seeds": [run.record["seed"] for run in plan.runs],
        "digest": first["digest"],
        "control": bool(first["strategy"]["control"]),
        "method": METHOD,
        "split": scorer.split,
        "examples": scorer.examples,
        "norms": [_norms_by_position(run) for run in plan.runs],
        "untouched": estimate([rows.double() for rows in untouched]),
        "cells": [
            _cell_row(cell, hits, untouched) for cell, hits in zip(cells, hits_by_cell, strict=True)
        ],
        "counts": {
            effect: _counted(effect, cells, hits_by_cell, untouched) for effect in get_args(Effect)
        },
        "response": [
            {
                "factor": corruption.amount,
                "accuracy": estimate([rows.double() for rows in hits]),
                "change": _change(hits, whole),
            }
            for corruption, hits in zip(plan.response, response, strict=True)
        ],
    }


def contexts_of(tensors: Tensors) -> dict[str, Tensor]:
    """Return the contexts of captions, (..., M, d) each: the shared one, or those of tasks."""
    others = (PREFIX, VISUAL)
    return {n: tensor for n, tensor in tensors.items() if is_prompt(n) and n not in others}


def corrupted_model(run: StoredRun, corruption: Corruption) -> tuple[Served, Effect]:
    """Return the run's model with its contexts corrupted, and what that did to their norms."""
    model, seed = run.one_model(), run.experiment.federation.seed
    tensors, effects = dict(model.tensors), []
    for name, context in contexts_of(model.tensors).items():
        amount, positions = repr(corruption.amount), corruption.positions
        stream = torch_generator(seed, "low-norm", name, corruption.kind, amount, *positions)
        tensors[name] = corrupt(context, corruption, stream)
        effects.append(norm_effect(context, tensors[name], corruption))
    return Served(tensors, model.rank), agreed(effects)


def _norms_by_position(run: StoredRun) -> list[float]:
    """Return the mean norm at each position, over prompts, classes and tasks."""
    contexts = contexts_of(run.one_model().tensors).values()
    norms = [vector_norms(context) for context in contexts]
    by_position = torch.cat([found.reshape(-1, found.shape[-1]) for found in norms])
    return [float(norm) for norm in by_position.double().mean(dim=0)]


def _cell_row(cell: Cell, hits: Sequence[Tensor], untouched: Sequence[Tensor]) -> dict[str, Any]:
    changes = [a - b for a, b in zip(cell.hits, cell.original_hits, strict=True)]
    return {
        "operation": cell.corruption.operation,
        "kind": cell.corruption.kind,
        "amount": cell.corruption.amount,
        "positions": list(cell.corruption.positions),
        "effect": cell.effect,
        "effects": list(cell.effects),
        "original_hits": list(cell.original_hits),
        "hits": list(cell.hits),
        "rows": list(cell.rows),
        "rises": cell.rises,
        "accuracy": estimate([rows.double() for rows in hits]),
        "change": _change(hits, untouched),
        "mcnemar": [asdict(mcnemar_test(b, a)) for a, b in zip(hits, untouched, strict=True)],
        "sign_test": asdict(sign_test(changes)),
    }


def _counted(
    effect: Effect,
    cells: Sequence[Cell],
    hits_by_cell: Sequence[Sequence[Tensor]],
    untouched: Sequence[Tensor],
) -> dict[str, Any]:
    """Return the rises among cells with this effect, and the mean change over these cells."""
    counts = rise_counts(cells, effect)
    matching = [h for cell, h in zip(cells, hits_by_cell, strict=True) if cell.effect == effect]
    found: dict[str, Any] = {"operations": {name: asdict(n) for name, n in counts.items()}}
    if not matching:
        return {**found, "change": None, "sign_test": None}
    means = [torch.stack(seed).double().mean(dim=0) for seed in zip(*matching, strict=True)]
    change = _change(means, untouched)
    return {**found, "change": change, "sign_test": asdict(sign_test(change["seeds"]))}


def _change(after: Sequence[Tensor], before: Sequence[Tensor]) -> dict[str, Any]:
    """Return the mean of `after - before`, (rows,) a seed, paired over rows and seeds."""
    found = estimate([a.double() - b.double() for a, b in zip(after, before, strict=True)])
    return {**found, "beyond": abs(found["mean"]) > ERRORS * found["error"]}


def _right(hits: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(int(rows.sum()) for rows in hits)


def _rows(hits: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(len(rows) for rows in hits)


def _written(corruption: Corruption) -> str:
    return "+".join(map(str, corruption.positions))
