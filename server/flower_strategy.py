"""The one bridge between our strategies and Flower's strategy hooks.

Nothing of Flower's own sampling or averaging is inherited: the cohort is a function of (seed,
round) over client numbers, replies are reduced in client order, and a reply that is late, failed
or refused is named in the record while the round goes on without it.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategyBase

from common.adapters import is_residual, part_of
from common.config import Experiment
from common.errors import FedcopraError, UpdateRefusedError
from common.messages import (
    Outcome,
    Plan,
    add_bytes,
    count_bytes,
    pack_instruction,
    unpack_identity,
    unpack_update,
)
from common.metrics import Scores
from common.seeds import numpy_generator
from common.tensors import Tensors, check_update, digest, only
from server.evaluation import Evaluator
from strategies import resolve, setting_of
from strategies.aggregation_error import aggregation_error
from strategies.base import Assignment, Client, Served, Update, data_weights

OnRound = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcomes:
    """What a finished run leaves: rows for the record, and the served models."""

    start: Scores
    rounds: list[dict[str, Any]]
    served: tuple[Served, ...]
    digest: str


@dataclass
class _Sent:
    """One message of the round in progress."""

    client: Client
    message: Message
    tensors: Tensors


@dataclass
class _Round:
    """What is gathered about the round in progress."""

    began: float
    sent: list[_Sent] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    pushed: float = 0.0


def run_federation(
    grid: Grid,
    experiment: Experiment,
    evaluator: Evaluator,
    nodes: Mapping[int, int],
    on_round: OnRound,
) -> Outcomes:
    """Run every round of `experiment` over `nodes`, which maps clients to Flower's node ids.

    Raises:
        FedcopraError: no client's update has ever been accepted.
    """
    bridge = FedcopraStrategy(experiment, evaluator, nodes, on_round)
    bridge.start(
        grid,
        initial_arrays=ArrayRecord(),
        num_rounds=experiment.federation.rounds,
        timeout=experiment.federation.timeout,
        evaluate_fn=bridge.evaluate,
    )
    return bridge.outcomes()


def find_clients(grid: Grid, wanted: int, timeout: float, patience: float = 60.0) -> dict[int, int]:
    """Return `{client: node id}` once `wanted` nodes answer; ask each which client it is.

    Flower starts the server before its nodes are registered, and node ids are random: the client
    number is what makes a cohort reproducible.

    Raises:
        FedcopraError: too few nodes are connected, or some do not answer.
    """
    ids = _wait_for_nodes(grid, wanted, patience)
    if len(ids) < wanted:
        raise FedcopraError(
            f"partition.clients = {wanted}, but only {len(ids)} nodes are connected after "
            f"{patience:.0f} s; start {wanted}, each with its own partition-id"
        )
    questions = [Message(RecordDict(), dst_node_id=i, message_type="query") for i in ids]
    # The first answers wait for the clients' processes to start: give them a round's time.
    replies = list(grid.send_and_receive(questions, timeout=timeout))
    found = {unpack_identity(r.content): r.metadata.src_node_id for r in replies if r.has_content()}
    if missing := sorted(set(range(wanted)) - set(found)):
        reasons = [_last_line(str(r.error.reason)) for r in replies if r.has_error()]
        why = f": {reasons[0]}" if reasons else ""
        raise FedcopraError(f"clients {missing} of {wanted} did not say who they are{why}")
    return found


def share_nodes(grid: Grid, wanted: int, patience: float = 3.0) -> dict[int, int]:
    """Let the nodes there are play `wanted` clients between them.

    Right in a simulation, where any node can make any shard.

    Raises:
        FedcopraError: no node is connected.
    """
    ids = sorted(_wait_for_nodes(grid, wanted, patience))
    if not ids:
        raise FedcopraError(f"no node is connected after {patience:.0f} s")
    return {client: ids[client % len(ids)] for client in range(wanted)}


def _wait_for_nodes(grid: Grid, wanted: int, patience: float) -> list[int]:
    deadline = time.monotonic() + patience
    while len(ids := list(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return ids


class FedcopraStrategy(FlowerStrategyBase):
    """Drives one of our strategies through Flower's `start`."""

    def __init__(
        self,
        experiment: Experiment,
        evaluator: Evaluator,
        nodes: Mapping[int, int],
        on_round: OnRound,
    ) -> None:
        self._experiment = experiment
        self._text = experiment.model_dump_json()
        self._evaluator = evaluator
        self._nodes = nodes
        self._on_round = on_round
        self._strategy = resolve(experiment)
        self._setting = setting_of(experiment)
        kept = ("lora_A", "lora_B") + (("head",) if experiment.adapter.train_head else ())
        self._trains = tuple(part for part in self._strategy.trains if part in kept)
        self._state: Tensors = self._strategy.start(evaluator.initial(experiment.federation.seed))
        self._accepted = 0
        served_rank = self._strategy.serve(self._state)[0].rank
        self._probe = evaluator.probe(self._strategy.probe_examples, served_rank)
        self._round = _Round(time.perf_counter())
        self._start_scores: Scores | None = None
        self._rows: list[dict[str, Any]] = []

    # --- Flower's hooks ------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort and write each client's message."""
        self._round = _Round(time.perf_counter())
        cohort = choose_cohort(self._experiment, server_round)
        for assignment in self._strategy.assign(cohort):
            self._round.sent.append(self._instruct(assignment, server_round))
        down: dict[str, int] = {}
        for sent in self._round.sent:
            payload = self._payload(sent.tensors)
            down = add_bytes(down, count_bytes(sent.message.content, payload))
        up = {"protocol": 0, "total": 0}
        self._round.row = {"round": server_round, "bytes": {"up": up, "down": down}}
        self._round.pushed = time.perf_counter()
        return [sent.message for sent in self._round.sent]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check what arrived, merge it, and note all that happened."""
        replied = time.perf_counter()
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        clients, updates = [], []
        for sent in self._round.sent:
            reply = by_question.get(sent.message.metadata.message_id)
            status, update = self._receive(sent, reply)
            clients.append(status)
            updates += [update] if update else []
        merging = time.perf_counter()
        error = None
        diagnostics: dict[str, Any] = {"decision": "no update was accepted: the model stays"}
        if updates:
            merged = self._strategy.merge(self._state, updates, self._probe)
            self._state, diagnostics = merged.state, dict(merged.diagnostics)
            served = self._strategy.serve(self._state)
            error = aggregation_error(served, updates, self._setting)
        self._accepted += len(updates)
        if not self._accepted:
            # Nothing has been learned: better to stop than to report the start as a result.
            raise FedcopraError(
                f"no update was accepted in round {server_round}; client "
                f"{clients[0]['client']} {clients[0]['status']}: {clients[0]['reason']}"
            )
        self._note_weights(clients, updates, diagnostics.pop("weights", None))
        self._round.row |= {
            "aggregation_error": error,
            "clients": clients,
            "merge": diagnostics,
            "seconds": {
                "training": sum(client["seconds"] or 0.0 for client in clients),
                "waiting": replied - self._round.pushed,
                "merge": time.perf_counter() - merging,
            },
        }
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client: the served model is evaluated on the server."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """There is nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Say nothing: the record says it all."""

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score the served model; round 0 is the common start."""
        began = time.perf_counter()
        scores = self._evaluator.evaluate(self._strategy.serve(self._state))
        if server_round == 0:
            self._start_scores = scores
            return None
        seconds = self._round.row["seconds"]
        seconds["evaluation"] = time.perf_counter() - began
        seconds["wall"] = time.perf_counter() - self._round.began
        row = self._round.row | scores.as_record()
        self._rows.append(row)
        self._on_round(row)
        return MetricRecord({"accuracy": scores.accuracy, "loss": scores.loss})

    def outcomes(self) -> Outcomes:
        """Return what the run leaves."""
        if self._start_scores is None:
            raise RuntimeError("the run has not started")
        served = tuple(self._strategy.serve(self._state))
        return Outcomes(self._start_scores, self._rows, served, digest_of(served))

    # --- one client ----------------------------------------------------------------------------

    def _instruct(self, assignment: Assignment, server_round: int) -> _Sent:
        client = self._setting.clients[assignment.client]
        tensors = self._strategy.send(self._state, client)
        plan = Plan(
            experiment=self._text,
            client=client.client,
            shards=assignment.shards,
            round=server_round,
            steps=self._experiment.train.local_steps * assignment.steps_factor,
            trains=self._trains,
        )
        message = Message(
            pack_instruction(plan, self._payload(tensors)),
            dst_node_id=self._nodes[client.client],
            message_type="train",
        )
        return _Sent(client, message, tensors)

    def _payload(self, tensors: Tensors) -> Tensors:
        """Return what has to travel: what is trained, and a base that has changed."""
        return only(tensors, {n for n in tensors if part_of(n) in self._trains or is_residual(n)})

    def _receive(self, sent: _Sent, reply: Message | None) -> tuple[dict[str, Any], Update | None]:
        status: dict[str, Any] = {
            "client": sent.client.client,
            "status": "ok",
            "reason": None,
            "num_examples": None,
            "loss": None,
            "seconds": None,
            "weight": 0.0,
        }
        if reply is None:
            timeout = self._experiment.federation.timeout
            return status | {"status": "missing", "reason": f"no reply within {timeout} s"}, None
        if reply.has_error():
            reason = reply.error.reason or f"error {reply.error.code}"
            return status | {"status": "failed", "reason": _last_line(reason)}, None
        try:
            outcome, tensors = unpack_update(reply.content)
            up = self._round.row["bytes"]["up"]
            self._round.row["bytes"]["up"] = add_bytes(up, count_bytes(reply.content, tensors))
            self._check(sent, outcome, tensors)
        except UpdateRefusedError as error:
            return status | {"status": "refused", "reason": str(error)}, None
        status |= {
            "num_examples": outcome.num_examples,
            "loss": outcome.loss if math.isfinite(outcome.loss) else None,
            "seconds": outcome.seconds,
        }
        complete = {**sent.tensors, **tensors}
        return status, Update(sent.client, outcome.num_examples, complete, sent.tensors)

    def _check(self, sent: _Sent, outcome: Outcome, tensors: Tensors) -> None:
        if outcome.client != sent.client.client:
            raise UpdateRefusedError(f"it says it is client {outcome.client}")
        expected = {
            name: tensor.shape
            for name, tensor in sent.tensors.items()
            if part_of(name) in self._trains
        }
        check_update(tensors, expected)
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise UpdateRefusedError(f"{name} has dtype {tensor.dtype}, not torch.float32")

    def _note_weights(
        self,
        clients: list[dict[str, Any]],
        updates: list[Update],
        chosen: Mapping[str, float] | None,
    ) -> None:
        by_data = zip(updates, data_weights(updates), strict=True) if updates else ()
        weights = chosen or {str(update.client.client): w for update, w in by_data}
        for client in clients:
            client["weight"] = weights.get(str(client["client"]), 0.0)


def choose_cohort(experiment: Experiment, server_round: int) -> list[int]:
    """Return the clients of a round, in order; a function of (seed, round) alone."""
    clients = experiment.partition.clients
    generator = numpy_generator(experiment.federation.seed, "cohort", server_round)
    size = experiment.federation.cohort_size(clients)
    return sorted(int(client) for client in generator.choice(clients, size, replace=False))


def digest_of(served: Iterable[Served]) -> str:
    """Return the digest of all served models together."""
    return digest(
        {
            f"model {index}: {name}": tensor
            for index, model in enumerate(served)
            for name, tensor in model.tensors.items()
        }
    )


def _last_line(reason: str) -> str:
    """Return the line that names the error: Ray puts a whole traceback before it."""
    lines = [line.strip() for line in reason.replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else reason
