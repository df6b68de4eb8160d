"""Messages between server and clients; the only import of Flower in `common`.

Packs and unpacks Flower's records, and alone knows their names. Bytes are counted on the form
that is serialised.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from common.errors import UpdateRefusedError
from common.memory import Memory
from common.residuals import is_change, is_residual
from common.rules import LocalRules
from common.tensors import Tensors, part_of

_TENSORS, _PLAN, _OUTCOME, _TEXT = "tensors", "plan", "outcome", "text"
_HELD, _OWN, _MEMORY = "held", "own", "memory"
_ASKED, _CHOSEN = "asked/", "chosen/"


@dataclass(frozen=True)
class Plan:
    """What a client is to do in this exchange, in plain values: it never sees a strategy.

    Attributes:
        experiment: the resolved experiment, as JSON.
        run: tells the runs apart that a client may take part in.
        client: whose turn it is; its rank and its random streams follow from it.
        shards: the clients whose rows are trained on; its own, but for pooled controls.
        round: 1-based.
        steps: local steps.
        trains: the parts that are trained.
        parcel: the number of this parcel.
        since: the number of the parcel that the server believes this client holds; 0 for none.
        fresh: the parts that the client draws itself, as they are at the start.
        restart: which start those are drawn from.
        base: the fingerprint of the server's base model, which the client's must have too.
        rules: what the method asks for beside training.
    """

    experiment: str
    run: str
    client: int
    shards: tuple[int, ...]
    round: int
    steps: int
    trains: tuple[str, ...]
    parcel: int
    since: int
    fresh: tuple[str, ...]
    restart: int
    base: str
    rules: LocalRules


@dataclass(frozen=True)
class Outcome:
    """What a client says of its training: rows it holds, mean loss of its steps, seconds.

    `startup` is the seconds before it trained: until code, model and rows were there.
    Where it asked at every step which positions of its prompts matter, by prompt: how often it
    `asked` about each, and at how many of these shrinking helped (`chosen`). `reused` says that
    another run had trained this already; the seconds are those it took then.
    """

    client: int
    num_examples: int
    loss: float
    seconds: float
    asked: Mapping[str, list[int]] = field(default_factory=dict)
    chosen: Mapping[str, list[int]] = field(default_factory=dict)
    reused: bool = False
    startup: float = 0.0


def pack_instruction(plan: Plan, tensors: Tensors) -> RecordDict:
    """Pack what the server sends."""
    config = ConfigRecord({_TEXT: json.dumps(asdict(plan))})
    return RecordDict({_PLAN: config, _TENSORS: _pack(tensors)})


def unpack_instruction(content: RecordDict) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return what the server sent."""
    values = json.loads(str(content.config_records[_PLAN][_TEXT]))
    rules = values.pop("rules")
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    plan = Plan(
        **{**values, **lists}, rules=LocalRules(**{**rules, "keeps": tuple(rules["keeps"])})
    )
    return plan, _unpack(content.array_records[_TENSORS])


def pack_update(outcome: Outcome, tensors: Tensors) -> RecordDict:
    """Pack what a client returns."""
    config = ConfigRecord(
        {
            "client": outcome.client,
            "num-examples": outcome.num_examples,
            "loss": outcome.loss,
            "seconds": outcome.seconds,
            "reused": outcome.reused,
            "startup": outcome.startup,
        }
    )
    for what, counts in ((_ASKED, outcome.asked), (_CHOSEN, outcome.chosen)):
        for prompt, count in counts.items():
            config[what + prompt] = count
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
            asked=_counts(config, _ASKED),
            chosen=_counts(config, _CHOSEN),
            reused=bool(config["reused"]),
            startup=float(config["startup"]),  # type: ignore[arg-type]
        )
        tensors = _unpack(content.array_records[_TENSORS])
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRefusedError(f"the reply cannot be read: {error!r}") from None
    if outcome.num_examples < 1:
        raise UpdateRefusedError(f"num-examples = {outcome.num_examples}: an empty shard")
    return outcome, tensors


def _counts(config: ConfigRecord, what: str) -> dict[str, list[int]]:
    named = {name.removeprefix(what): name for name in config if name.startswith(what)}
    return {prompt: list(config[name]) for prompt, name in named.items()}  # type: ignore[arg-type]


def pack_identity(client: int) -> RecordDict:
    """Pack a node's answer to the question which client it is."""
    return RecordDict({_OUTCOME: ConfigRecord({"client": client})})


