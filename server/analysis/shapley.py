"""Shapley values: what every block of an adapter, or every adapted module, is worth to the model.

The players are the parts of the adapter, and `v(S)` is the utility of the model with the adapters
of S only, its trained head always there: minus the mean loss in nats, and accuracy. The value of a
player is its mean gain over all orders in which the parts could have been added; values sum to
`v(all) - v(none)`, so they say how the gain is shared, and nothing of how large it is.

With few parts all 2^L coalitions are scored. Otherwise orders are drawn in antithetic pairs, each
order with its reverse. The authors' own sampling is not known. Source: copra specification, 2.1
and 2.3; Mitchell et al., arXiv 2104.12199, for antithetic orders.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.copra import block_of
from common.errors import ConfigError, DataError
from common.lowrank import adapted_modules
from common.paths import standard_error
from common.seeds import torch_generator
from common.tasks import load_tasks
from common.tensors import Tensors
from server.analysis.stored_run import Scorer, StoredRun
from server.folders import write_json
from server.reporting.wording import short_names

Coalition = frozenset[str]
# What a coalition is worth, (measures, rows): of each measure the mean over rows counts.
Value = Callable[[Coalition], Tensor]
Order = Sequence[str]
FILE = "shapley.json"
MEASURES = ("minus_loss", "accuracy")


# The estimator, of any game.


@dataclass(frozen=True)
class ShapleyValues:
    """Values of the players of one game; all tensors are float64.

    Attributes:
        by_row: (players, measures, rows); a player's value is the mean over rows.
        sampling_error: (players, measures), the standard error over pairs of orders, taken as
            independent, on these rows; 0 where all coalitions were scored.
        none: (measures,), the worth of the empty coalition.
        everyone: (measures,), the worth of all players together.
        exact: whether all coalitions were scored.
        coalitions: how many were scored, each once.
    """

    players: tuple[str, ...]
    by_row: Tensor
    sampling_error: Tensor
    none: Tensor
    everyone: Tensor
    exact: bool
    coalitions: int

    @property
    def values(self) -> Tensor:
        """Return the values, (players, measures)."""
        return self.by_row.mean(dim=2)

    @property
    def row_error(self) -> Tensor:
        """Return their standard errors from the choice of rows, (players, measures).

        Paired: every coalition is scored on the same rows, so that a row has values of its own.
        """
        return torch.tensor([[standard_error(rows) for rows in player] for player in self.by_row])

    @property
    def gain_row_error(self) -> Tensor:
        """Return the standard errors of `v(all) - v(none)` from the choice of rows, (measures,)."""
        return torch.tensor([standard_error(rows) for rows in self.by_row.sum(dim=0)])

    @property
    def residual(self) -> Tensor:
        """Return by how much the sum of values misses `v(all) - v(none)`, (measures,)."""
        return self.values.sum(dim=0) - (self.everyone - self.none)


@dataclass(frozen=True)
class Design:
    """Which coalitions are scored, and what each counts for whom; the values are linear in v.

    Attributes:
        shares: by coalition (players,): a player's value is `Σ_S share(S)·v(S)`.
        pairs: the antithetic pairs of orders; none where all coalitions are scored.
    """

    players: tuple[str, ...]
    shares: Mapping[Coalition, Tensor]
    pairs: Sequence[tuple[Order, Order]] = ()

    def values(self, value: Value) -> ShapleyValues:
        """Score every coalition once; no coalition's rows have to be kept."""
        worth: dict[Coalition, Tensor] = {}
        by_row = torch.zeros(())
        for coalition, shares in self.shares.items():
            rows = value(coalition).double()
            by_row = by_row + shares[:, None, None] * rows
            worth[coalition] = rows.mean(dim=1)
        return ShapleyValues(
            self.players,
            by_row,
            self._sampling_error(worth),
            worth[frozenset()],
            worth[frozenset(self.players)],
            exact=not self.pairs,
            coalitions=len(worth),
        )

    def _sampling_error(self, worth: Mapping[Coalition, Tensor]) -> Tensor:
        measures = len(worth[frozenset()])
        if not self.pairs:
            return torch.zeros(len(self.players), measures, dtype=torch.float64)
        gains = torch.zeros(len(self.pairs), len(self.players), measures, dtype=torch.float64)
        for row, pair in zip(gains, self.pairs, strict=True):
            for order in pair:
                for player, before, after in _steps(order):
                    row[self.players.index(player)] += (worth[after] - worth[before]) / 2
        error: Tensor = gains.std(dim=0) / len(self.pairs) ** 0.5
        return error


