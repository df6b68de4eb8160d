"""Whether straight lines join adapters: loss and accuracy along them, and on a plane through three.

Between the clients of a run's last round, from what a client was sent to what it returned, from the
model that was merged to what a client returned, and between the models of two runs; each by factors
and by deltas (`common.paths`). Source: copra specification 3.1, 3.2, 7.3a and 7.3b.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.config import Adapter
from common.errors import ConfigError, DataError
from common.lowrank import adapted_modules, factor_names
from common.paths import (
    DeltaMixture,
    End,
    FactorMixture,
    Mixture,
    Plane,
    barrier,
    standard_error,
)
from common.residuals import is_residual
from common.tensors import Tensors, digest
from server.analysis.stored_run import Scored, Scorer, StoredRun
from strategies.base import Served, Update, for_task, heads_of, model_of

SURFACE_SIDE = 9
# The surface is a square around the triangle of clients, larger than its box by this factor.
_ROOM = 1.6
# In nats: two mean losses that are nearer than this may differ by float32's rounding alone.
_ROUNDING = 1e-5

CAUTION = (
    "The λ of the highest bump is chosen on the rows that it is measured on: that lifts the "
    "barrier a little, and its standard error leaves the choice out of account. Standard errors "
    "are over these rows only; other clients, seeds or data are not in them. A line without a bump "
    "does not say that its middle is better than its ends."
)


@dataclass(frozen=True)
class Path:
    """A straight line to score, by each way there is.

    Attributes:
        kind: what it joins: `clients`, `sent` (a client and what it was sent), `served` (a client
            and the model that was merged) or `runs`.
        names: of its ends, first and last.
        tasks: whose rows it is scored on; both ends hold all their heads.
        ways: mixtures by `factors` and by `deltas`; a text says why there is none.
    """

    kind: str
    names: tuple[str, str]
    tasks: tuple[str, ...]
    ends: tuple[End, End]
    ways: Mapping[str, Mixture | str]


@dataclass(frozen=True)
class Surface:
    """A square of the plane through three clients, to score on a grid of coordinates x and y.

    Attributes:
        served: where the run's served model is projected to, or why it is left out.
    """

    updates: tuple[Update, ...]
    mixture: DeltaMixture
    plane: Plane
    x: Sequence[float]
    y: Sequence[float]
    served: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be scored; whatever can be refused has been."""

    run: StoredRun
    positions: Sequence[float]
    paths: Sequence[Path]
    surface: Surface | str

    @property
    def models(self) -> int:
        """Return how many models are to be scored."""
        ends = [end for path in self.paths for end in path.ends]
        ways = [way for path in self.paths for way in path.ways.values()]
        lines = sum(not isinstance(way, str) for way in ways) * (len(self.positions) - 2)
        grid = 0
        if not isinstance(self.surface, str):
            ends += [_returned(update) for update in self.surface.updates]
            grid = len(self.surface.x) * len(self.surface.y) + 1
        return len({_key(end) for end in ends}) + lines + grid


def plan_connectivity(
    run: StoredRun,
    other: StoredRun | None,
    *,
    points: int,
    clients: int,
    surface: bool,
    served: bool = False,
) -> Plan:
    """Choose the paths: all pairs of the first `clients` kept clients, each from what it was sent.

    With `served` also from the served model to each of them, with `other` from that of `run` to
    that of `other`. `points` is the number of positions on a path, its ends included; it also
    limits the side of the surface's grid.

    Raises:
        ConfigError: there is nothing to join, or `points` leaves no middle, or the two runs are of
            unlike tasks, backbones or adapted modules.
    """
    if points < 3 or points % 2 == 0:
        raise ConfigError(f"--points {points}: choose an odd number from 3 on, so that 1/2 is one")
    if clients < 2:
        raise ConfigError(f"--clients {clients}: a line between clients needs 2 of them or more")
    for stored in (run, other) if other else (run,):
        stored.check_adapters()
    if not run.updates and (served or other is None):
        raise ConfigError(_why_nothing_was_kept(run))
    adapter = run.experiment.adapter
    kept = run.updates[:clients]
    paths = [
        *([_between_runs(run, other)] if other else []),
        *(_between_clients(first, second, adapter) for first, second in _pairs(kept)),
        *(_from_sent(update, adapter) for update in kept),
        *(_from_served(run, update) for update in kept if served),
    ]
    side = min(SURFACE_SIDE, points)
    return Plan(
        run,
        [number / (points - 1) for number in range(points)],
        paths,
        _surface(run, side) if surface else "it was not asked for",
    )


