"""HetLoRA: clients of unequal ranks hold prefixes of one pair of factors, and prune themselves.

Cho et al., arXiv 2401.06432. A client of rank r gets the first r columns of B and rows of A, as
they are. What comes back is padded with zeros and averaged, factor by factor, with `p_k = S_k/ΣS`,
where `S_k = ‖B_k·A_k‖_F` over all layers, `S_k² = Σ tr((BᵀB)(AAᵀ))`. Clients penalise their
trailing directions, and drop them where training made them smaller (`common.tails`); from then on
they are sent only what they kept.

Known weaknesses, kept: the error of averaging factors; directions that few clients hold are diluted
by zeros (`slices` mends this); and with alpha/r each client reads the same factors at a scale of
its own, so that one delta is not the same delta at all ranks.

What the paper leaves open: heads are averaged by examples, and so are factors if no client has a
delta yet; a direction that none of the cohort returned stays as it was, or becomes zero once no
client of the federation holds it any more.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field

from common.lowrank import Term, adapted_modules, is_factor, named_factors
from common.rules import LocalRules
from common.tails import padded
from common.tensors import RunningMean, Tensors
from strategies.base import (
    Client,
    Merged,
    Options,
    Probe,
    Served,
    Setting,
    Strategy,
    Update,
    for_task,
    heads_of,
    model_of,
)


class HetLoRAOptions(Options):
    """Options of HetLoRA.

    Attributes:
        slices: average every direction over the clients that hold it, not over all.
        tail_share: γ; the trailing directions are those from `floor(γ·r)` on; 1 never prunes.
        tail_penalty: λ, how strongly clients penalise their trailing directions.
    """

    slices: bool = False
    tail_share: float = Field(0.99, gt=0, le=1)
    tail_penalty: float = Field(0.01, ge=0)


_HELD = "held"


def hetlora(options: HetLoRAOptions, setting: Setting) -> Strategy:
    """Average zero-padded factors by the norms of deltas; ranks may differ."""

    def send(state: Tensors, client: Client) -> Tensors:
        sent, rank = dict(for_task(state, client.task)), _rank_left(state, client)
        for module in adapted_modules(model_of(state)):
            term = Term.of(state, module)
            sent |= named_factors(module, Term(term.B[:, :rank], term.A[:rank]))
        return sent

    def merge(state: Tensors, updates: Iterable[Update], _: Probe | None) -> Merged:
        modules = adapted_modules(model_of(state))
        by_norm, by_examples = RunningMean(), RunningMean()
        merged, norms = dict(state), dict[str, float]()
        for update in updates:
            who = update.client
            factors = {n: t.double() for n, t in update.tensors.items() if is_factor(n)}
            terms = [Term.of(factors, module) for module in modules]
            norm, rank = delta_norm(terms), terms[0].rank
            if rank < who.rank:
                merged[_rank_name(who)] = torch.tensor(rank)
            norms[str(who.client)] = norm
            factors = padded(factors, setting.rank)
            factors[_HELD] = (torch.arange(setting.rank) < rank).double()
            by_norm.add(norm, factors)
            by_examples.add(update.num_examples, {**factors, **heads_of(update.tensors)})
        means, total = by_examples.mean(), sum(norms.values())
        merged |= heads_of(means)
        if total > 0:
            means = by_norm.mean()
        returned = means[_HELD] > 0
        share = means[_HELD] if options.slices else torch.ones_like(means[_HELD])
        last = max(_rank_left(merged, client) for client in setting.clients)
        alive = torch.arange(setting.rank) < last
        for module in modules:
            mean, before = Term.of(means, module), Term.of(state, module)
            B = torch.where(returned, mean.B / share, before.B) * alive
            A = torch.where(returned[:, None], mean.A / share[:, None], before.A) * alive[:, None]
            merged |= named_factors(module, Term(B, A))
        weights = {client: norm / total for client, norm in norms.items()} if total > 0 else None
        return Merged(merged, {"weights": weights})

    def serve(state: Tensors) -> Sequence[Served]:
        return [Served(model_of(state), setting.rank)]

    rules = LocalRules(tail_share=options.tail_share, tail_penalty=options.tail_penalty)
    return Strategy(start=dict, send=send, merge=merge, serve=serve, rules=rules)


def delta_norm(terms: Iterable[Term]) -> float:
    """Return `‖B·A‖_F` over all modules, from (r, r) products, in float64."""
    total = 0.0
    for term in terms:
        B, A = term.B.double(), term.A.double()
        total += max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
    return float(total**0.5)


def _rank_name(client: Client) -> str:
    return f"server/rank.{client.client}"


def _rank_left(state: Tensors, client: Client) -> int:
    """Return the client's rank, less what it has pruned."""
    name = _rank_name(client)
    return int(state[name]) if name in state else client.rank
