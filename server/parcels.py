"""Parcels: what every client holds, and so what has to travel to it.

A client remembers the model that it was last sent. Of the next one only what differs travels, be
that a factor that was merged since, or the changes of the base in every round that it missed: so
absent clients catch up without any method having to think of it, and the bytes are charged to the
round in which they travel. What equals the start that everyone can draw never travels at all.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.compression import Format, decode, encode
from common.residuals import base_version, is_residual, missed
from common.tensors import Tensors, part_of
from strategies.base import Client


@dataclass(frozen=True)
class _Contents:
    """What is in a parcel, without the tensors: digests, names in fewer bits, base version."""

    number: int
    digests: Mapping[str, bytes]
    rounded: frozenset[str]
    version: int


@dataclass(frozen=True)
class Parcel:
    """One model on its way to one client.

    Attributes:
        number: unique and rising for a client.
        since: the number of the parcel that it builds on; 0 for none.
        fresh: parts that the client draws itself.
        payload: what travels.
        model: the whole model as the client will have it.
        contents: what the server remembers of it.
    """

    number: int
    since: int
    fresh: tuple[str, ...]
    payload: Tensors
    model: Tensors
    contents: _Contents


class Parcels:
    """Knows what every client holds. `start(client, restart)` is the model that a client draws.

    Where clients do not remember, everything travels every time.
    """

    def __init__(
        self, start: Callable[[Client, int], Tensors], form: Format, remembering: bool
    ) -> None:
        self._start, self._form, self._remembering = start, form, remembering
        self._held: dict[int, _Contents] = {}
        self._starts: dict[tuple[str, int, int], Mapping[str, bytes]] = {}
        self._number = 0

    def pack(self, client: Client, model: Tensors, state: Tensors, restart: int) -> Parcel:
        """Return the parcel that makes `model`, sent from `state`, of what the client holds."""
        held = self._held.get(client.client)
        self._number += 1
        version = base_version(state)
        plain = {n: t for n, t in model.items() if not (version and is_residual(n))}
        digests = {name: _digest(tensor) for name, tensor in plain.items()}
        drawn = self._digests_of_start(client, restart)
        fresh = _fresh_parts(digests, drawn)
        drawn_now = {name for name in drawn if part_of(name) in fresh}
        known = held.digests if held else {}
        payload = {
            name: tensor
            for name, tensor in plain.items()
            if name not in drawn_now and known.get(name) != digests[name]
        }
        rounds = {n for n, t in payload.items() if self._form != "float32" and _may_round(n, t)}
        before = held.rounded if held else frozenset()
        held_over = before & (plain.keys() - payload.keys() - drawn_now)
        rounded = frozenset(rounds | held_over)
        travelling = {n: encode(t, self._form) if n in rounds else t for n, t in payload.items()}
        if version:
            travelling |= missed(state, held.version if held else 0)
        return Parcel(
            self._number,
            held.number if held else 0,
            fresh,
            travelling,
            {n: self._as_received(t) if n in rounded else t for n, t in model.items()},
            _Contents(self._number, digests, rounded, version),
        )

    def arrived(self, client: int, parcel: Parcel) -> None:
        """Note that the client has unpacked this parcel."""
        if self._remembering:
            self._held[client] = parcel.contents

    def lost(self, client: int) -> None:
        """Note that nobody knows what the client holds."""
        self._held.pop(client, None)

    def _digests_of_start(self, client: Client, restart: int) -> Mapping[str, bytes]:
        """Return the digests of what this client draws, made once for all clients like it."""
        key = (client.task, client.rank, restart)
        if key not in self._starts:
            start = self._start(client, restart)
            self._starts[key] = {name: _digest(tensor) for name, tensor in start.items()}
        return self._starts[key]

    def _as_received(self, tensor: Tensor) -> Tensor:
        return decode(encode(tensor, self._form), self._form, tensor.shape)


def _fresh_parts(digests: Mapping[str, bytes], drawn: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return the parts that are still as they are drawn."""
    differing = {
        part_of(name)
        for name, digest in drawn.items()
        if name in digests and digests[name] != digest
    }
    return tuple(sorted({part_of(name) for name in drawn} - differing))


def _may_round(name: str, tensor: Tensor) -> bool:
    """Say whether a tensor may travel in fewer bits; residuals gather, so they may not."""
    return tensor.dtype == torch.float32 and not is_residual(name)


def _digest(tensor: Tensor) -> bytes:
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(kind + content.tobytes(), digest_size=16).digest()
