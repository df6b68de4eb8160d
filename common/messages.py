"""Messages between server and clients; the only import of Flower in `common`.

Packs and unpacks Flower's records, and alone knows their names. Bytes are counted on the form
that is serialised.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from common.adapters import part_of
from common.errors import UpdateRefusedError
from common.tensors import Tensors

_TENSORS, _PLAN, _OUTCOME = "tensors", "plan", "outcome"
_KINDS = {"lora_A": "adapter", "lora_B": "adapter", "head": "head", "residual": "residual"}


@dataclass(frozen=True)
class Plan:
    """What a client is to do this round, in plain values: it never sees a strategy.

    Attributes:
        experiment: the resolved experiment, as JSON.
        client: whose turn it is; its rank and its random streams follow from it.
        shards: the clients whose rows are trained on; its own, but for pooled controls.
        round: 1-based.
        steps: local steps.
        trains: the parts that are trained, and so sent and returned.
    """

    experiment: str
    client: int
    shards: tuple[int, ...]
    round: int
    steps: int
    trains: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a client says of its training: rows it holds, mean loss of its steps, seconds."""

    client: int
    num_examples: int
    loss: float
    seconds: float


def pack_instruction(plan: Plan, tensors: Tensors) -> RecordDict:
    """Pack what the server sends."""
    config = ConfigRecord(
        {
            "experiment": plan.experiment,
            "client": plan.client,
            "shards": list(plan.shards),
            "round": plan.round,
            "steps": plan.steps,
            "trains": list(plan.trains),
        }
    )
    return RecordDict({_PLAN: config, _TENSORS: _pack(tensors)})


def unpack_instruction(content: RecordDict) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return what the server sent."""
    config = content.config_records[_PLAN]
    plan = Plan(
        experiment=str(config["experiment"]),
        client=int(config["client"]),  # type: ignore[arg-type]
        shards=tuple(config["shards"]),  # type: ignore[arg-type]
        round=int(config["round"]),  # type: ignore[arg-type]
        steps=int(config["steps"]),  # type: ignore[arg-type]
        trains=tuple(config["trains"]),  # type: ignore[arg-type]
    )
    return plan, _unpack(content)


def pack_update(outcome: Outcome, tensors: Tensors) -> RecordDict:
    """Pack what a client returns."""
    config = ConfigRecord(
        {
            "client": outcome.client,
            "num-examples": outcome.num_examples,
            "loss": outcome.loss,
            "seconds": outcome.seconds,
        }
    )
    return RecordDict({_OUTCOME: config, _TENSORS: _pack(tensors)})


def unpack_update(content: RecordDict) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """Return what a client returned.

    Raises:
        UpdateRefusedError: the reply is not of this form, or holds no examples.
    """
    try:
        config = content.config_records[_OUTCOME]
        outcome = Outcome(
            client=int(config["client"]),  # type: ignore[arg-type]
            num_examples=int(config["num-examples"]),  # type: ignore[arg-type]
            loss=float(config["loss"]),  # type: ignore[arg-type]
            seconds=float(config["seconds"]),  # type: ignore[arg-type]
        )
        tensors = _unpack(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRefusedError(f"the reply cannot be read: {error!r}") from None
    if outcome.num_examples < 1:
        raise UpdateRefusedError(f"num-examples = {outcome.num_examples}: an empty shard")
    return outcome, tensors


def pack_identity(client: int) -> RecordDict:
    """Pack a node's answer to the question which client it is."""
    return RecordDict({_OUTCOME: ConfigRecord({"client": client})})


def unpack_identity(content: RecordDict) -> int:
    """Return which client a node says it is."""
    return int(content.config_records[_OUTCOME]["client"])  # type: ignore[arg-type]


def count_bytes(content: RecordDict, tensors: Tensors) -> dict[str, int]:
    """Return the bytes of a message by kind: the numbers themselves, and all the rest.

    `protocol` is everything that is no number of a tensor: names, array headers, the plan. The
    total is the length of the serialised record.
    """
    counted: dict[str, int] = {}
    for name, tensor in tensors.items():
        if kind := _KINDS.get(part_of(name)):
            counted[kind] = counted.get(kind, 0) + tensor.nbytes
    total = recorddict_to_proto(content).ByteSize()
    return counted | {"protocol": total - sum(counted.values()), "total": total}


def add_bytes(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Return the sums by kind."""
    return {kind: first.get(kind, 0) + second.get(kind, 0) for kind in {**first, **second}}


def _pack(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def _unpack(content: RecordDict) -> dict[str, torch.Tensor]:
    arrays = content.array_records[_TENSORS]
    # Flower's buffers are read-only: copy, so that torch may own them.
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