def _why_nothing_was_kept(run: StoredRun) -> str:
    if "updates" not in run.record or not run.experiment.federation.keep_updates:
        return (
            f"{run.folder} keeps nothing of what its clients sent, so there is nothing to join; "
            "run it again with --set federation.keep_updates=8"
        )
    run.one_model()
    return (
        f"{run.folder}: in its last round no client let the server see all that it had trained "
        f"({run.record['label']}), so there is nothing to join; choose a run of another strategy"
    )


# The ends of paths.


def _pairs(kept: Sequence[Update]) -> list[tuple[Update, Update]]:
    return list(itertools.combinations(kept, 2))


def _name(update: Update) -> str:
    return f"client {update.client.client}"


def _returned(update: Update) -> End:
    return End(model_of(update.tensors), update.client.rank, update.client.scale)


def _sent(update: Update) -> End:
    return End(model_of(update.sent), update.client.rank, update.client.scale)


def _with_heads_of(partner: End, end: End) -> End:
    """Return the end with the heads that only its partner has, so that both have all tasks."""
    return replace(end, tensors=heads_of(partner.tensors) | {**end.tensors})


def _between_clients(first: Update, second: Update, adapter: Adapter) -> Path:
    ends = _returned(first), _returned(second)
    tasks = tuple(sorted({first.client.task, second.client.task}))
    return _path("clients", (_name(first), _name(second)), tasks, ends, adapter)


def _from_sent(update: Update, adapter: Adapter) -> Path:
    ends = _sent(update), _returned(update)
    names = (f"sent to {_name(update)}", _name(update))
    return _path("sent", names, (update.client.task,), ends, adapter)


def _from_served(run: StoredRun, update: Update) -> Path:
    """Join the model that was merged to what a client returned, with the head of its task alone."""
    model, adapter, task = run.one_model(), run.experiment.adapter, update.client.task
    merged = End(for_task(model.tensors, task), model.rank, adapter.scale(model.rank))
    names = ("served model", _name(update))
    return _path("served", names, (task,), (merged, _returned(update)), adapter)


def _between_runs(run: StoredRun, other: StoredRun) -> Path:
    models = run.one_model(), other.one_model()
    _refuse_unlike(run, other)
    first, second = (
        End(model.tensors, model.rank, stored.experiment.adapter.scale(model.rank))
        for model, stored in zip(models, (run, other), strict=True)
    )
    names = (run.label, other.label)
    if run.label == other.label:
        names = (f"{run.label} ({run.folder.name})", f"{other.label} ({other.folder.name})")
    tasks = tuple(source.label for source in run.experiment.task.sources)
    return _path("runs", names, tasks, (first, second), run.experiment.adapter)


# Keys of the task that may differ: test rows and heads do not depend on them.
_FREE = {"limit", "probe_examples", "evaluate_on"}


def _refuse_unlike(run: StoredRun, other: StoredRun) -> None:
    """Raise `ConfigError` where a line from one model to the other would mean nothing."""
    if run.folder.resolve() == other.folder.resolve():
        raise ConfigError(f"{other.folder} is the run itself; a line needs a second run")
    why = "a line joins models of one task and one backbone"
    mine, theirs = (r.experiment.model_dump(mode="json") for r in (run, other))
    for table in ("task", "backbone"):
        for key in mine[table]:
            if key not in _FREE and mine[table][key] != theirs[table][key]:
                raise ConfigError(
                    f"{other.folder}: {table}.{key} = {json.dumps(theirs[table][key])}, and "
                    f"{json.dumps(mine[table][key])} in {run.folder}; {why}"
                )
    adapted, others = ({*adapted_modules(r.one_model().tensors)} for r in (run, other))
    if differing := sorted(adapted ^ others):
        which = other.folder if differing[0] in others else run.folder
        raise ConfigError(
            f"{run.folder} and {other.folder} adapt other modules (adapter.targets, "
            f"adapter.blocks): {differing[0]} only in {which}"
        )


def _path(
    kind: str,
    names: tuple[str, str],
    tasks: tuple[str, ...],
    ends: tuple[End, End],
    adapter: Adapter,
) -> Path:
    first, second = _with_heads_of(ends[1], ends[0]), _with_heads_of(ends[0], ends[1])
    deltas = DeltaMixture((first, second), adapter.scale)
    factors: Mixture | str
    try:
        factors = FactorMixture((first, second))
    except ConfigError as error:
        factors = str(error)
    scored = _at_scale(first, adapter), _at_scale(second, adapter)
    return Path(kind, names, tasks, scored, {"factors": factors, "deltas": deltas})


