"""Shards: which training rows each client holds.

`(task, partition, seed)` decides every client's rows, and every client recomputes its own: nothing
is sent. The draws are those of flwr-datasets' partitioners; its partitioner for equal shards with
skewed labels divides by zero where a label runs out, so that one is our own. Where each site has a
folder of its own nothing is dealt out, and the server knows what it is told: how many rows of each
label there are.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import Partition, Task
from common.errors import DataError
from common.kept_tensors import kept_or_made
from common.seeds import child_seed, numpy_generator
from common.tasks import SERVER, LabelledTask, load_tasks

Rows = NDArray[np.int64]


class Holding(Protocol):
    """What the server knows of a client's part: how many rows it has of each label of a task."""

    @property
    def client(self) -> int:
        """Return whose it is."""

    @property
    def task(self) -> LabelledTask:
        """Return the task, as the server has it."""

    @property
    def label_counts(self) -> Sequence[int]:
        """Return how many rows of each label the client holds."""


@dataclass(frozen=True)
class Shard:
    """A client's part: rows (n,) of the training split of `task`, which lies at `site`."""

    client: int
    task: LabelledTask
    rows: Rows
    site: str = SERVER

    @property
    def label_counts(self) -> list[int]:
        """Return how many rows of each label the client holds."""
        labels = self.task.train.labels[self.rows]
        return [int(n) for n in np.bincount(labels, minlength=len(self.task.labels))]


@dataclass(frozen=True)
class ToldHolding:
    """What a client with a folder of its own has said of it."""

    client: int
    task: LabelledTask
    label_counts: tuple[int, ...]


def shard_of(task: Task, partition: Partition, seed: int, client: int) -> Shard:
    """Return the shard of one client: its part of what is dealt out, or all that its folder has.

    Raises:
        ConfigError, DataError: as `deal_shards` and `load_tasks`.
    """
    if partition.kind != "sites":
        return deal_shards(task, partition, seed)[client]
    [own] = load_tasks(task, str(client))
    if not len(own.train):
        raise DataError(f"client {client} has no training rows: {task.path!r} at its site")
    return Shard(client, own, np.arange(len(own.train)), str(client))


@functools.lru_cache(maxsize=16)
def deal_shards(task: Task, partition: Partition, seed: int) -> tuple[Shard, ...]:
    """Return the shard of every client, in client order. Shards are disjoint.

    In a by-task partition client `k` holds an IID part of member `k mod members`.

    Raises:
        DataError: a client would be left with no rows, or fewer than `min_examples`.
    """
    tasks = load_tasks(task)
    each = partition.clients // len(tasks)
    shards: list[Shard | None] = [None] * partition.clients
    for index, member in enumerate(tasks):
        available = partition.shots * len(member.labels) or len(member.train)
        if available < each:
            raise DataError(
                f"partition.clients = {partition.clients}: some client would hold an empty shard, "
                f"since task {member.name} has {available} training rows for {each} clients"
            )
        kept = _few_shots(member, partition.shots, seed)
        labels = member.train.labels[kept]
        dealt = _kept_deal(labels, partition, each, child_seed(seed, "shards", index))
        for turn, positions in enumerate(dealt):
            rows = kept[positions]
            client = turn * len(tasks) + index
            if not len(rows):
                raise DataError(
                    f"client {client} would hold an empty shard: {available} training "
                    f"rows of task {member.name} among {each} clients; lower partition.clients"
                )
            shards[client] = Shard(client, member, np.sort(rows))
    return tuple(shard for shard in shards if shard is not None)


