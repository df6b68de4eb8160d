"""Flower's ClientApp: unpack, train, pack. The same for simulation and deployment."""

import functools
import time

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.training import LocalRun, train_locally
from common.adapters import at_rank, load_adapted_backbone, part_of
from common.config import Adapter, Backbone, Experiment, Partition, Task
from common.features import Features, extract_features
from common.messages import Outcome, pack_identity, pack_update, unpack_instruction
from common.seeds import child_seed
from common.shards import deal_shards
from common.tensors import Tensors

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Answer which client this node is."""
    return Message(pack_identity(int(context.node_config["partition-id"])), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's shard as the server's plan says; return what was trained."""
    plan, received = unpack_instruction(message.content)
    experiment = _experiment(plan.experiment)
    # Several clients share the machine: one thread each is fastest, and gives the same sums on
    # any number of workers.
    torch.set_num_threads(1)
    federation, settings = experiment.federation, experiment.train
    shards = deal_shards(experiment.task, experiment.partition, federation.seed)
    task = shards[plan.client].task
    rank = experiment.adapter.rank_of(plan.client)
    model = load_adapted_backbone(
        experiment.backbone, task.kind, experiment.adapter, settings.device
    )
    model.load(at_rank(model.initial((task,), federation.seed), rank) | received, rank, task)
    rows = _features(
        experiment.task,
        experiment.partition,
        federation.seed,
        experiment.backbone,
        experiment.adapter,
        settings.device,
        plan.shards,
    )
    run = LocalRun(
        seed=child_seed(federation.seed, "client", plan.client, "round", plan.round),
        first_step=(plan.round - 1) * plan.steps,
        steps=plan.steps,
        total_steps=federation.rounds * plan.steps,
        trains=plan.trains,
    )
    start = time.perf_counter()
    loss = train_locally(model, rows, run, settings, experiment.copra)
    trained: Tensors = {n: t for n, t in model.state().items() if part_of(n) in plan.trains}
    outcome = Outcome(plan.client, len(rows), loss, time.perf_counter() - start)
    return Message(pack_update(outcome, trained), reply_to=message)


@functools.lru_cache(maxsize=16)
def _experiment(text: str) -> Experiment:
    return Experiment.model_validate_json(text)


@functools.lru_cache(maxsize=256)
def _features(
    task: Task,
    partition: Partition,
    seed: int,
    backbone: Backbone,
    adapter: Adapter,
    device: str,
    owners: tuple[int, ...],
) -> Features:
    """Preprocess the rows of these clients, once a process for all rounds and strategies."""
    shards = [deal_shards(task, partition, seed)[owner] for owner in owners]
    member = shards[0].task
    pooled = member.train.select(np.concatenate([shard.rows for shard in shards]))
    pretrained = load_adapted_backbone(backbone, member.kind, adapter, device).backbone
    return extract_features(pretrained, member.kind, pooled)