def _at_scale(end: End, adapter: Adapter) -> End:
    """Return the end at the scale that it will be scored at, with the same delta.

    Another run may have another `adapter.alpha`; without one nothing changes, to the last bit.
    """
    scale = adapter.scale(end.rank)
    if end.scale == scale:
        return end
    tensors = dict(end.tensors)
    for module in adapted_modules(tensors):
        name_B, _ = factor_names(module)
        tensors[name_B] = tensors[name_B] * (end.scale / scale)
    return End(tensors, end.rank, scale)


def _key(end: End) -> str:
    """Return what tells models apart: equal ends of several paths are scored once."""
    return digest(end.tensors)


# The surface.


def _surface(run: StoredRun, side: int) -> Surface | str:
    """Plan the surface through the first three kept clients of one task, or say why there is none.

    Heads of unlike tasks have no common plane: where tasks differ, three clients of one are taken.
    """
    by_task: dict[str, list[Update]] = {}
    for update in run.updates:
        by_task.setdefault(update.client.task, []).append(update)
    three = next((tuple(found[:3]) for found in by_task.values() if len(found) >= 3), ())
    if not three:
        return "it needs three kept clients of one task"
    ends = [_returned(update) for update in three]
    mixture = DeltaMixture(ends, run.experiment.adapter.scale)
    try:
        plane = Plane(mixture)
    except ConfigError as error:
        return str(error)
    centre, reach = _square(plane.corners)
    steps = [2 * number / (side - 1) - 1 for number in range(side)]
    x, y = ([middle + reach * step for step in steps] for middle in centre)
    return Surface(three, mixture, plane, x, y, _projected(run, ends, plane))


def _square(corners: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], float]:
    """Return centre and half the side of a square around the triangle, with room to all sides."""
    low_x, low_y = (min(values) for values in zip(*corners, strict=True))
    high_x, high_y = (max(values) for values in zip(*corners, strict=True))
    reach = _ROOM * max(high_x - low_x, high_y - low_y) / 2
    return ((low_x + high_x) / 2, (low_y + high_y) / 2), reach


def _projected(run: StoredRun, ends: Sequence[End], plane: Plane) -> dict[str, Any]:
    """Return where the served model is projected to, (x, y), and how far off the plane it is."""
    if run.served is None:
        return {"left_out": "every client has a model of its own"}
    if any(is_residual(name) for end in ends for name in {*end.tensors, *run.served.tensors}):
        return {"left_out": "it holds changes of the base, which the plane does not measure"}
    scale = run.experiment.adapter.scale
    served = End(run.served.tensors, run.served.rank, scale(run.served.rank))
    x, y, off_plane = plane.foot(DeltaMixture([*ends, served], scale))
    return {"x": x, "y": y, "off_plane": off_plane}


# The measurement.


def measure_connectivity(
    plan: Plan, scorer: Scorer, on_scored: Callable[[str], None]
) -> dict[str, Any]:
    """Score all that is planned, and return it as plain values; equal runs give equal ones.

    `on_scored` hears of every scored model, with the name of what it is a part of.

    Raises:
        DataError: a loss is not finite.
    """
    ends: dict[str, Scored] = {}

    def score(name: str, tensors: Tensors, rank: int) -> Scored:
        found = scorer(Served(tensors, rank))
        if not torch.isfinite(found.losses).all():
            raise DataError(
                f"{plan.run.folder}: {name}: the loss of a row is not finite, so that nothing can "
                "be said of what lies between"
            )
        on_scored(name)
        return found

    def score_end(name: str, end: End) -> Scored:
        if (key := _key(end)) not in ends:
            ends[key] = score(name, end.tensors, end.rank)
        return ends[key]

    def along(path: Path, way: Mixture) -> list[Scored]:
        name = f"{path.names[0]} to {path.names[1]}"
        first, last = (
            score_end(name, end) for name, end in zip(path.names, path.ends, strict=True)
        )
        between = plan.positions[1:-1]
        return [first, *(score(name, way.at((1 - t, t)), way.rank) for t in between), last]

    paths = []
    for path in plan.paths:
        found = {
            name: way if isinstance(way, str) else along(path, way)
            for name, way in path.ways.items()
        }
        paths.append(
            {
                "kind": path.kind,
                "from": path.names[0],
                "to": path.names[1],
                "tasks": list(path.tasks),
                **{
                    name: {"left_out": points}
                    if isinstance(points, str)
                    else _along_path(plan.positions, points)
                    for name, points in found.items()
                },
                "factors_less_deltas": _in_the_middle(plan.positions, found),
            }
        )
    return {
        "run": plan.run.label,
        "digest": plan.run.record["digest"],
        "split": scorer.split,
        "examples": scorer.examples,
        "caution": CAUTION,
        "positions": list(plan.positions),
        "paths": paths,
        "surface": {"left_out": plan.surface}
        if isinstance(plan.surface, str)
        else _over_plane(plan.surface, score, score_end),
    }