def _few_shots(task: LabelledTask, shots: int, seed: int) -> Rows:
    """Return the positions (n,) of `shots` training rows of each class, drawn by the seed."""
    labels = task.train.labels
    if not shots:
        return np.arange(len(labels))
    chosen = []
    for label, name in enumerate(task.labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < shots:
            raise DataError(
                f"partition.shots = {shots}: class {name!r} of task {task.name} has only "
                f"{len(rows)} training rows"
            )
        stream = numpy_generator(seed, "shots", task.name, label)
        chosen.append(stream.permutation(rows)[:shots])
    return np.sort(np.concatenate(chosen))


def _kept_deal(labels: Rows, partition: Partition, clients: int, seed: int) -> list[Rows]:
    """Deal, or take the deal of another process: the partitioners' library is slow to import."""
    decided_by: list[str | bytes] = [
        "deal",
        labels.tobytes(),
        partition.model_dump_json(),
        str(clients),
        str(seed),
    ]

    def deal() -> dict[str, torch.Tensor]:
        parts = _deal(labels, partition, clients, seed)
        return {str(client): torch.from_numpy(rows) for client, rows in enumerate(parts)}

    kept = kept_or_made(decided_by, deal)
    return [kept[str(client)].numpy() for client in range(clients)]


def _deal(labels: Rows, partition: Partition, clients: int, seed: int) -> list[Rows]:
    if partition.kind == "dirichlet-labels":
        return deal_label_mixes(labels, partition.alpha, clients, seed)
    return _deal_by_library(labels, partition, clients, seed)


def deal_label_mixes(labels: Rows, alpha: float, clients: int, seed: int) -> list[Rows]:
    """Deal equal shards, each with labels in proportions of its own (Hsu et al., arXiv 1909.06335).

    Client k draws `q_k ~ Dirichlet(alpha·C·p)`, p the labels' shares over all C labels that occur,
    and takes its rows accordingly; where a label has run out it goes on with those of its others
    that are left, and then with a new draw over what is left. The last `len(labels) mod clients`
    rows stay undealt.
    """
    stream = numpy_generator(seed, "label mixes")
    waiting = [stream.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    left: Any = np.array([len(rows) for rows in waiting])
    concentration = alpha * len(left) * left / left.sum()
    shards = []
    for _ in range(clients):
        mix: Any = _mix(concentration, left, stream)
        missing, parts = len(labels) // clients, []
        while missing:
            mix = mix * (left > 0)
            if mix.sum() <= 0:
                mix = _mix(concentration, left, stream)
            taken: Any = np.minimum(stream.multinomial(missing, mix / mix.sum()), left)
            for rows, remaining, count in zip(waiting, left, taken, strict=True):
                parts.append(rows[remaining - count : remaining])
            left, missing = left - taken, missing - int(taken.sum())
        shards.append(np.concatenate(parts).astype(np.int64))
    return shards


def _mix(concentration: Any, left: Any, stream: np.random.Generator) -> Any:
    """Draw proportions over the labels of which rows are left; (C,), summing to 1."""
    mix = np.zeros(len(left))
    there = left > 0
    # A tiny concentration may round every part of a draw to zero: then one label has all.
    draw: Any = stream.dirichlet(concentration[there])
    if not np.isfinite(draw).all() or draw.sum() <= 0:
        draw = stream.multinomial(1, concentration[there] / concentration[there].sum())
    mix[there] = draw
    return mix


def _deal_by_library(labels: Rows, partition: Partition, clients: int, seed: int) -> list[Rows]:
    from datasets import Dataset

    # Shuffled here, since some partitioners deal contiguous rows.
    order = numpy_generator(seed, "order").permutation(len(labels))
    partitioner = _PARTITIONERS[partition.kind](partition, clients, seed % 2**32)
    partitioner.dataset = Dataset.from_dict({"row": order, "label": labels[order]})
    try:
        with warnings.catch_warnings():
            # It warns at length of every draw that it repeats; what counts is whether one succeeds.
            warnings.simplefilter("ignore", UserWarning)
            parts = [partitioner.load_partition(client) for client in range(clients)]
    except ValueError as error:
        raise DataError(
            f"partition.kind = {partition.kind!r} cannot deal {len(labels)} rows to {clients} "
            f"clients with partition.min_examples = {partition.min_examples}; try another "
            f"federation.seed, a larger alpha or a lower minimum ({str(error).splitlines()[0]})"
        ) from None
    return [np.asarray(part["row"], dtype=np.int64) for part in parts]


def _iid(partition: Partition, clients: int, seed: int) -> Any:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(num_partitions=clients)


def _dirichlet(partition: Partition, clients: int, seed: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=partition.alpha,
        min_partition_size=partition.min_examples,
        self_balancing=False,
        seed=seed,
    )


def _classes(partition: Partition, clients: int, seed: int) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(
        num_partitions=clients,
        partition_by="label",
        num_classes_per_partition=partition.classes,
        class_assignment_mode="deterministic",
        shuffle=True,
        seed=seed,
    )


_PARTITIONERS: Mapping[str, Callable[[Partition, int, int], Any]] = {
    "iid": _iid,
    "by-task": _iid,
    "dirichlet": _dirichlet,
    "classes": _classes,
}
