"""SCAFFOLD: correct every local step by how this client's gradients differ from everyone's.

Karimireddy et al., arXiv 1910.06378, algorithm 1, option II. Clients step by `g - c_k + c`, and
after J steps of rate η keep `c_k⁺ = c_k - c + (x_t - x_k)/(Jη)` and return `c_k⁺ - c_k`. The server
sets `x ← x + Σ p_k (x_k - x_t)`, `c ← c + 1/N·Σ (c_k⁺ - c_k)`, N of all clients, not of the cohort.
A head has the N clients of its task. The formula takes what a step did for its gradient: true of
SGD only. Two things to know: c counts all clients alike, so that it is the plain mean of their
losses that is minimised, whatever p_k; and an update that is lost leaves c without a change that
the client has made to c_k.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from common.memory import prefixed, under
from common.tensors import Tensors, head_prefix, part_of
from strategies.base import Client, Merged, Probe, Setting, Strategy, Update, model_of
from strategies.over import OverOptions, underlying

_COMMON = "server/control/"


class ScaffoldOptions(OverOptions):
    """SCAFFOLD has no options beside the method underneath."""


def scaffold(options: ScaffoldOptions, setting: Setting) -> Strategy:
    """Lay control variates over the method underneath; they cost as much again."""
    inner = underlying(options, setting)

    def start(tensors: Tensors) -> Tensors:
        state = inner.start(tensors)
        trained = {n: t for n, t in state.items() if part_of(n) in inner.trains(state)}
        return {
            **state,
            **prefixed(_COMMON, {n: torch.zeros_like(t) for n, t in trained.items()}),
        }

    def send(state: Tensors, client: Client) -> Tensors:
        sent, common = inner.send(state, client), under(_COMMON, state)
        return {**sent, **prefixed("control/", {n: c for n, c in common.items() if n in sent})}

    def merge(state: Tensors, updates: Iterable[Update], probe: Probe | None) -> Merged:
        common = {name: c.double() for name, c in under(_COMMON, state).items()}

        def without_controls() -> Iterator[Update]:
            for update in updates:
                for name, change in under("control/", update.tensors).items():
                    common[name] = common[name] + change.double() / _holders(name, setting)
                tensors, sent = model_of(update.tensors), model_of(update.sent)
                yield replace(update, tensors=tensors, sent=sent)

        merged = inner.merge(state, without_controls(), probe)
        controls = prefixed(_COMMON, {name: c.float() for name, c in common.items()})
        return Merged({**merged.state, **controls}, merged.diagnostics)

    return replace(
        inner,
        start=start,
        send=send,
        merge=merge,
        rules=replace(inner.rules, control_variates=True),
    )


def _holders(name: str, setting: Setting) -> int:
    """Return N: how many clients of the federation hold a tensor of this name."""
    if part_of(name) != "head":
        return len(setting.clients)
    return sum(name.startswith(head_prefix(client.task)) for client in setting.clients)