def _point(scored: Scored) -> dict[str, float]:
    return {
        "loss": scored.loss,
        "loss_error": standard_error(scored.losses),
        "accuracy": scored.accuracy,
        "accuracy_error": standard_error(scored.hits),
    }


def _along_path(positions: Sequence[float], scored: Sequence[Scored]) -> dict[str, Any]:
    """Return what one way of one path shows: every point, the barrier and the middle."""
    losses = torch.stack([point.losses for point in scored]).double()
    hits = torch.stack([point.hits for point in scored]).double()
    bump = barrier(positions, losses)
    middle = positions.index(0.5)
    points = [_point(point) for point in scored]
    gaps = {
        name: values[middle] - (values[0] + values[-1]) / 2
        for name, values in (("loss", losses), ("accuracy", hits))
    }
    return {
        "rows": losses.shape[1],
        **{name: [point[name] for point in points] for name in points[0]},
        "barrier": {
            "height": bump.height,
            "error": bump.error,
            "at": bump.at,
            "beyond_noise": bump.height > max(2 * bump.error, _ROUNDING),
        },
        "middle": {
            "accuracy": points[middle]["accuracy"],
            **{f"{name}_gap": float(gap.mean()) for name, gap in gaps.items()},
            **{f"{name}_gap_error": standard_error(gap) for name, gap in gaps.items()},
        },
        "least_loss_at": positions[int(losses.mean(dim=1).argmin())],
    }


def _in_the_middle(
    positions: Sequence[float], found: Mapping[str, Sequence[Scored] | str]
) -> dict[str, float] | None:
    """Return what mixing factors instead of deltas costs at λ = 1/2, in nats, paired over rows."""
    factors, deltas = found["factors"], found["deltas"]
    if isinstance(factors, str) or isinstance(deltas, str):
        return None
    middle = positions.index(0.5)
    cost = factors[middle].losses.double() - deltas[middle].losses.double()
    return {"loss": float(cost.mean()), "loss_error": standard_error(cost)}


def _over_plane(
    surface: Surface,
    score: Callable[[str, Tensors, int], Scored],
    score_end: Callable[[str, End], Scored],
) -> dict[str, Any]:
    """Return loss and accuracy on the grid, by rows of y, and at what is marked on it."""

    def at(coefficients: Sequence[float]) -> Scored:
        return score(
            "the plane through three", surface.mixture.at(coefficients), surface.mixture.rank
        )

    corners = [score_end(_name(update), _returned(update)) for update in surface.updates]
    mean = at((1 / 3, 1 / 3, 1 / 3))
    best = min(corners, key=lambda corner: corner.loss)
    grid = [[at(surface.plane.coefficients(x, y)) for x in surface.x] for y in surface.y]
    centre = [sum(values) / 3 for values in zip(*surface.plane.corners, strict=True)]
    gain = mean.losses.double() - best.losses.double()
    return {
        "task": surface.updates[0].client.task,
        "clients": [
            {"client": update.client.client, "x": x, "y": y, **_point(corner)}
            for update, (x, y), corner in zip(
                surface.updates, surface.plane.corners, corners, strict=True
            )
        ],
        "mean": {
            "x": centre[0],
            "y": centre[1],
            **_point(mean),
            # Less the loss of the client whose loss is least, which is chosen on these rows.
            "against_best": float(gain.mean()),
            "against_best_error": standard_error(gain),
        },
        "served": dict(surface.served),
        "x": list(surface.x),
        "y": list(surface.y),
        "loss": [[point.loss for point in row] for row in grid],
        "accuracy": [[point.accuracy for point in row] for row in grid],
    }
