"""The one bridge between our strategies and Flower's strategy hooks.

Nothing of Flower's own sampling or averaging is inherited: the cohort is a function of (seed,
round) over client numbers, replies are reduced in client order, and a reply that is late, failed
or refused is named in the record while the round goes on without it.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategyBase

from common.adapters import at_rank
from common.candidates import unpacked
from common.compression import Format
from common.config import Experiment
from common.errors import ConfigError, FedcopraError, UpdateRefusedError
from common.messages import (
    Plan,
    add_bytes,
    count_bytes,
    pack_instruction,
    unpack_identity,
    unpack_scores,
    unpack_update,
)
from common.metrics import Scores
from common.returns import (
    Shapes,
    read_update,
    wanted_projections,
    wanted_scores,
    wanted_update,
)
from common.rules import LocalRules
from common.seeds import numpy_generator
from common.shards import Holding
from common.tensors import Tensors, digest
from server.checkpoints import Checkpoints, Progress
from server.evaluation import Evaluator
from server.holdings import find_holdings
from server.parcels import Parcel, Parcels
from server.replies import last_line
from strategies import resolve, setting_of
from strategies.aggregation_error import aggregation_error
from strategies.base import (
    Assignment,
    Client,
    Served,
    Strategy,
    Update,
    data_weights,
    for_task,
    restarts_so_far,
)
from strategies.prompt_drift import prompt_drift

OnRound = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcomes:
    """What a finished run leaves: rows for the record, the served models, the last updates."""

    start: Scores
    rounds: list[dict[str, Any]]
    served: tuple[Served, ...]
    digest: str
    updates: tuple[Update, ...] = ()
    holdings: tuple[Holding, ...] = ()


@dataclass
class _Sent:
    """One message of the round in progress."""

    client: Client
    plan: Plan
    parcel: Parcel
    message: Message


@dataclass
class _Round:
    """What is gathered about the round in progress."""

    began: float
    sent: list[_Sent] = field(default_factory=list)
    asked: list[_Sent] = field(default_factory=list)
    client_bytes: dict[int, dict[str, dict[str, int]]] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    pushed: float = 0.0


def run_federation(
    grid: Grid,
    experiment: Experiment,
    evaluator: Evaluator,
    nodes: Mapping[int, int],
    on_round: OnRound,
    *,
    remembering: bool = True,
    checkpoints: Checkpoints | None = None,
) -> Outcomes:
    """Run every round of `experiment` over `nodes`, which maps clients to Flower's node ids.

    `remembering` says that every client has a node, and so a memory, of its own. With `checkpoints`
    the run goes on from where an earlier one of it was, if there is one.

    Raises:
        FedcopraError: no client's update has ever been accepted.
    """
    holdings = find_holdings(grid, experiment, nodes, evaluator.tasks)
    bridge = FedcopraStrategy(
        experiment,
        evaluator,
        nodes,
        holdings,
        on_round,
        remembering=remembering,
        checkpoints=checkpoints,
    )
    bridge.start(
        grid,
        initial_arrays=ArrayRecord(),
        num_rounds=bridge.rounds_to_go,
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
        reasons = [last_line(str(r.error.reason)) for r in replies if r.has_error()]
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
        holdings: tuple[Holding, ...],
        on_round: OnRound,
        *,
        remembering: bool,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._experiment = experiment
        self._text = experiment.model_dump_json()
        # Tells apart runs of one experiment in the memory of clients; nothing is drawn from it.
        self._run = uuid4().hex
        self._evaluator = evaluator
        self._nodes = nodes
        self._on_round = on_round
        self._strategy = resolve(experiment)
        self._setting = setting_of(experiment)
        seed = experiment.federation.seed
        self._holdings = holdings
        self._judges = [holdings[client] for client in experiment.members]
        if not remembering:
            _refuse_without_memory(experiment, self._strategy)
        self._parcels = Parcels(self._drawn, experiment.wire.down, remembering)
        self._drawn_starts: dict[int, Tensors] = {}
        self._state: Tensors = self._strategy.start(evaluator.initial(seed))
        self._accepted = 0
        served_rank = self._strategy.serve(self._state)[0].rank
        self._probe = evaluator.probe(self._strategy.probe_examples, served_rank)
        self._round = _Round(time.perf_counter())
        self._grid: Grid | None = None
        self._own_scores: list[Scores] = []
        self._start_scores: Scores | None = None
        self._rows: list[dict[str, Any]] = []
        self._last_updates: tuple[Update, ...] = ()
        # Where clients keep something of their own, a run cannot go on without them.
        self._checkpoints = None if needs_memory(experiment, self._strategy) else checkpoints
        if self._checkpoints and (progress := self._checkpoints.load()):
            self._state, self._accepted = progress.state, progress.accepted
            self._rows, self._start_scores = list(progress.rows), progress.start
        self._earlier_rounds = len(self._rows)

    @property
    def rounds_to_go(self) -> int:
        """Return how many rounds an earlier run has left; Flower counts these from 1."""
        return self._experiment.federation.rounds - self._earlier_rounds

    # --- Flower's hooks ------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort and write each client's message."""
        server_round += self._earlier_rounds
        self._round, self._grid = _Round(time.perf_counter()), grid
        cohort = choose_cohort(self._experiment, server_round)
        trains = self._trained_parts()
        for assignment in self._strategy.assign(cohort):
            self._round.sent.append(self._instruct(assignment, server_round, trains, "train"))
        nothing = {"protocol": 0, "total": 0}
        self._round.row = {"round": server_round, "bytes": {"up": nothing, "down": nothing}}
        self._round.client_bytes = {sent.client.client: {} for sent in self._round.sent}
        for sent in self._round.sent:
            self._charge(sent.client, "down", sent.message)
        self._round.pushed = time.perf_counter()
        return [sent.message for sent in self._round.sent]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check what arrived, merge it, and note all that happened."""
        server_round += self._earlier_rounds
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        clients, updates = [], []
        for sent in self._round.sent:
            reply = by_question.get(sent.message.metadata.message_id)
            status, update = self._receive(sent, reply)
            clients.append(status)
            updates += [update] if update else []
        if updates and self._strategy.follow_up:
            updates = self._follow_up(updates, clients)
        replied = time.perf_counter()
        errors: dict[str, Any] = {
            "aggregation_error": None,
            "factor_covariance": None,
            "prompts": None,
        }
        diagnostics: dict[str, Any] = {"decision": "no update was accepted: the model stays"}
        if updates:
            merged = self._strategy.merge(self._state, updates, self._probe)
            self._state, diagnostics = merged.state, dict(merged.diagnostics)
            errors |= self._errors(updates)
            drifts = prompt_drift(self._strategy.serve(self._state), updates)
            errors["prompts"] = {name: asdict(drift) for name, drift in drifts.items()} or None
        if server_round == self._experiment.federation.rounds and self._sees_deltas():
            self._last_updates = tuple(updates[: self._experiment.federation.keep_updates])
        self._accepted += len(updates)
        if not self._accepted:
            # Nothing has been learned: better to stop than to report the start as a result.
            raise FedcopraError(
                f"no update was accepted in round {server_round}; client "
                f"{clients[0]['client']} {clients[0]['status']}: {clients[0]['reason']}"
            )
        self._note_weights(clients, updates, diagnostics.pop("weights", None))
        for client in clients:
            client["bytes"] = self._round.client_bytes[client["client"]]
        self._round.row |= {
            **errors,
            "clients": clients,
            "merge": diagnostics,
            "seconds": {
                "startup": sum(client["startup"] or 0.0 for client in clients),
                "training": sum(client["seconds"] or 0.0 for client in clients),
                "waiting": replied - self._round.pushed,
                "merge": time.perf_counter() - replied,
            },
        }
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client for the score of its own model; where there is one model, ask nobody.

        These parcels are not noted as arrived, since clients forget them: scoring has bytes of its
        own, and saves training none.
        """
        server_round += self._earlier_rounds
        self._own_scores, self._round.asked = [], []
        if not (self._strategy.personalised and self._is_due(server_round)):
            return []
        for client in (self._setting.clients[k] for k in self._experiment.members):
            alone = Assignment(client.client, (client.client,))
            sent = self._instruct(alone, server_round, self._trained_parts(), "evaluate")
            self._round.asked.append(sent)
            down = count_bytes(sent.message.content)
            scoring = self._round.row["bytes"].get("evaluation", {})
            self._round.row["bytes"]["evaluation"] = add_bytes(scoring, down)
        return [sent.message for sent in self._round.asked]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Collect what clients say of their own models."""
        server_round += self._earlier_rounds
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        for sent in self._round.asked:
            reply = by_question.get(sent.message.metadata.message_id)
            if reply is None or reply.has_error():
                why = last_line(str(reply.error.reason)) if reply else "no reply"
                raise FedcopraError(
                    f"client {sent.client.client} could not score its own model in round "
                    f"{server_round}: {why}; without it the mean over clients means nothing"
                )
            _, accuracy, loss = unpack_scores(reply.content)
            self._own_scores.append(Scores(accuracy, loss))
        return None

    def summary(self) -> None:
        """Say nothing: the record says it all."""

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score the served model; round 0 is the common start."""
        began = time.perf_counter()
        if server_round == 0:
            if self._start_scores is None:
                self._start_scores = self._evaluator.evaluate(self._served(), self._judges)
            return None
        server_round += self._earlier_rounds
        scores = self._scores() if self._is_due(server_round) else _NOT_SCORED
        seconds = self._round.row["seconds"]
        seconds["evaluation"] = time.perf_counter() - began
        seconds["wall"] = time.perf_counter() - self._round.began
        row = self._round.row | scores
        self._rows.append(row)
        if self._checkpoints and self._start_scores:
            self._checkpoints.save(
                Progress(self._state, tuple(self._rows), self._start_scores, self._accepted)
            )
        self._on_round(row)
        return None

    def outcomes(self) -> Outcomes:
        """Return what the run leaves."""
        if self._start_scores is None:
            raise RuntimeError("the run has not started")
        served = tuple(self._served())
        return Outcomes(
            self._start_scores,
            self._rows,
            served,
            digest_of(served),
            self._last_updates,
            self._holdings,
        )

    # --- one round -----------------------------------------------------------------------------

    def _trained_parts(self) -> tuple[str, ...]:
        trains = self._strategy.trains(self._state)
        head = self._experiment.adapter.train_head
        return tuple(part for part in trains if head or part != "head")

    def _is_due(self, server_round: int) -> bool:
        federation = self._experiment.federation
        return server_round % federation.evaluate_every == 0 or server_round == federation.rounds

    def _scores(self) -> dict[str, Any]:
        if not self._strategy.personalised:
            return self._evaluator.evaluate(self._served(), self._judges).as_record()
        count = len(self._own_scores)
        return {
            **_NOT_SCORED,
            "own_accuracy": sum(scores.accuracy for scores in self._own_scores) / count,
            "own_loss": sum(scores.loss for scores in self._own_scores) / count,
        }

    def _served(self) -> list[Served]:
        """Return the served models, without those of clients that take no part."""
        members = (None, *self._experiment.members)
        return [model for model in self._strategy.serve(self._state) if model.client in members]

    def _errors(self, updates: Sequence[Update]) -> dict[str, Any]:
        """Measure what merging lost; not where the server never sees the clients' deltas."""
        if not self._sees_deltas():
            return {}
        served = self._strategy.serve(self._state)
        measured = aggregation_error(served, updates, self._setting)
        if measured is None:
            return {}
        return {
            "aggregation_error": measured.error.total,
            "factor_covariance": measured.covariance.total,
            "modules": {
                module: {
                    "aggregation_error": error,
                    "factor_covariance": measured.covariance.modules[module],
                }
                for module, error in measured.error.modules.items()
            },
        }

    def _sees_deltas(self) -> bool:
        """Say whether clients send the server all of what they have trained."""
        return not (self._strategy.rules.keeps or self._strategy.rules.sketch)

    def _follow_up(self, updates: list[Update], clients: list[dict[str, Any]]) -> list[Update]:
        """Ask the second question of a round, and lay question and answers over the updates."""
        follow_up, grid = self._strategy.follow_up, self._grid
        if follow_up is None or grid is None:
            raise RuntimeError("there is no second question, or no round in progress")
        question = follow_up.ask(self._state, updates)
        plans = {sent.client.client: sent.plan for sent in self._round.sent}
        messages = {}
        for client in follow_up.asked(self._state, updates):
            messages[client] = Message(
                pack_instruction(plans[client], question),
                dst_node_id=self._nodes[client],
                message_type=f"train.{follow_up.kind}",
            )
            self._charge(self._setting.clients[client], "down", messages[client])
        replies = grid.send_and_receive(
            messages.values(), timeout=self._experiment.federation.timeout
        )
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        answered = []
        for update in updates:
            message = messages.get(update.client.client)
            if message is None:
                answered.append(update)
                continue
            reply = by_question.get(message.metadata.message_id)
            wanted = _WANTED_ANSWERS[follow_up.kind](update, self._strategy.rules, question)
            status, tensors = self._read(update.client, reply, wanted, update.sent, "float32")
            if tensors is not None:
                complete = {**update.tensors, **question, **tensors}
                answered.append(replace(update, tensors=complete))
            elif follow_up.indispensable:
                row = next(row for row in clients if row["client"] == update.client.client)
                row |= {key: status[key] for key in ("status", "reason")}
            else:
                answered.append(update)
        return answered

    # --- one client ----------------------------------------------------------------------------

    def _instruct(
        self, assignment: Assignment, server_round: int, trains: tuple[str, ...], kind: str
    ) -> _Sent:
        client = self._setting.clients[assignment.client]
        model = self._strategy.send(self._state, client)
        restart = restarts_so_far(self._state)
        parcel = self._parcels.pack(client, model, self._state, restart)
        plan = Plan(
            experiment=self._text,
            run=self._run,
            client=client.client,
            shards=assignment.shards,
            round=server_round,
            steps=self._experiment.train.local_steps * assignment.steps_factor,
            trains=trains,
            parcel=parcel.number,
            since=parcel.since,
            fresh=parcel.fresh,
            restart=restart,
            base=self._evaluator.model.base_fingerprint,
            rules=self._strategy.rules,
        )
        message = Message(
            pack_instruction(plan, parcel.payload),
            dst_node_id=self._nodes[client.client],
            message_type=kind,
        )
        return _Sent(client, plan, parcel, message)

    def _drawn(self, client: Client, restart: int) -> Tensors:
        """Return the start that a client draws for itself."""
        if restart not in self._drawn_starts:
            seed = self._experiment.federation.seed
            self._drawn_starts = {restart: self._evaluator.initial(seed, restart)}
        return at_rank(for_task(self._drawn_starts[restart], client.task), client.rank)

    def _charge(self, client: Client, direction: str, message: Message) -> None:
        counted = count_bytes(message.content)
        for ledger in (self._round.row["bytes"], self._round.client_bytes[client.client]):
            ledger[direction] = add_bytes(ledger.get(direction, {}), counted)

    def _receive(self, sent: _Sent, reply: Message | None) -> tuple[dict[str, Any], Update | None]:
        if reply is None or reply.has_error():
            self._parcels.lost(sent.client.client)
        else:
            self._parcels.arrived(sent.client.client, sent.parcel)
        model = sent.parcel.model
        wanted = wanted_update(model, sent.plan.trains, self._strategy.rules)
        form = self._experiment.wire.up
        status, tensors = self._read(sent.client, reply, wanted, model, form)
        if tensors is None:
            return status, None
        complete = {**model, **tensors}
        return status, Update(sent.client, status["num_examples"], complete, model)

    def _read(
        self,
        client: Client,
        reply: Message | None,
        wanted: Sequence[Shapes],
        model: Tensors,
        form: Format,
    ) -> tuple[dict[str, Any], Tensors | None]:
        """Return a client's row of the record, and what it sent if that is as wanted."""
        status: dict[str, Any] = {
            "client": client.client,
            "status": "ok",
            "reason": None,
            "num_examples": None,
            "loss": None,
            "startup": None,
            "seconds": None,
            "reused": False,
            "weight": 0.0,
        }
        if reply is None:
            timeout = self._experiment.federation.timeout
            return status | {"status": "missing", "reason": f"no reply within {timeout} s"}, None
        if reply.has_error():
            reason = reply.error.reason or f"error {reply.error.code}"
            return status | {"status": "failed", "reason": last_line(reason)}, None
        try:
            outcome, received = unpack_update(reply.content)
            self._charge(client, "up", reply)
            if outcome.client != client.client:
                raise UpdateRefusedError(f"it says it is client {outcome.client}")
            tensors = read_update(received, wanted, model, form)
        except UpdateRefusedError as error:
            return status | {"status": "refused", "reason": str(error)}, None
        return status | {
            "num_examples": outcome.num_examples,
            "loss": outcome.loss if math.isfinite(outcome.loss) else None,
            "startup": outcome.startup,
            "seconds": outcome.seconds,
            "reused": outcome.reused,
            **({"asked": outcome.asked, "chosen": outcome.chosen} if outcome.asked else {}),
        }, tensors

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