def shapley_design(players: Sequence[str], orders: int, generator: torch.Generator) -> Design:
    """Return all coalitions where they are no more than `orders` orders would visit, or orders.

    `orders` counts each order and its reverse, and so is even; 4 at least, as a standard error
    needs two pairs. An order visits L - 1 coalitions beside the two that all orders share.
    """
    if 2 ** len(players) <= orders * (len(players) - 1) + 2:
        return all_coalitions(players)
    return along(antithetic_pairs(players, orders // 2, generator))


def all_coalitions(players: Sequence[str]) -> Design:
    """Return the design of `φ_i = Σ_S |S|!(L-|S|-1)!/L! · [v(S∪{i}) - v(S)]`, S without i."""
    count = len(players)
    shares: dict[Coalition, Tensor] = {}
    for size in range(count + 1):
        inside = 1 / (count * comb(count - 1, size - 1)) if size else 0.0
        outside = -1 / (count * comb(count - 1, size)) if size < count else 0.0
        for members in combinations(players, size):
            mine = [inside if player in members else outside for player in players]
            shares[frozenset(members)] = torch.tensor(mine, dtype=torch.float64)
    return Design(tuple(players), shares)


def antithetic_pairs(
    players: Sequence[str], pairs: int, generator: torch.Generator
) -> list[tuple[Order, Order]]:
    """Draw orders of the players, each with its reverse."""
    drawn = [torch.randperm(len(players), generator=generator).tolist() for _ in range(pairs)]
    orders = [[players[index] for index in order] for order in drawn]
    return [(order, order[::-1]) for order in orders]


def along(pairs: Sequence[tuple[Order, Order]]) -> Design:
    """Return the design of the mean gains along these orders, two pairs at least."""
    players = tuple(sorted(pairs[0][0]))
    shares: dict[Coalition, Tensor] = {}
    for order in (order for pair in pairs for order in pair):
        for player, before, after in _steps(order):
            for coalition, sign in ((before, -1), (after, 1)):
                mine = shares.setdefault(coalition, torch.zeros(len(players)).double())
                mine[players.index(player)] += sign / (2 * len(pairs))
    return Design(players, shares, pairs)


def _steps(order: Order) -> list[tuple[str, Coalition, Coalition]]:
    """Return who joins, with the coalition before and after."""
    prefixes = [frozenset(order[:size]) for size in range(len(order) + 1)]
    return [(who, *step) for who, step in zip(order, pairwise(prefixes), strict=True)]


# The parts of an adapter.


@dataclass(frozen=True)
class Part:
    """A part of an adapter: its name, its block, what kind of module it is, and its modules."""

    name: str
    block: str
    kind: str
    modules: tuple[str, ...]


def module_parts(tensors: Tensors) -> list[Part]:
    """Return every adapted module as a part, by block from the first on."""
    modules = sorted(adapted_modules(tensors), key=lambda module: (block_of(module), module))
    places = [block_of(module) for module in modules]
    stacks = sorted({stack for stack, _ in places})
    # With one stack of blocks, as in most encoders, its name says nothing.
    said = dict(zip(stacks, short_names(stacks), strict=True)) if len(stacks) > 1 else {}
    blocks = [f"{said.get(stack, 'block')} {position}" for stack, position in places]
    inner = [
        module.removeprefix(f"{stack}.{position}.")
        for module, (stack, position) in zip(modules, places, strict=True)
    ]
    kinds = sorted(set(inner))
    kind = dict(zip(kinds, short_names(kinds), strict=True))
    return [
        Part(f"{block} {kind[rest]}", block, kind[rest], (module,))
        for module, block, rest in zip(modules, blocks, inner, strict=True)
    ]


def block_parts(tensors: Tensors) -> list[Part]:
    """Return every block that has adapters as a part, from the first on."""
    blocks: dict[str, list[str]] = {}
    for part in module_parts(tensors):
        blocks.setdefault(part.block, []).extend(part.modules)
    return [Part(block, block, "", tuple(modules)) for block, modules in blocks.items()]


PLAYERS: Mapping[str, Callable[[Tensors], list[Part]]] = {
    "blocks": block_parts,
    "modules": module_parts,
}


# The analysis of a run.


@dataclass(frozen=True)
class Plan:
    """What is to be scored; whatever can be refused has been."""

    run: StoredRun
    players: str
    orders: int
    seed: int
    parts: Mapping[str, Part]
    design: Design


def plan_shapley(run: StoredRun, players: str, orders: int, seed: int) -> Plan:
    """Check what is asked for, and draw the orders.

    Raises:
        ConfigError: a choice that there is not, a run without a single model, or a task without
            validation rows.
        DataError: there are older values that cannot be read.
    """
    if players not in PLAYERS:
        raise ConfigError(f"--players {players!r}: choose from {', '.join(PLAYERS)}")
    if orders < 4 or orders % 2:
        raise ConfigError(
            f"--orders {orders}: every order comes with its reverse, and an error needs two such "
            "pairs; choose an even number, 4 at least"
        )
    run.check_adapters()
    parts = {part.name: part for part in PLAYERS[players](run.one_model().tensors)}
    for task in load_tasks(run.experiment.task):
        if not len(task.validation):
            raise ConfigError(
                f"{run.folder}: task {task.name} has no validation rows, and values found on test "
                "rows could not honestly be pruned by; make a run with task.validation_fraction "
                "above 0"
            )
    read_shapley(run.folder)  # what could not be kept is said before anything is scored
    design = shapley_design(list(parts), orders, torch_generator(seed, "shapley", players))
    return Plan(run, players, orders, seed, parts, design)


def measure_shapley(
    plan: Plan, scorer: Scorer, advance: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Return the values of a run's blocks or modules, ready for JSON.

    On validation rows, so that what is pruned by these values may be judged on test rows.

    Raises:
        DataError: the model's loss is not finite.
    """
    run, design = plan.run, plan.design
    served = run.one_model()

    def value(coalition: Coalition) -> Tensor:
        kept = {module for name in coalition for module in plan.parts[name].modules}
        scored = scorer(served, kept)
        advance(f"{len(coalition)} of {len(plan.parts)} {plan.players}")
        return torch.stack([-scored.losses.double(), scored.hits.double()])

    found = design.values(value)
    values, row_error = found.values, found.row_error
    if not values.isfinite().all():
        raise DataError(f"{run.folder}: the loss of its model is not finite: there is no gain")
    place = {player: index for index, player in enumerate(found.players)}
    return {
        "label": run.record["label"],
        "seed": run.record["seed"],
        "digest": run.record["digest"],
        "players": plan.players,
        "split": scorer.split,
        "examples": scorer.examples,
        "method": "all coalitions" if found.exact else "antithetic orders",
        "orders": None if found.exact else plan.orders,
        "orders_seed": None if found.exact else plan.seed,
        "coalitions": found.coalitions,
        "errors": "row_error: standard error from the choice of rows, paired over rows; "
        "sampling_error: over antithetic pairs of orders, on these rows, 0 for all coalitions",
        "none": _by_measure(found.none),
        "all": _by_measure(found.everyone),
        "gain": _by_measure(found.everyone - found.none),
        "gain_row_error": _by_measure(found.gain_row_error),
        "residual": _by_measure(found.residual),
        "values": [
            {
                "player": name,
                "block": part.block,
                "kind": part.kind,
                "modules": list(part.modules),
                **{
                    measure: {
                        "value": float(values[place[name], column]),
                        "row_error": float(row_error[place[name], column]),
                        "sampling_error": float(found.sampling_error[place[name], column]),
                    }
                    for column, measure in enumerate(MEASURES)
                },
            }
            for name, part in plan.parts.items()
        ],
    }


def _by_measure(numbers: Tensor) -> dict[str, float]:
    return dict(zip(MEASURES, numbers.tolist(), strict=True))


def read_shapley(folder: Path) -> dict[str, Any]:
    """Return the values beside a run's record, by kind of players; empty where there are none.

    Raises:
        DataError: the file cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); remove it") from None
    if not isinstance(content, dict) or not content.keys() <= PLAYERS.keys():
        raise DataError(f"{file}: holds no values of {' or '.join(PLAYERS)}; remove it")
    return content


def write_shapley(folder: Path, analysis: Mapping[str, Any]) -> None:
    """Write an analysis beside the run's record; values of other players stay, older ones go."""
    kept = read_shapley(folder)
    found = {**kept, analysis["players"]: analysis}
    write_json(folder / FILE, {kind: found[kind] for kind in PLAYERS if kind in found})
