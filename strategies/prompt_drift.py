"""How far the clients' soft prompts are apart, and what averaging does to their norms.

For every position of a prompt, with `q_k = n_k/Σn` over the clients that hold it, and v̄ the plain
mean whatever the method has made of it:

    ρ = Σ q_k ‖v_k‖      σ = ‖v̄‖/ρ      R = ‖Σ q_k v_k/‖v_k‖‖      D = Σ q_k ‖v_k - v̄‖²

and so `Σ q_k ‖v_k‖² = ‖v̄‖² + D`. σ and R are 1 where clients agree, and about `K^-1/2` for K random
prompts. Clients start from one prompt: σ near 1 means that averaging has little to shrink.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.tensors import is_prompt
from strategies.base import Served, Update, data_weights
from strategies.prompt_rules import MIN_NORM, norms


@dataclass(frozen=True)
class ClientDrift:
    """How a client moved a prompt, all positions together: `d_k = v_k - ` what it was sent.

    Attributes:
        distance: `‖d_k‖`.
        cosine: `cos(d_k, d̄)`; None where either is below 1e-12.
    """

    distance: float
    cosine: float | None


@dataclass(frozen=True)
class PromptDrift:
    """One prompt in one round, as plain values; a list has a number for every position, in order.

    Attributes:
        positions: the sizes of the prompt's axes but the last.
        norm: of the prompt that is served after the merge; None where there is no single one.
        client_norm, least_client_norm, greatest_client_norm: ρ, and the range of the `‖v_k‖`.
        shrink: σ; None where ρ is below 1e-12.
        resultant: R, to which a client whose norm is below 1e-12 adds nothing.
        drift: D.
        clients: by client number.
    """

    positions: list[int]
    norm: list[float] | None
    client_norm: list[float]
    least_client_norm: list[float]
    greatest_client_norm: list[float]
    shrink: list[float | None]
    resultant: list[float]
    drift: list[float]
    clients: Mapping[str, ClientDrift]


def prompt_drift(served: Sequence[Served], updates: Sequence[Update]) -> dict[str, PromptDrift]:
    """Measure every prompt that these updates hold, in float64; `served` is after the merge."""
    names = sorted({name for update in updates for name in update.tensors if is_prompt(name)})
    return {name: _of_prompt(name, served, updates) for name in names}


def _of_prompt(name: str, served: Sequence[Served], updates: Sequence[Update]) -> PromptDrift:
    holders = [update for update in updates if name in update.tensors]
    q = torch.tensor(data_weights(holders), dtype=torch.float64)
    v = torch.stack([update.tensors[name].double() for update in holders])
    mean, lengths = _weighted(q, v), norms(v)
    directions = torch.where(lengths < MIN_NORM, 0.0, v / lengths.clamp_min(MIN_NORM))
    rho = _weighted(q, lengths)
    return PromptDrift(
        positions=list(v.shape[1:-1]),
        norm=_listed(norms(served[0].tensors[name].double())) if len(served) == 1 else None,
        client_norm=_listed(rho),
        least_client_norm=_listed(lengths.amin(dim=0)),
        greatest_client_norm=_listed(lengths.amax(dim=0)),
        shrink=[
            length / whole if whole >= MIN_NORM else None
            for length, whole in zip(_listed(norms(mean)), _listed(rho), strict=True)
        ],
        resultant=_listed(norms(_weighted(q, directions))),
        drift=_listed(_weighted(q, norms(v - mean).square())),
        clients=_of_clients(name, holders, q),
    )


def _of_clients(name: str, holders: Sequence[Update], q: Tensor) -> dict[str, ClientDrift]:
    changes = [(u.tensors[name].double() - u.sent[name].double()).flatten() for u in holders]
    mean = _weighted(q, torch.stack(changes))
    whole = float(mean.norm())
    drifts = {}
    for update, change in zip(holders, changes, strict=True):
        distance = float(change.norm())
        moved = min(distance, whole) >= MIN_NORM
        cosine = float(change @ mean) / (distance * whole) if moved else None
        drifts[str(update.client.client)] = ClientDrift(distance, cosine)
    return drifts


def _weighted(q: Tensor, members: Tensor) -> Tensor:
    """Return `Σ q_k x_k` over the first axis."""
    total: Tensor = torch.tensordot(q, members, dims=1)
    return total


def _listed(numbers: Tensor) -> list[float]:
    return [float(number) for number in numbers.flatten()]
