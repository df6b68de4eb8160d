"""What a strategy is: data, and pure functions over `{name: tensor}`.

A strategy holds no state. Its state is `{name: tensor}` too: it can be saved, resumed and compared.
A new method is one file with a factory from its options to a `Strategy`, one row in
`strategies.STRATEGIES`, and so it joins the contract tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from common.lowrank import Term, adapted_modules, factor_names
from common.seeds import torch_generator
from common.tensors import Tensors, head_prefix, weighted_mean


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

    `tensors` and `sent` hold the same names: factors of the client's rank, and its head.
    """

    client: Client
    num_examples: int
    tensors: Tensors
    sent: Tensors


@dataclass(frozen=True)
class Setting:
    """What a method may know of the run: the largest client rank, s at any rank, seed, clients."""

    rank: int
    scale: Callable[[int], float]
    seed: int
    clients: tuple["Client", ...]


# `(served tensors, rows) -> losses (n,)`: per-example losses on these rows of the server's probe
# set, whose order never varies, so that two models can be compared row by row.
Probe = Callable[[Tensors, slice], Tensor]


@dataclass(frozen=True)
class Served:
    """A model that users would get; `task` is None when it serves every task."""

    tensors: Tensors
    rank: int
    task: str | None = None


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
class Strategy:
    """One aggregation method, its options already applied.

    Attributes:
        start: the state before round 1, from the common start (rank `Setting.rank`, B zero).
        send: the model that a client starts the round from: factors of its rank, and heads.
        merge: the state after a round. Updates come in client order; never empty.
        serve: the models that users would get.
        trains: the parts that clients train, and therefore send and receive.
        probe_examples: how many probe rows `merge` wants; 0 for none.
        assign: who trains on what; federated methods leave it alone.
    """

    start: Callable[[Tensors], Tensors]
    send: Callable[[Tensors, Client], Tensors]
    merge: Callable[[Tensors, Sequence[Update], Probe | None], Merged]
    serve: Callable[[Tensors], Sequence[Served]]
    trains: tuple[str, ...] = ("lora_A", "lora_B", "head")
    probe_examples: int = 0
    assign: Callable[[Sequence[int]], Sequence[Assignment]] = each_its_own


def data_weights(updates: Sequence[Update]) -> list[float]:
    """Return w_k = n_k / Σn."""
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def heads_of(tensors: Tensors) -> dict[str, Tensor]:
    """Return the classification heads, which every strategy averages apart from the factors."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}


def for_task(tensors: Tensors, task: str) -> dict[str, Tensor]:
    """Return a state without the heads of other tasks."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("head.") or name.startswith(head_prefix(task))
    }


def merged_heads(state: Tensors, updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return the heads averaged over the clients that hold them; a head that none holds stays."""
    averaged = weighted_mean(
        [update.num_examples for update in updates], [heads_of(u.tensors) for u in updates]
    )
    return heads_of(state) | averaged


def named_factors(module: str, term: Term) -> dict[str, Tensor]:
    """Return the factors of `module` under their names, float32 and contiguous."""
    name_B, name_A = factor_names(module)
    return {name_A: term.A.float().contiguous(), name_B: term.B.float().contiguous()}


def send_prefix(state: Tensors, client: Client, server_scale: float) -> dict[str, Tensor]:
    """Return the first `client.rank` directions of every module, at the client's own scale.

    With factors sorted by singular value the prefix is the best adapter of that rank. Both
    factors take the root of the scales' ratio, so that `s_k·B·A` is unchanged; a direction whose
    B is still zero keeps A as it was drawn.
    """
    sent = dict(for_task(state, client.task))
    for module in adapted_modules(state):
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