def unpack_identity(content: RecordDict) -> int:
    """Return which client a node says it is."""
    return int(content.config_records[_OUTCOME]["client"])  # type: ignore[arg-type]


def pack_question(client: int, experiment: str) -> RecordDict:
    """Pack the question what a client holds, of an experiment as JSON."""
    return RecordDict({_PLAN: ConfigRecord({"client": client, _TEXT: experiment})})


def unpack_question(content: RecordDict) -> tuple[int, str]:
    """Return which client is asked, and the experiment."""
    config = content.config_records[_PLAN]
    return int(config["client"]), str(config[_TEXT])  # type: ignore[arg-type]


def pack_holding(client: int, label_counts: Sequence[int]) -> RecordDict:
    """Pack how many rows of each label a client holds."""
    config = ConfigRecord({"client": client, "label-counts": list(label_counts)})
    return RecordDict({_OUTCOME: config})


def unpack_holding(content: RecordDict) -> tuple[int, tuple[int, ...]]:
    """Return (client, rows of each label)."""
    config = content.config_records[_OUTCOME]
    counts = tuple(int(count) for count in config["label-counts"])  # type: ignore[union-attr]
    return int(config["client"]), counts  # type: ignore[arg-type]


def pack_scores(client: int, accuracy: float, loss: float) -> RecordDict:
    """Pack what a client says of its own model."""
    return RecordDict(
        {_OUTCOME: ConfigRecord({"client": client, "accuracy": accuracy, "loss": loss})}
    )


def unpack_scores(content: RecordDict) -> tuple[int, float, float]:
    """Return (client, accuracy, loss)."""
    config = content.config_records[_OUTCOME]
    return int(config["client"]), float(config["accuracy"]), float(config["loss"])  # type: ignore[arg-type]


def recall(state: RecordDict, client: int, run: str) -> Memory:
    """Return what this client remembers of the run, from Flower's context of its node."""
    config = state.config_records.get(f"{_MEMORY}.{client}")
    if config is None or config["run"] != run:
        return Memory()
    return Memory(
        int(config["parcel"]),  # type: ignore[arg-type]
        _unpack(state.array_records[f"{_HELD}.{client}"]),
        _unpack(state.array_records[f"{_OWN}.{client}"]),
    )


def remember(state: RecordDict, client: int, run: str, memory: Memory) -> None:
    """Put a client's memory into Flower's context of its node, in place of any older one."""
    state[f"{_MEMORY}.{client}"] = ConfigRecord({"run": run, "parcel": memory.parcel})
    state[f"{_HELD}.{client}"] = _pack(memory.held)
    state[f"{_OWN}.{client}"] = _pack(memory.own)


def kind_of(name: str) -> str:
    """Return under which heading the bytes of a tensor are counted.

    `A`, `B`, `head`, `prompt`, `own` (of a transfer, what a client may keep to itself), `residual`
    (changes of the base), `control` (control variates), `sketch`, `probe` (which positions of
    prompts matter), `candidate` and `score`, or `unknown` for what is going to be refused.
    """
    if is_change(name) or is_residual(name):
        return "residual"
    return _KINDS.get(part_of(name), "unknown")


_KINDS = {
    "lora_A": "A",
    "lora_B": "B",
    "head": "head",
    "prompt": "prompt",
    "own": "own",
    "weights": "probe",
    "probed": "probe",
    "local": "prompt",
    "control": "control",
    "candidate": "candidate",
    "score": "score",
    "sketch": "sketch",
    "basis": "sketch",
    "projection": "sketch",
}


def count_bytes(content: RecordDict) -> dict[str, int]:
    """Return the bytes of a message by kind: the numbers themselves, and all the rest.

    `protocol` is everything that is no number of a tensor: names, array headers, the plan. The
    total is the length of the serialised record.
    """
    counted: dict[str, int] = {}
    for name, array in content.array_records[_TENSORS].items():
        kind = kind_of(name)
        # From the header: unpacking the numbers would cost more than sending them.
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        counted[kind] = counted.get(kind, 0) + size
    total = recorddict_to_proto(content).ByteSize()
    return counted | {"protocol": total - sum(counted.values()), "total": total}


def add_bytes(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Return the sums by kind."""
    return {kind: first.get(kind, 0) + second.get(kind, 0) for kind in {**first, **second}}


def _pack(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def _unpack(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    # Flower's buffers are read-only: copy, so that torch may own them.
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
