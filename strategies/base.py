"""What a strategy is: data, and pure functions over `{name: tensor}`.

A strategy holds no state. Its state is `{name: tensor}` too: it can be saved, resumed and compared.
A new method is one file with a factory from its options to a `Strategy`, one row in
`strategies.STRATEGIES`, and so it joins the contract tests.

Names in a state: those of the model (factors, heads, residuals) as they are; whatever else the
server keeps holds a slash (`server/round`, `client.3/head.news.bias`) and never leaves it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from common.lowrank import (
    Directions,
    Term,
    adapted_modules,
    factor_names,
    kaiming_start,
    named_factors,
)
from common.rules import NO_RULES, LocalRules
from common.seeds import torch_generator
from common.tensors import Tensors, head_prefix, part_of, weighted_mean


class Options(BaseModel):
    """Base of every strategy's options: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Client:
    """What the server knows of a client: `scale` is s of its adapter, `s·B·A`."""

    client: int
    task: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Update:
    """What a client returned, completed to its whole model, beside the whole model it was sent.

    `tensors` holds the names of `sent`, factors of the client's rank and its head, with what was
    trained in place of what was sent; and whatever else the method's local rules return.
    """

    client: Client
    num_examples: int
    tensors: Tensors
    sent: Tensors


@dataclass(frozen=True)
class Setting:
    """What a method may know of the run.

    Attributes:
        rank: the largest rank of any client.
        scale: s at any rank.
        seed: of the strategy's own draws.
        start_seed: of the common start, which server and clients draw alike.
        clients: every client of the federation.
    """

    rank: int
    scale: Callable[[int], float]
    seed: int
    clients: tuple["Client", ...]
    start_seed: int = 0


