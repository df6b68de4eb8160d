"""Federated PAN: clients ask about every position once a round, and share only the answers.

PAN (Fu et al., arXiv 2408.13979) probes some positions at every step, on the rows of a batch. Over
a federation (ours) each client counts, on a fixed part of its rows, at how many batches shrinking a
position gets more rows right: h of n trials. The server sums these, which works under secure
aggregation, and next round's weights are `a_i = A·p_i`, `p_i = (Σh + 1)/(Σn + 2)`; of the first
round, `A/2` everywhere.

Laid over any method whose state is the prompt: `weights/<prompt>` (M,) goes down with the model,
`probed/<prompt>` (2, M), hits and trials, comes up with the update.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from common.nemesis import position_probability, position_weights
from common.tensors import Tensors, is_prompt
from strategies.base import Client, Merged, Probe, Strategy, Update

WEIGHTS, PROBED = "weights/", "probed/"
_COUNTS = "server/probed/"


def with_shared_probe(inner: Strategy, strength: float) -> Strategy:
    """Return the method with federated PAN beside it; `strength` is A."""

    def send(state: Tensors, client: Client) -> Tensors:
        model = inner.send(state, client)
        weights = {WEIGHTS + n: _weights(state, n, t) for n, t in model.items() if is_prompt(n)}
        return {**model, **weights}

    def _weights(state: Tensors, name: str, prompt: Tensor) -> Tensor:
        counts = state.get(_COUNTS + name, torch.zeros(2, prompt.shape[-2]))
        return position_weights(strength, position_probability(counts[0], counts[1]))

    def merge(state: Tensors, updates: Iterable[Update], probe: Probe | None) -> Merged:
        counts: dict[str, Tensor] = {}
        merged = inner.merge(state, _counting(updates, counts), probe)
        shares = {
            name: position_probability(count[0], count[1]).tolist()
            for name, count in counts.items()
        }
        kept = {_COUNTS + name: count for name, count in counts.items()}
        return Merged({**merged.state, **kept}, {**merged.diagnostics, "probed": shares})

    return replace(inner, send=send, merge=merge, rules=replace(inner.rules, probes=True))


def _counting(updates: Iterable[Update], counts: dict[str, Tensor]) -> Iterator[Update]:
    """Pass the updates on without what is not the method's, adding up the answers."""
    for update in updates:
        for name, tensor in update.tensors.items():
            if name.startswith(PROBED):
                prompt = name.removeprefix(PROBED)
                counts[prompt] = counts.get(prompt, torch.zeros_like(tensor)) + tensor
        yield replace(update, tensors=_plain(update.tensors), sent=_plain(update.sent))


def _plain(tensors: Tensors) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if not n.startswith((WEIGHTS, PROBED))}