_WANTED_ANSWERS: Mapping[str, Callable[[Update, LocalRules, Tensors], Sequence[Shapes]]] = {
    "project": lambda update, rules, _: wanted_projections(update.sent, rules),
    "score": lambda _, __, question: wanted_scores(len(unpacked(question))),
}

_NOT_SCORED = {"accuracy": None, "loss": None, "own_accuracy": None, "own_loss": None}


def needs_memory(experiment: Experiment, strategy: Strategy) -> str:
    """Say what clients have to remember from round to round, or nothing if they need not."""
    rules = strategy.rules
    if rules.keeps or rules.control_variates or rules.sketch:
        return f"strategy {experiment.strategy_name} needs clients that remember"
    if experiment.wire.up != "float32" and rules.steady:
        return f"wire.up = {experiment.wire.up!r} feeds back what it lost, which clients remember"
    return ""


def _refuse_without_memory(experiment: Experiment, strategy: Strategy) -> None:
    """Refuse what needs clients that remember, where several share a node."""
    if why := needs_memory(experiment, strategy):
        raise ConfigError(
            f"share_nodes = true: {why}, one node each; set share_nodes = false and start as many "
            "nodes as partition.clients"
        )


def choose_cohort(experiment: Experiment, server_round: int) -> list[int]:
    """Return the clients of a round, in order; a function of (seed, round) alone."""
    members = experiment.members
    generator = numpy_generator(experiment.federation.seed, "cohort", server_round)
    size = experiment.federation.cohort_size(len(members))
    return sorted(members[at] for at in generator.choice(len(members), size, replace=False))


def digest_of(served: Iterable[Served]) -> str:
    """Return the digest of all served models together."""
    return digest(
        {
            f"model {index}: {name}": tensor
            for index, model in enumerate(served)
            for name, tensor in model.tensors.items()
        }
    )