@dataclass(frozen=True)
class Probe:
    """Labelled rows of the server; their order never varies: models are compared row by row.

    Attributes:
        losses: `(served tensors, rows) -> (n,)`, the loss of each of these rows.
        slopes: `(served tensors, K directions, rows) -> (n,), (n, K)`, the same losses, and their
            derivatives along each direction.
    """

    losses: Callable[[Tensors, slice], Tensor]
    slopes: Callable[[Tensors, Directions, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Served:
    """A model that users would get; None in `task` or `client` is for a model that serves all."""

    tensors: Tensors
    rank: int
    task: str | None = None
    client: int | None = None


@dataclass(frozen=True)
class Merged:
    """The state after a round, and what is worth knowing about how it came about."""

    state: Tensors
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """Who trains on whose shards, and for how many times the usual local steps."""

    client: int
    shards: tuple[int, ...]
    steps_factor: int = 1


def each_its_own(cohort: Sequence[int]) -> list[Assignment]:
    """Assign to every client of the cohort its own shard: federated learning."""
    return [Assignment(client, (client,)) for client in cohort]


@dataclass(frozen=True)
class FollowUp:
    """A second exchange in a round; question and answers are laid over the updates.

    Attributes:
        kind: what clients are asked to do: `project` what they trained on the server's bases
            (`common.sketches`), or `score` candidates on their rows (`common.candidates`).
        ask: the question, from the state and the updates.
        asked: the clients that get it, among those of the updates.
        indispensable: whether an update counts for nothing without the answer.
    """

    kind: Literal["project", "score"]
    ask: Callable[[Tensors, Sequence[Update]], Tensors]
    asked: Callable[[Tensors, Sequence[Update]], Sequence[int]]
    indispensable: bool


def everyone(_: Tensors, updates: Sequence[Update]) -> list[int]:
    """Ask every client of the round."""
    return [update.client.client for update in updates]


EVERYTHING = ("lora_A", "lora_B", "head", "prompt", "own")


def trains_everything(_: Tensors) -> tuple[str, ...]:
    """Train both factors, soft prompts, what transfers them and the head in every round."""
    return EVERYTHING


@dataclass(frozen=True)
class Strategy:
    """One aggregation method, its options already applied.

    Attributes:
        start: the state before round 1, from the common start (rank `Setting.rank`, B zero).
        send: the whole model that a client starts the round from: factors of its rank, heads, and
            residuals where the base has changed. What of it has to travel is not its business.
        merge: the state after a round, in one pass over the updates, which come in client order
            and are never none.
        serve: the models that users would get.
        trains: the parts that clients train in the round that starts from this state.
        rules: what clients do beside training on their rows; plain values, sent to them.
        follow_up: the second exchange in a round, where the method needs one.
        personalised: whether each client's model differs, by what it keeps to itself.
        probe_examples: how many probe rows `merge` wants; 0 for none.
        assign: who trains on what; federated methods leave it alone.
    """

    start: Callable[[Tensors], Tensors]
    send: Callable[[Tensors, Client], Tensors]
    merge: Callable[[Tensors, Iterable[Update], Probe | None], Merged]
    serve: Callable[[Tensors], Sequence[Served]]
    trains: Callable[[Tensors], tuple[str, ...]] = trains_everything
    rules: LocalRules = NO_RULES
    follow_up: FollowUp | None = None
    personalised: bool = False
    probe_examples: int = 0
    assign: Callable[[Sequence[int]], Sequence[Assignment]] = each_its_own


def data_weights(updates: Sequence[Update]) -> list[float]:
    """Return w_k = n_k / Σn."""
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def heads_of(tensors: Tensors) -> dict[str, Tensor]:
    """Return the classification heads, which every strategy averages apart from the factors."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}


def model_of(state: Tensors) -> dict[str, Tensor]:
    """Return the model in a state, without what the server keeps to itself."""
    return {name: tensor for name, tensor in state.items() if "/" not in name}


def for_task(state: Tensors, task: str) -> dict[str, Tensor]:
    """Return the model in a state, without the heads of other tasks."""
    return {
        name: tensor
        for name, tensor in model_of(state).items()
        if not name.startswith("head.") or name.startswith(head_prefix(task))
    }


def counted_by_examples(updates: Iterable[Update]) -> Iterator[tuple[int, Tensors]]:
    """Yield `(num_examples, tensors)` of every update, and hold none while the next is made."""
    for update in updates:
        yield update.num_examples, update.tensors
        del update


def noting(updates: Iterable[Update], held: set[str]) -> Iterator[Update]:
    """Pass the updates on, noting which tensors of the model they hold."""
    for update in updates:
        held.update(model_of(update.tensors))
        yield update


def mean_of_parts(updates: Iterable[Update], parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean, by number of examples, of every tensor of these parts."""
    # Names are the same from client to client: each is looked at once.
    wanted = functools.cache(lambda name: part_of(name) in parts)
    return weighted_mean(
        (examples, {n: t for n, t in tensors.items() if wanted(n)})
        for examples, tensors in counted_by_examples(updates)
    )


def merged_heads(state: Tensors, updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return the heads averaged over the clients that hold them; a head that none holds stays."""
    averaged = weighted_mean((u.num_examples, heads_of(u.tensors)) for u in updates)
    return heads_of(state) | averaged


_ROUND = "server/round"


def merges_so_far(state: Tensors) -> int:
    """Return how many merges `counted` has counted in this state."""
    return int(state[_ROUND]) if _ROUND in state else 0


def counted(state: Tensors) -> dict[str, Tensor]:
    """Return the entry that counts one merge more; for methods that alternate."""
    return {_ROUND: torch.tensor(merges_so_far(state) + 1)}


_RESTART = "server/restart"


def restarts_so_far(state: Tensors) -> int:
    """Return how often the method has restarted its adapters; the common start is restart 0."""
    return int(state[_RESTART]) if _RESTART in state else 0


def restarted(state: Tensors, setting: Setting) -> dict[str, Tensor]:
    """Return factors drawn anew, A as at the start and B zero, the same on server and clients."""
    restart = restarts_so_far(state) + 1
    fresh: dict[str, Tensor] = {_RESTART: torch.tensor(restart)}
    for module in adapted_modules(model_of(state)):
        name_B, name_A = factor_names(module)
        rank, features = state[name_A].shape
        fresh[name_A] = kaiming_start(rank, features, module, setting.start_seed, restart)
        fresh[name_B] = torch.zeros_like(state[name_B])
    return fresh


def send_prefix(state: Tensors, client: Client, server_scale: float) -> dict[str, Tensor]:
    """Return the first `client.rank` directions of every module, at the client's own scale.

    With factors sorted by singular value the prefix is the best adapter of that rank. Both
    factors take the root of the scales' ratio, so that `s_k·B·A` is unchanged; a direction whose
    B is still zero keeps A as it was drawn.
    """
    sent = dict(for_task(state, client.task))
    for module in adapted_modules(model_of(state)):
        term = Term.of(state, module)
        B, A = term.B[:, : client.rank], term.A[: client.rank]
        live = B.abs().amax(dim=0) > 0
        root = torch.where(live, (server_scale / client.scale) ** 0.5, 1.0)
        sent |= named_factors(module, Term(B * root, A * root[:, None]))
    return sent


def revive_dead_directions(module: str, term: Term, S: Tensor, rank: int, seed: int) -> Term:
    """Fill up to `rank` directions, and re-draw A wherever the singular value has vanished.

    A direction with both factors zero gets no gradient, ever. B stays zero there, so that the
    delta is unchanged, and A takes the usual start (specification 7.6).
    """
    missing = rank - term.rank
    B = functional.pad(term.B, (0, missing))
    A = functional.pad(term.A, (0, 0, 0, missing))
    S = functional.pad(S[: term.rank], (0, missing))
    dead = S.clamp_min(0) <= 1e-6 * S.max()
    bound = A.shape[1] ** -0.5
    draw = torch.rand(A.shape, generator=torch_generator(seed, "revive", module), dtype=A.dtype)
    return Term(torch.where(dead, 0.0, B), torch.where(dead[:, None], (2 * draw - 1) * bound, A))
