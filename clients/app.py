"""Flower's ClientApp: unpack, train, pack. The same for simulation and deployment."""

import functools
import time
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import psutil
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.evaluation import evaluate_own, judge
from clients.harm import harmed, random_labels
from clients.prompt_norms import answers_of, norm_penalty
from clients.repeats import Training, kept_trainings, training_key
from clients.training import LocalRun, train_locally
from clients.upload import compressed, rank_of, returned
from common.adapters import at_rank
from common.candidates import scores, unpacked
from common.config import Experiment
from common.errors import UpdateRefusedError
from common.features import Features
from common.installed_code import refuse_other_code
from common.lowrank import adapted_modules, factor_names, kaiming_start
from common.memory import Memory, prefixed, under
from common.messages import (
    Outcome,
    Plan,
    pack_holding,
    pack_identity,
    pack_scores,
    pack_update,
    recall,
    remember,
    unpack_instruction,
    unpack_question,
)
from common.models import Model, load_model
from common.residuals import caught_up, is_change, is_residual
from common.rows import load_training_rows
from common.seeds import child_seed
from common.shards import Shard, shard_of
from common.sketches import projections
from common.tails import padded
from common.tensors import Tensors, part_of

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Answer which client this node is."""
    return Message(pack_identity(int(context.node_config["partition-id"])), reply_to=message)


@app.query("holdings")
def count_labels(message: Message, context: Context) -> Message:
    """Answer how many rows of each label this client's own folder has."""
    _refuse_other_code(context)
    client, experiment = unpack_question(message.content)
    counts = _shard(_experiment(experiment), client).label_counts
    return Message(pack_holding(client, counts), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's shard as the server's plan says; return what was trained."""
    client = _Client(message, context)
    plan, experiment = client.plan, client.experiment
    federation = experiment.federation
    model = client.loaded_model(client.own_start())
    start_state = model.state()
    rows = client.training_rows()
    run = LocalRun(
        seed=child_seed(federation.seed, "client", plan.client, "round", plan.round),
        first_step=(plan.round - 1) * plan.steps,
        steps=plan.steps,
        total_steps=federation.rounds * plan.steps,
        trains=plan.trains,
        round=plan.round,
        rounds=federation.rounds,
        rules=plan.rules,
        rank=rank_of(client.held),
    )
    startup = client.seconds_so_far()
    answers = answers_of(model, rows, run, experiment) if plan.rules.probes else {}
    training = client.train(model, rows, run)
    end_state = harmed(experiment.harm, plan.client, start_state, training.state)
    upload = returned(
        plan,
        federation.seed,
        client.scale,
        client.held,
        start_state,
        end_state,
        client.memory,
        training.trained,
    )
    tensors, own = compressed(
        upload.tensors, client.held, upload.own, experiment.wire.up, plan.rules.steady
    )
    # An update that diverged is refused by the server; nothing of it may stay here either.
    client.remember(own if _is_finite(own) else client.memory.own)
    outcome = replace(training.outcome, startup=startup)
    return Message(pack_update(outcome, {**tensors, **answers}), reply_to=message)


@app.train("project")
def project(message: Message, context: Context) -> Message:
    """Answer the server's second question of a round: project what was trained on its basis."""
    plan, bases = unpack_instruction(message.content)
    memory = recall(context.state, plan.client, plan.run)
    experiment = _experiment(plan.experiment)
    scale = experiment.adapter.scale(experiment.adapter.rank_of(plan.client))
    tensors = projections(under("pending/", memory.own), scale, bases)
    return Message(pack_update(Outcome(plan.client, 1, 0.0, 0.0), tensors), reply_to=message)


@app.train("score")
def score(message: Message, context: Context) -> Message:
    """Score candidates for the next model on some of this client's rows; scores alone go back."""
    plan, question = unpack_instruction(message.content)
    candidates = unpacked(question)
    tensors = scores(judge(candidates, _experiment(plan.experiment), plan))
    return Message(pack_update(Outcome(plan.client, 1, 0.0, 0.0), tensors), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score this client's own model on held-out rows, weighted like its own shard.

    Nothing is remembered: how often a run is scored must not change what training has to send.
    """
    client = _Client(message, context)
    model = client.loaded_model()
    accuracy, loss = evaluate_own(model, client.experiment, client.shard)
    return Message(pack_scores(client.plan.client, accuracy, loss), reply_to=message)


class _Client:
    """One client in one exchange: what it was told, what it remembers, where it starts from.

    Raises:
        UpdateRefusedError: it no longer holds what the server believes it does, or its base model
            is another one than the server's.
    """

    def __init__(self, message: Message, context: Context) -> None:
        self._began = time.time()
        if _is_deployed(context):
            # Every message has a process of its own, which has imported all this before.
            self._began = psutil.Process().create_time()
        _refuse_other_code(context)
        self.plan, received = unpack_instruction(message.content)
        self.experiment = _experiment(self.plan.experiment)
        # Several clients share the machine: one thread each is fastest, and gives the same sums on
        # any number of workers.
        torch.set_num_threads(1)
        self._context = context
        self.memory = recall(context.state, self.plan.client, self.plan.run)
        if self.plan.since and self.memory.parcel != self.plan.since:
            raise UpdateRefusedError(
                f"client {self.plan.client} no longer holds parcel {self.plan.since}; "
                "it has to be sent everything again"
            )
        self.shard = _shard(self.experiment, self.plan.client)
        self.rank = self.experiment.adapter.rank_of(self.plan.client)
        self.scale = self.experiment.adapter.scale(self.rank)
        model = self._model()
        _refuse_other_base(self.plan, model)
        self.held = self._unpacked(received, model)

    def seconds_so_far(self) -> float:
        """Return the seconds since this exchange, or its process, began."""
        return max(0.0, time.time() - self._began)

    def _model(self) -> Model:
        experiment = self.experiment
        kind, device = self.shard.task.kind, experiment.train.device
        return load_model(experiment.backbone, kind, experiment.adapter, device)

    def _unpacked(self, received: Tensors, model: Model) -> Tensors:
        """Return the whole model that this parcel stands for."""
        plan = self.plan
        known = self.memory.held if plan.since else {}
        drawn = self._drawn(model) if plan.fresh else {}
        sent = {
            name: tensor.float() if tensor.dtype == torch.float16 else tensor
            for name, tensor in received.items()
            if not is_change(name)
        }
        kept = {n: t for n, t in known.items() if not is_residual(n)}
        return {**kept, **drawn, **sent, **caught_up(known, received)}

    def _drawn(self, model: Model) -> Tensors:
        """Return the parts that are still as everyone draws them."""
        seed = self.experiment.federation.seed
        start = model.initial((self.shard.task,), seed, self.plan.restart)
        fresh = self.plan.fresh
        return {n: t for n, t in at_rank(start, self.rank).items() if part_of(n) in fresh}

    def own_start(self) -> Tensors:
        """Return the factors A that this client draws for itself; none where all start alike."""
        federation = self.experiment.federation
        if federation.start == "common" or self.plan.round > 1:
            return {}
        seed = child_seed(federation.seed, "start of client", self.plan.client)
        drawn = {}
        for module in adapted_modules(n for n in self.held if "/" not in n):
            _, name_A = factor_names(module)
            rank, features = self.held[name_A].shape
            drawn[name_A] = kaiming_start(rank, features, module, seed)
        return drawn

    def loaded_model(self, in_place: Tensors = MappingProxyType({})) -> Model:
        """Return the model, loaded with what was sent and, over it, what this client keeps.

        `in_place` stands in for what was sent of the same names.
        """
        model = self._model()
        whole = {n: t for n, t in self.held.items() if "/" not in n}
        whole |= {**in_place, **under("kept/", self.memory.own)}
        model.load(padded(whole, self.rank), self.rank, self.shard.task)
        return model

    def training_rows(self) -> Features:
        """Return the rows that the plan wants trained on: this client's, or a pool of several."""
        experiment = self.experiment
        shards = [_shard(experiment, owner) for owner in self.plan.shards]
        pooled = np.concatenate([shard.rows for shard in shards])
        rows = load_training_rows(
            experiment.task,
            self.shard.task.name,
            experiment.backbone,
            experiment.adapter,
            experiment.train.device,
            self.shard.site,
        )
        chosen = rows.select(torch.from_numpy(pooled))
        if experiment.harm.kind != "random-labels":
            return chosen
        sizes = [len(shard.rows) for shard in shards]
        harmful, classes = experiment.harm.clients, len(self.shard.task.labels)
        labels = [
            random_labels(part, classes, experiment.federation.seed, owner)
            if owner in harmful
            else part
            for owner, part in zip(self.plan.shards, torch.split(chosen.labels, sizes), strict=True)
        ]
        return replace(chosen, labels=torch.cat(labels))

    def train(self, model: Model, rows: Features, run: LocalRun) -> Training:
        """Train the loaded model in place, unless this very training was done before."""
        experiment, plan, correction = self.experiment, self.plan, self.control_correction()

        def train() -> Training:
            start = time.perf_counter()
            penalty = norm_penalty(model, run, experiment.nemesis, under("weights/", self.held))
            trained = train_locally(
                model, rows, run, experiment.train, experiment.copra, correction, penalty
            )
            seconds = time.perf_counter() - start
            asked, chosen = (penalty.asked, penalty.chosen) if penalty else ({}, {})
            outcome = Outcome(
                plan.client, len(rows), trained.loss, seconds, _listed(asked), _listed(chosen)
            )
            return Training(model.state(), trained, outcome)

        given = {**self.held, **prefixed("own/", self.memory.own), **prefixed("c/", correction)}
        given |= prefixed("start/", model.state())
        key = training_key(experiment, plan.client, plan.shards, run, given)
        return kept_trainings().get_or_make(key, train)

    def control_correction(self) -> Tensors:
        """Return SCAFFOLD's `c - c_k`; nothing for other methods."""
        own = under("control/", self.memory.own)
        common = under("control/", self.held)
        return {n: c - own[n] if n in own else c for n, c in common.items()}

    def remember(self, own: Tensors) -> None:
        """Keep the model of this parcel, and what is the client's own."""
        memory = Memory(self.plan.parcel, self.held, own)
        remember(self._context.state, self.plan.client, self.plan.run, memory)


def _listed(counts: Tensors) -> dict[str, list[int]]:
    return {name: [int(n) for n in count] for name, count in counts.items()}


def _is_deployed(context: Context) -> bool:
    return bool(context.run_config.get("code"))


def _refuse_other_code(context: Context) -> None:
    if _is_deployed(context):
        refuse_other_code(str(context.run_config["code"]), "this site")


def _refuse_other_base(plan: Plan, model: Model) -> None:
    """Refuse to train on another base: the server would add the update to a model it is not of."""
    if model.base_fingerprint != plan.base:
        raise UpdateRefusedError(
            f"client {plan.client} has another base model ({model.base_fingerprint}) than the "
            f"server ({plan.base}): give both the same weights; the same backbone.path or hub id "
            "may lead to others"
        )


def _shard(experiment: Experiment, client: int) -> Shard:
    return shard_of(experiment.task, experiment.partition, experiment.federation.seed, client)


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@functools.lru_cache(maxsize=16)
def _experiment(text: str) -> Experiment:
    return Experiment.model_validate_json(text)
