"""Controls: what a comparison of federated methods has to be held against. None is federated.

- `local-only`: every client trains alone, for ever; reported is the mean over clients' models.
- `centralised`: one model trained on the pooled shards, with the cohort's steps in sequence.
- `dense-oracle`: the exact mean of the clients' deltas, kept as dense float64 matrices. What an
  aggregation rule loses by its rank or its factors is the distance to this. Small models only.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.lowrank import (
    Span,
    Term,
    adapted_modules,
    balanced_factors,
    factor_names,
    named_factors,
)
from common.residuals import residual_name
from common.rules import TURNING
from common.tensors import Tensors
from strategies.base import (
    Assignment,
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    data_weights,
    for_task,
    merged_heads,
    model_of,
    revive_dead_directions,
    send_prefix,
)


class ControlOptions(Options):
    """Controls have no options."""


def local_only(_: ControlOptions, setting: Setting) -> Strategy:
    """Keep every client's model apart; its state holds them under `client.<k>/`."""

    def send(state: Tensors, client: Client) -> Tensors:
        own = _of_client(state, client.client)
        return own or send_prefix(model_of(state), client, setting.scale(setting.rank))

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        merged = dict(state)
        for update in updates:
            for name, tensor in update.tensors.items():
                merged[f"client.{update.client.client}/{name}"] = tensor
        return Merged(merged)

    def serve(state: Tensors) -> Sequence[Served]:
        # Clients that have not trained yet count too, with the common start.
        return [Served(send(state, c), c.rank, c.task, c.client) for c in setting.clients]

    return Strategy(start=dict, send=send, merge=merge, serve=serve)


def _of_client(state: Tensors, client: int) -> dict[str, Tensor]:
    prefix = f"client.{client}/"
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def centralised(_: ControlOptions, setting: Setting) -> Strategy:
    """Let one client train on the cohort's pooled shards, with as many steps as all together."""

    def assign(cohort: Sequence[int]) -> list[Assignment]:
        return [Assignment(cohort[0], tuple(cohort), steps_factor=len(cohort))]

    def send(state: Tensors, _: Client) -> Tensors:
        return model_of(state)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        (update,) = updates
        return Merged({**state, **update.tensors})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=dict, send=send, merge=merge, serve=serve, assign=assign)


def dense_oracle(_: ControlOptions, setting: Setting) -> Strategy:
    """Serve `Σ w_k ΔW_k` itself: the best factors of the rank, and all that they miss, densely."""
    scale = setting.scale(setting.rank)

    def start(tensors: Tensors) -> Tensors:
        state = dict(tensors)
        for module in adapted_modules(tensors):
            term = Term.of(tensors, module)
            zero = torch.zeros(term.B.shape[0], term.A.shape[1], dtype=torch.float64)
            state[residual_name(module)] = zero
        return state

    def send(state: Tensors, client: Client) -> Tensors:
        return for_task(state, client.task)

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        updates = list(updates)
        merged: dict[str, Tensor] = merged_heads(state, updates)
        for module in adapted_modules(state):
            exact = dense_mean(updates, module)
            svd = Span([Term.dense(exact)]).svd([1.0])
            best = svd.truncated(setting.rank)
            term = balanced_factors(best, scale)
            term = revive_dead_directions(module, term, best.S, setting.rank, setting.seed)
            factors = named_factors(module, term)
            name_B, name_A = factor_names(module)
            # Taken from the factors as they are sent, in float32, so that the sum is exact.
            missed = exact - scale * factors[name_B].double() @ factors[name_A].double()
            merged |= factors | {residual_name(module): missed}
        return Merged(merged)

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    return Strategy(start=start, send=send, merge=merge, serve=serve, rules=TURNING)


def dense_mean(updates: Sequence[Update], module: str) -> Tensor:
    """Return `Σ w_k ΔW_k` of a module, dense (m, n) and float64; `ΔW = s·B·A` + any residual."""
    total = torch.zeros(())
    for weight, update in zip(data_weights(updates), updates, strict=True):
        term = Term.of(update.tensors, module)
        delta = update.client.scale * term.B.double() @ term.A.double()
        if (name := residual_name(module)) in update.tensors:
            delta = delta + update.tensors[name].double()
        total = total + weight * delta
    return total
