"""Whole runs on a tiny ViT: the same on any schedule of work, and sound when clients are not."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor
from torch.nn import functional
from toy_federation import LORA_METHODS

from clients.app import app as client_app
from clients.training import LocalRun
from common.adapters import at_rank
from common.config import Experiment
from common.errors import ConfigError, FedcopraError
from common.features import extract_features
from common.lowrank import Directions, Term, adapted_modules, is_factor
from common.memory import under
from common.messages import (
    Outcome,
    Plan,
    pack_instruction,
    pack_update,
    recall,
    unpack_instruction,
    unpack_scores,
    unpack_update,
)
from common.models import load_model
from common.rules import NO_RULES
from common.shards import deal_shards
from common.tensors import Tensors, digest, part_of, weighted_mean
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, choose_cohort, digest_of, find_clients, run_federation
from server.local_grid import LocalGrid
from server.record import build_record, read_run, read_updates, write_run
from server.reporting.report import write_report
from server.simulation import Finished, simulate
from strategies import STRATEGIES, resolve
from strategies.base import Served

Build = Callable[..., Experiment]
Clients = Callable[[Message, Context], Message]
Fault = Callable[[Outcome, dict[str, Tensor]], RecordDict]


def ignore(*_: Any) -> None:
    """Take no notice of progress."""


def run(experiment: Experiment, clients: Clients = client_app) -> Outcomes:
    """Run a federation in this process, with these clients."""
    grid = LocalGrid(clients, experiment.partition.clients)  # type: ignore[arg-type]
    return run_on(grid, experiment)


def run_on(grid: LocalGrid, experiment: Experiment) -> Outcomes:
    nodes = find_clients(grid, experiment.partition.clients, timeout=1.0)
    return run_federation(grid, experiment, Evaluator(experiment), nodes, ignore)


def statuses(row: Mapping[str, Any]) -> dict[int, str]:
    return {client["client"]: client["status"] for client in row["clients"]}


@dataclass
class Observed:
    """Clients that do their work and let every message of training be seen."""

    sent: list[tuple[Plan, dict[str, Tensor], RecordDict]]
    returned: list[tuple[Outcome, dict[str, Tensor], RecordDict]]

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type.startswith("train"):
            self.sent.append((*unpack_instruction(message.content), message.content))
            self.returned.append((*unpack_update(reply.content), reply.content))
        return reply


def observed() -> Observed:
    return Observed([], [])


def faulty(client: int, fault: Fault, rounds: Sequence[int] = (1, 2)) -> Clients:
    """Clients of which one returns something else, in these rounds."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            if plan.client == client and plan.round in rounds:
                return Message(fault(*unpack_update(reply.content)), reply_to=message)
        return reply

    return answer


def failing(clients: Sequence[int], rounds: Sequence[int] = (1, 2)) -> Clients:
    """Clients of which some raise, in these rounds."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            if plan.client in clients and plan.round in rounds:
                raise OSError("the disk of this client is full")
        return client_app(message, context)

    return answer


# --- the same numbers every time ------------------------------------------------------------------


@pytest.mark.parametrize("name", LORA_METHODS)
def test_a_run_repeats_to_the_bit(digits_experiment: Build, name: str) -> None:
    experiment = digits_experiment(strategy__name=name, copra__enabled=True, adapter__dropout=0.1)
    torch.manual_seed(1)
    first = run(experiment)
    torch.manual_seed(2)
    again = run(experiment)
    assert again.digest == first.digest
    assert [row["loss"] for row in again.rounds] == [row["loss"] for row in first.rounds]


def test_the_order_of_runs_in_one_process_does_not_matter(digits_experiment: Build) -> None:
    """Nothing is left behind in the shared model: ranks, residuals, frozen parts, switches."""
    experiments = [
        digits_experiment(strategy__name="fedavg"),
        digits_experiment(strategy__name="ffa-lora", copra__enabled=True),
        digits_experiment(strategy__name="dense-oracle"),
        digits_experiment(strategy__name="copra-merge", adapter__ranks=[2, 4]),
        digits_experiment(strategy__name="local-only", adapter__ranks=[2, 4]),
        digits_experiment(strategy__name="centralised"),
        digits_experiment(strategy__name="flora"),
        digits_experiment(strategy__name="fedsa-lora", wire__up="int4"),
        digits_experiment(strategy__name="scaffold"),
    ]
    forward = [done.outcomes.digest for done in simulate(experiments, ignore)]
    backward = [done.outcomes.digest for done in simulate(experiments[::-1], ignore)]
    assert backward[::-1] == forward
    assert len(set(forward)) == len(forward)


@pytest.mark.parametrize("key", ["federation__seed", "train__learning_rate", "adapter__alpha"])
def test_what_decides_a_run_changes_its_digest(digits_experiment: Build, key: str) -> None:
    value = {"federation__seed": 1, "train__learning_rate": 0.01, "adapter__alpha": 5.0}[key]
    assert run(digits_experiment(**{key: value})).digest != run(digits_experiment()).digest


def test_copra_changes_the_outcome_but_not_the_start(digits_experiment: Build) -> None:
    without = run(digits_experiment(copra__enabled=False))
    dropped = run(digits_experiment(copra__enabled=True, copra__initial=0.0))
    assert dropped.start == without.start
    assert dropped.digest != without.digest


def test_all_strategies_start_from_the_same_model(digits_experiment: Build) -> None:
    expected = run(digits_experiment(federation__rounds=1)).start
    for name in LORA_METHODS:
        start = run(digits_experiment(strategy__name=name, federation__rounds=1)).start
        assert start == expected, name


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_the_number_of_workers_does_not_matter(
    digits_experiment: Build, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two, four (more than there are cores, here and there) and none at all.

    With few workers there are more runs than lanes: what clients remember of one must not reach
    another. Nor does a Ray cluster matter that is, or was, there for others.
    """
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")

    def digests(workers: int) -> list[str]:
        settings = {"partition__clients": 4, "federation__workers": workers}
        uneven = {"adapter__ranks": [2, 4], "adapter__dropout": 0.1, "copra__enabled": True}
        remembering = {"wire__up": "int8", "wire__down": "float16", "federation__rounds": 3}
        some = {"federation__fraction": 0.5}
        experiments = [
            digits_experiment(**settings, strategy__name="dense-oracle"),
            digits_experiment(**settings, strategy__name="copra-merge", **uneven),
            digits_experiment(**settings, strategy__name="flexlora", **remembering, **some),
            digits_experiment(**settings, strategy__name="fedsa-lora", **some),
        ]
        return [done.outcomes.digest for done in simulate(experiments, ignore)]

    assert digests(workers) == digests(0)


# --- the cohort -----------------------------------------------------------------------------------


def test_the_cohort_follows_from_seed_and_round_alone(digits_experiment: Build) -> None:
    settings = {"partition__clients": 10, "federation__fraction": 0.4}
    base = digits_experiment(**settings)
    cohorts = [choose_cohort(base, number) for number in range(1, 9)]
    torch.manual_seed(0)
    for other in (
        digits_experiment(**settings, strategy__name="copra-merge"),
        digits_experiment(**settings, adapter__rank=2, train__local_steps=7),
        digits_experiment(**settings, federation__rounds=9),
    ):
        assert [choose_cohort(other, number) for number in range(1, 9)] == cohorts
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    reseeded = digits_experiment(**settings, federation__seed=1)
    assert [choose_cohort(reseeded, number) for number in range(1, 9)] != cohorts
    for cohort in cohorts:
        assert cohort == sorted(set(cohort))
        assert len(cohort) == 4
        assert set(cohort) <= set(range(10))


def test_every_client_is_chosen_sooner_or_later(digits_experiment: Build) -> None:
    experiment = digits_experiment(partition__clients=10, federation__fraction=0.2)
    chosen = [client for r in range(1, 101) for client in choose_cohort(experiment, r)]
    # 200 draws of ten: 20 each, give or take four standard deviations.
    assert all(4 <= chosen.count(client) <= 36 for client in range(10))


def test_failures_leave_the_next_cohort_alone(digits_experiment: Build) -> None:
    experiment = digits_experiment(
        partition__clients=4, federation__fraction=0.5, federation__rounds=3
    )
    seen = observed()
    run(experiment, seen)
    asked = [[p.client for p, _, _ in seen.sent if p.round == r] for r in (1, 2, 3)]
    assert asked == [choose_cohort(experiment, number) for number in (1, 2, 3)]
    outcomes = run(experiment, failing(asked[1], rounds=[2]))
    assert [sorted(statuses(row)) for row in outcomes.rounds] == asked


# --- clients that fail ----------------------------------------------------------------------------


def with_nan(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    name = next(name for name in sorted(tensors) if part_of(name) == "lora_B")
    tensors[name][2, 1] = float("nan")
    return pack_update(outcome, tensors)


@pytest.mark.parametrize("name", ["fedavg", "ffa-lora", "flexlora", "copra-merge", "dense-oracle"])
def test_nan_is_refused_named_and_left_out_of_the_mean(digits_experiment: Build, name: str) -> None:
    experiment = digits_experiment(strategy__name=name)
    outcomes = run(experiment, faulty(1, with_nan))
    for row in outcomes.rounds:
        assert statuses(row) == {0: "ok", 1: "refused", 2: "ok"}
        refused = row["clients"][1]
        assert "lora_B.weight" in refused["reason"]
        assert "NaN" in refused["reason"]
        assert refused["weight"] == 0.0
        assert sum(client["weight"] for client in row["clients"]) == pytest.approx(1.0)
    assert outcomes.digest == run(experiment, failing([1])).digest
    assert outcomes.digest != run(experiment).digest


def test_the_mean_without_a_refused_client_is_that_of_the_others(
    digits_experiment: Build,
) -> None:
    experiment = digits_experiment(federation__rounds=1)
    seen = observed()
    run(experiment, seen)
    others = [(o.num_examples, tensors) for o, tensors, _ in seen.returned if o.client != 1]
    expected = weighted_mean(others)
    outcomes = run(experiment, faulty(1, with_nan))
    assert digest(outcomes.served[0].tensors) == digest(expected)


def without_a_tensor(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    tensors.pop(min(tensors))
    return pack_update(outcome, tensors)


def with_a_surprise(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(outcome, {**tensors, "surprise": torch.ones(2)})


def with_a_dotted_surprise(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(outcome, {**tensors, "vit.layers.0.bias": torch.ones(2)})


def with_a_residual(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    name = "vit.layers.0.attention.q_proj.residual.weight"
    return pack_update(outcome, {**tensors, name: torch.ones(16, 16)})


def transposed(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    name = next(name for name in tensors if is_factor(name))
    return pack_update(outcome, {**tensors, name: tensors[name].T.contiguous()})


def in_float64(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(outcome, {name: tensor.double() for name, tensor in tensors.items()})


def in_integers(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(outcome, {name: tensor.long() for name, tensor in tensors.items()})


def of_another_client(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(replace(outcome, client=2), tensors)


def of_no_examples(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(replace(outcome, num_examples=0), tensors)


def with_a_loss_that_is_no_number(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    return pack_update(replace(outcome, loss=float("nan")), tensors)


def nothing(_: Outcome, __: dict[str, Tensor]) -> RecordDict:
    return RecordDict()


def only_tensors(outcome: Outcome, tensors: dict[str, Tensor]) -> RecordDict:
    content = pack_update(outcome, tensors)
    return RecordDict({"tensors": content["tensors"]})


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (without_a_tensor, "missing"),
        (with_a_surprise, "surprise"),
        (with_a_dotted_surprise, "vit.layers.0.bias"),
        (with_a_residual, "residual"),
        (transposed, "shape"),
        (in_float64, "dtype torch.float64"),
        (in_integers, "dtype torch.int64"),
        (of_another_client, "client 2"),
        (of_no_examples, "num-examples = 0"),
        (nothing, "cannot be read"),
        (only_tensors, "cannot be read"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused_and_the_run_goes_on(
    digits_experiment: Build, fault: Fault, says: str
) -> None:
    experiment = digits_experiment()
    outcomes = run(experiment, faulty(1, fault, rounds=[1]))
    assert [statuses(row)[1] for row in outcomes.rounds] == ["refused", "ok"]
    assert says in outcomes.rounds[0]["clients"][1]["reason"]
    assert outcomes.digest == run(experiment, failing([1], rounds=[1])).digest


def test_a_loss_that_is_no_number_does_not_spoil_the_record(digits_experiment: Build) -> None:
    """JSON has no NaN: one client's bad loss would cost the whole run at its very end."""
    outcomes = run(digits_experiment(), faulty(1, with_a_loss_that_is_no_number, rounds=[1]))
    assert json.dumps(outcomes.rounds, allow_nan=False)


def test_a_client_that_raises_is_named_with_its_reason(digits_experiment: Build) -> None:
    outcomes = run(digits_experiment(), failing([2], rounds=[1]))
    failed = outcomes.rounds[0]["clients"][2]
    assert failed["status"] == "failed"
    assert "the disk of this client is full" in failed["reason"]
    assert "\n" not in failed["reason"]
    assert (failed["loss"], failed["weight"]) == (None, 0.0)
    assert statuses(outcomes.rounds[0]) == {0: "ok", 1: "ok", 2: "failed"}
    assert statuses(outcomes.rounds[1]) == {0: "ok", 1: "ok", 2: "ok"}


class LossyGrid(LocalGrid):
    """Loses the reply of one node."""

    lost = 3  # node ids start from 2: client 1

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        return [
            reply
            for reply in replies
            if reply.metadata.message_type != "train" or reply.metadata.src_node_id != self.lost
        ]


def test_a_client_that_never_answers_is_named_as_missing(digits_experiment: Build) -> None:
    experiment = digits_experiment()
    grid = LossyGrid(client_app, 3)
    outcomes = run_on(grid, experiment)
    for row in outcomes.rounds:
        assert statuses(row) == {0: "ok", 1: "missing", 2: "ok"}
        assert "3600" in row["clients"][1]["reason"]
    assert outcomes.digest == run(experiment, failing([1])).digest


@pytest.mark.parametrize("name", LORA_METHODS)
def test_if_all_clients_fail_in_a_round_the_model_stays(
    digits_experiment: Build, name: str
) -> None:
    experiment = digits_experiment(strategy__name=name)
    first, second = run(experiment, failing([0, 1, 2], rounds=[2])).rounds
    assert set(statuses(second).values()) == {"failed"}
    for score in ("accuracy", "loss", "own_accuracy", "own_loss"):
        assert second[score] == first[score]
    assert second["own_loss"] is not None
    assert second["aggregation_error"] is None
    assert "stays" in second["merge"]["decision"]
    assert second["bytes"]["up"]["total"] == 0


def test_a_run_that_never_trains_is_refused_with_the_reason(digits_experiment: Build) -> None:
    """The start's accuracy must not be reported as a result."""
    with pytest.raises(FedcopraError, match=r"no update was accepted in round 1; client 0 failed"):
        run(digits_experiment(), failing([0, 1, 2]))


def test_one_bad_round_costs_only_itself(digits_experiment: Build) -> None:
    outcomes = run(digits_experiment(federation__rounds=3), failing([0, 1, 2], rounds=[2]))
    assert outcomes.rounds[1]["loss"] == outcomes.rounds[0]["loss"]
    assert outcomes.rounds[2]["loss"] != outcomes.rounds[1]["loss"]


# --- what travels ---------------------------------------------------------------------------------


def numbers(tensors: Tensors, *parts: str) -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if part_of(name) in parts)


def kind(name: str) -> str:
    """Say what a tensor is counted as, from what its name looks like."""
    if name.startswith("control/"):
        return "control"
    if name.startswith("base.") or ".residual." in name:
        return "residual"
    if any(word in name for word in (".sketch.", ".basis.", ".projection.")):
        return "sketch"
    return "head" if name.startswith("head.") else {"A": "A", "B": "B"}[name.split("lora_")[1][0]]


@pytest.mark.parametrize("name", LORA_METHODS)
def test_bytes_are_those_of_the_messages_by_kind(digits_experiment: Build, name: str) -> None:
    """Of every client, of the round, and in the record of both."""
    from flwr.common.serde import recorddict_to_proto

    experiment = digits_experiment(strategy__name=name)
    seen = observed()
    outcomes = run(experiment, seen)
    assert [row["round"] for row in outcomes.rounds] == [1, 2]
    expected: dict[tuple[int, int, str], dict[str, int]] = {}
    for (plan, down, question), (_, up, reply) in zip(seen.sent, seen.returned, strict=True):
        for direction, tensors, content in (("down", down, question), ("up", up, reply)):
            counted = expected.setdefault((plan.round, plan.client, direction), {})
            length = len(recorddict_to_proto(content).SerializeToString())
            payload = sum(t.numel() * t.element_size() for t in tensors.values())
            for key, size in [
                *((kind(n), t.numel() * t.element_size()) for n, t in tensors.items()),
                ("protocol", length - payload),
                ("total", length),
            ]:
                counted[key] = counted.get(key, 0) + size
    for row in outcomes.rounds:
        for direction in ("down", "up"):
            together: dict[str, int] = {}
            for client in row["clients"]:
                counted = expected[row["round"], client["client"], direction]
                assert client["bytes"][direction] == counted
                assert counted["protocol"] > 0
                for key, size in counted.items():
                    together[key] = together.get(key, 0) + size
            assert row["bytes"][direction] == together
    first_down = outcomes.rounds[0]["bytes"]["down"]
    # What no client can draw: control variates, and what the method asks in between.
    assert not first_down.keys() & {"A", "B", "head"}


def test_the_client_that_fails_has_what_it_was_sent_on_its_account(
    digits_experiment: Build,
) -> None:
    outcomes = run(digits_experiment(), failing([2], rounds=[2]))
    for row in outcomes.rounds:
        for direction in ("up", "down"):
            totals = [c["bytes"].get(direction, {}).get("total", 0) for c in row["clients"]]
            assert row["bytes"][direction]["total"] == sum(totals)
    failed = outcomes.rounds[1]["clients"][2]["bytes"]
    assert failed["down"]["A"] == 8 * 16 * 4 * 4
    assert "up" not in failed


def test_ffa_lora_sends_no_a(digits_experiment: Build) -> None:
    """Per client and direction: 8 modules of 16x16 at rank 4, B alone; a head of 10x16 + 10."""
    seen = observed()
    outcomes = run(digits_experiment(strategy__name="ffa-lora"), seen)
    for plan, tensors, _ in seen.sent:
        parts = {"lora_B", "head"} if plan.round > 1 else set()
        assert {part_of(name) for name in tensors} == parts
    for _, tensors, _ in seen.returned:
        assert {part_of(name) for name in tensors} == {"lora_B", "head"}
    whole = run(digits_experiment(strategy__name="fedavg"))
    for number, direction in ((0, "up"), (1, "up"), (1, "down")):
        counted = outcomes.rounds[number]["bytes"][direction]
        assert counted["B"] == 3 * 8 * 16 * 4 * 4
        assert counted["head"] == 3 * 170 * 4
        assert "A" not in counted
        both = whole.rounds[number]["bytes"][direction]
        assert both["A"] == both["B"] == counted["B"]


def test_a_head_that_is_not_trained_neither_travels_nor_changes(digits_experiment: Build) -> None:
    experiment = digits_experiment(adapter__train_head=False)
    seen = observed()
    outcomes = run(experiment, seen)
    later = [tensors for plan, tensors, _ in seen.sent if plan.round > 1]
    for tensors in [*later, *(tensors for _, tensors, _ in seen.returned)]:
        assert {part_of(name) for name in tensors} == {"lora_A", "lora_B"}
    initial = Evaluator(experiment).initial(0)
    for name, tensor in outcomes.served[0].tensors.items():
        assert torch.equal(tensor, initial[name]) == (part_of(name) == "head")


@pytest.mark.parametrize("trains", [("lora_A", "lora_B", "head"), ("lora_B", "head"), ("lora_B",)])
@pytest.mark.parametrize("client", [0, 1])
def test_a_client_starts_from_what_it_is_sent_and_from_the_common_start_for_the_rest(
    digits_experiment: Build, trains: tuple[str, ...], client: int
) -> None:
    """With next to no learning it returns what it got; the loss tells what else it worked with."""
    experiment = digits_experiment(train__learning_rate=1e-12, adapter__ranks=[4, 2])
    evaluator = Evaluator(experiment)
    model, (task,), rank = evaluator.model, evaluator.tasks, [4, 2][client]
    start = at_rank(evaluator.initial(experiment.federation.seed), rank)
    stream = torch.Generator().manual_seed(0)
    sent = {
        name: tensor + 0.5 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in start.items()
        if part_of(name) in trains
    }
    plan = Plan(
        experiment=experiment.model_dump_json(),
        run="a run",
        client=client,
        shards=(client,),
        round=2,
        steps=1,
        trains=trains,
        parcel=1,
        since=0,
        fresh=tuple({"lora_A", "lora_B", "head"} - set(trains)),
        restart=0,
        base=model.base_fingerprint,
        rules=NO_RULES,
    )
    grid = LocalGrid(client_app, 3)
    message = Message(pack_instruction(plan, sent), dst_node_id=client + 2, message_type="train")
    (reply,) = grid.send_and_receive([message])
    outcome, returned = unpack_update(reply.content)
    assert returned.keys() == sent.keys()
    for name, tensor in returned.items():
        torch.testing.assert_close(tensor, sent[name], rtol=0, atol=1e-9)

    whole = digits_experiment(
        train__learning_rate=1e-12, adapter__ranks=[4, 2], train__batch_size=1000
    )
    plan = replace(plan, experiment=whole.model_dump_json())
    message = Message(pack_instruction(plan, sent), dst_node_id=client + 2, message_type="train")
    (reply,) = grid.send_and_receive([message])
    outcome, _ = unpack_update(reply.content)
    shard = deal_shards(whole.task, whole.partition, 0)[client]
    rows = extract_features(model.backbone.preprocessor, task.train.select(shard.rows))
    model.load({**start, **sent}, rank, task)
    batch = rows.batch(torch.arange(len(rows)), model.backbone.device)
    with torch.no_grad():
        expected = functional.cross_entropy(model.logits(batch), batch.labels)
    assert outcome.loss == pytest.approx(float(expected), abs=1e-5)


def test_clients_of_unequal_ranks_get_and_return_their_own(digits_experiment: Build) -> None:
    seen = observed()
    run(digits_experiment(strategy__name="copra-merge", adapter__ranks=[2, 4, 1]), seen)
    messages = [(plan.client, t) for plan, t, _ in seen.sent if plan.round > 1]
    messages += [(outcome.client, t) for outcome, t, _ in seen.returned]
    for client, tensors in messages:
        rank = [2, 4, 1][client]
        assert numbers(tensors, "lora_A", "lora_B") == 8 * 2 * 16 * rank


def test_clients_report_the_rows_they_hold(digits_experiment: Build) -> None:
    seen = observed()
    outcomes = run(digits_experiment(partition__kind="dirichlet"), seen)
    held = {outcome.client: outcome.num_examples for outcome, _, _ in seen.returned}
    assert sum(held.values()) == 200
    assert len(set(held.values())) > 1
    for row in outcomes.rounds:
        for client in row["clients"]:
            assert client["num_examples"] == held[client["client"]]
            assert client["weight"] == pytest.approx(held[client["client"]] / 200)


# --- the controls ---------------------------------------------------------------------------------


@pytest.fixture
def local_runs(monkeypatch: pytest.MonkeyPatch) -> list[LocalRun]:
    """What every local training was told, in order."""
    from clients import app

    runs: list[LocalRun] = []
    plain = app.train_locally

    def note(model: Any, rows: Any, run: LocalRun, *rest: Any) -> float:
        runs.append(run)
        return plain(model, rows, run, *rest)

    monkeypatch.setattr(app, "train_locally", note)
    return runs


@pytest.mark.parametrize("name", ["fedavg", "centralised"])
def test_training_walks_its_schedule_once_from_start_to_end(
    digits_experiment: Build, local_runs: list[LocalRun], name: str
) -> None:
    """The keep probability and the learning rate follow the steps that are really taken."""
    run(digits_experiment(strategy__name=name, federation__rounds=3))
    each = 3 if name == "fedavg" else 1
    by_round = [local_runs[start : start + each] for start in range(0, 3 * each, each)]
    position = 0
    for runs in by_round:
        for one in runs:
            assert one.first_step == position
        position += runs[0].steps
    assert {one.total_steps for one in local_runs} == {position}


def test_every_client_in_every_round_has_random_streams_of_its_own(
    digits_experiment: Build, local_runs: list[LocalRun]
) -> None:
    run(digits_experiment())
    run(digits_experiment(federation__seed=1))
    assert len({one.seed for one in local_runs}) == len(local_runs) == 12


def test_the_centralised_control_sees_all_rows_and_takes_all_steps(
    digits_experiment: Build, local_runs: list[LocalRun]
) -> None:
    outcomes = run(digits_experiment(strategy__name="centralised"))
    assert [one.steps for one in local_runs] == [6, 6]
    for row in outcomes.rounds:
        assert [client["num_examples"] for client in row["clients"]] == [200]


# --- several tasks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two tasks of unlike label counts; folders carry dots in their names, as versions do."""
    place = tmp_path_factory.mktemp("tasks")
    words = ["good film", "bad film", "dull book", "slow book", "very good book", "not bad"]
    for name, labels in (("reviews-1.0", 2), ("genres-1.5", 3)):
        (place / name).mkdir()
        rows = [
            {"text": f"the {words[k % 6]} {'very ' * (k // 6)}", "label": k % labels}
            for k in range(60)
        ]
        (place / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [{"path": str(place / name)} for name in ("reviews-1.0", "genres-1.5")]


@pytest.mark.parametrize("name", [name for name in LORA_METHODS if STRATEGIES[name].by_task])
def test_a_federation_of_several_tasks_trains_every_head(
    digits_experiment: Build, bert_folder: Path, text_tasks: list[dict[str, str]], name: str
) -> None:
    experiment = digits_experiment(
        task__members=text_tasks,
        task__limit=0,
        task__probe_examples=12,
        partition__kind="by-task",
        partition__clients=4,
        backbone__path=str(bert_folder),
        **{"strategy__name": name, "strategy__copra-merge__probe_examples": 12},
    )
    outcomes = run(experiment)
    strategy = resolve(experiment)
    assert outcomes.start.tasks.keys() == {"reviews-1.0", "genres-1.5"}
    for row in outcomes.rounds:
        assert 0 <= row["own_accuracy"] <= 1
        if strategy.personalised:
            assert row["accuracy"] is None
            continue
        assert row["tasks"].keys() == {"reviews-1.0", "genres-1.5"}
        mean = sum(task["accuracy"] for task in row["tasks"].values()) / 2
        assert row["accuracy"] == pytest.approx(mean)
    initial = Evaluator(experiment).initial(0)
    if "head" in strategy.rules.keeps:
        return
    for model in outcomes.served:
        for head in (n for n in model.tensors if n.startswith("head.")):
            assert not torch.equal(model.tensors[head], initial[head]), head


def test_a_probe_smaller_than_the_number_of_tasks_is_refused_or_works(
    digits_experiment: Build, bert_folder: Path, text_tasks: list[dict[str, str]]
) -> None:
    settings = {
        "task__members": text_tasks,
        "task__limit": 0,
        "partition__kind": "by-task",
        "partition__clients": 4,
        "backbone__path": str(bert_folder),
        "strategy__name": "copra-merge",
        "strategy__copra-merge__probe_examples": 1,
        "task__probe_examples": 12,
    }
    refusals = []
    try:
        run(digits_experiment(**settings))
    except FedcopraError as refusal:
        refusals.append(str(refusal))
    assert all("probe_examples" in refusal for refusal in refusals)


# --- scores and records ---------------------------------------------------------------------------


def test_scores_are_of_the_held_out_rows(digits_experiment: Build) -> None:
    """The same sums, made by hand, for test and for validation."""
    for split in ("test", "validation"):
        experiment = digits_experiment(task__evaluate_on=split)
        evaluator = Evaluator(experiment)
        (task,) = evaluator.tasks
        model, state = evaluator.model, evaluator.initial(0)
        shards = deal_shards(experiment.task, experiment.partition, 0)
        scores = evaluator.evaluate([Served(state, 4)], shards)
        rows = extract_features(model.backbone.preprocessor, getattr(task, split))
        model.load(state, 4, task)
        batch = rows.batch(torch.arange(len(rows)), model.backbone.device)
        with torch.no_grad():
            logits = model.logits(batch)
        right = (logits.argmax(dim=1) == batch.labels).double().mean()
        assert scores.accuracy == pytest.approx(float(right), abs=1e-12)
        loss = functional.cross_entropy(logits, batch.labels)
        assert scores.loss == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 100.0])
def test_own_scores_weight_the_rows_like_each_clients_labels(
    digits_experiment: Build, alpha: float
) -> None:
    """Label by label, by hand: `Σ_c p_k(c)·mean over the held-out rows of label c`, then over k."""
    experiment = digits_experiment(
        partition__kind="dirichlet", partition__alpha=alpha, partition__min_examples=1
    )
    evaluator = Evaluator(experiment)
    (task,) = evaluator.tasks
    model, state = evaluator.model, evaluator.initial(0)
    shards = deal_shards(experiment.task, experiment.partition, 0)
    # A head that prefers some labels, so that clients differ.
    state["head.digits.classifier.bias"] = torch.arange(10) / 5
    rows = extract_features(model.backbone.preprocessor, task.test)
    model.load(state, 4, task)
    batch = rows.batch(torch.arange(len(rows)), model.backbone.device)
    with torch.no_grad():
        logits = model.logits(batch).double()
    hits = (logits.argmax(dim=1) == batch.labels).double()
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")

    def by_hand(values: Tensor, client: int) -> float:
        labels = task.train.labels[shards[client].rows]
        means = [
            float(values[batch.labels == label].mean()) * float((labels == label).mean())
            for label in range(10)
        ]
        return sum(means)

    apart = [(by_hand(hits, k), by_hand(losses, k)) for k in range(3)]
    scores = evaluator.evaluate([Served(state, 4)], shards)
    assert scores.own_accuracy == pytest.approx(sum(a for a, _ in apart) / 3)
    assert scores.own_loss == pytest.approx(sum(b for _, b in apart) / 3, abs=1e-5)
    own = evaluator.evaluate([Served(state, 4, client=1)], shards)
    assert (own.own_accuracy, own.own_loss) == pytest.approx(apart[1], abs=1e-5)
    assert abs(apart[0][1] - apart[1][1]) > (0.02 if alpha < 1 else 0.0)


def test_a_personalised_run_is_scored_by_its_clients_alone(digits_experiment: Build) -> None:
    """The clients' figures, through the bridge, are those of their own models."""
    experiment = digits_experiment(
        strategy__name="fedsa-lora",
        partition__kind="dirichlet",
        partition__min_examples=1,
        federation__rounds=1,
    )
    said: list[tuple[int, float, float]] = []
    trained: dict[int, dict[str, Tensor]] = {}

    def clients(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            memory = recall(context.state, plan.client, plan.run)
            trained[plan.client] = dict(under("kept/", memory.own))
        if message.metadata.message_type == "evaluate":
            said.append(unpack_scores(reply.content))
        return reply

    outcomes = run(experiment, clients)
    (row,) = outcomes.rounds
    assert (row["accuracy"], row["loss"]) == (None, None)
    assert [client for client, _, _ in said] == [0, 1, 2]
    evaluator = Evaluator(experiment)
    shards = deal_shards(experiment.task, experiment.partition, 0)
    for client, accuracy, loss in said:
        mine = {**outcomes.served[0].tensors, **trained[client]}
        own = evaluator.evaluate([Served(mine, 4, client=client)], shards)
        assert (own.own_accuracy, own.own_loss) == pytest.approx((accuracy, loss), abs=1e-6)
    assert row["own_accuracy"] == pytest.approx(sum(a for _, a, _ in said) / 3)
    assert row["own_loss"] == pytest.approx(sum(b for _, _, b in said) / 3)


@pytest.mark.parametrize("name", LORA_METHODS)
def test_how_often_a_run_is_scored_changes_neither_its_digest_nor_its_bytes(
    digits_experiment: Build, name: str
) -> None:
    settings = {"strategy__name": name, "federation__rounds": 3, "federation__fraction": 0.7}
    often = run(digits_experiment(**settings))
    seldom = run(digits_experiment(**settings, federation__evaluate_every=2))
    assert seldom.digest == often.digest
    keys = ("A", "B", "head", "residual", "control", "sketch")
    for row, other in zip(often.rounds, seldom.rounds, strict=True):
        for direction in ("up", "down"):
            counted, mine = row["bytes"][direction], other["bytes"][direction]
            assert {k: counted.get(k) for k in keys} == {k: mine.get(k) for k in keys}
        scored = other["round"] in (2, 3)
        assert (other["own_loss"] is not None) == scored
        if scored:
            assert other["own_loss"] == row["own_loss"]
            assert other["loss"] == row["loss"]
        else:
            assert "evaluation" not in other["bytes"]


def test_the_probe_gives_the_losses_of_its_own_rows_in_order(digits_experiment: Build) -> None:
    experiment = digits_experiment()
    evaluator = Evaluator(experiment)
    (task,) = evaluator.tasks
    state = evaluator.initial(0)
    probe = evaluator.probe(40, 4)
    assert probe is not None
    rows = extract_features(evaluator.model.backbone.preprocessor, task.probe)
    evaluator.model.load(state, 4, task)
    batch = rows.batch(torch.arange(40), evaluator.model.backbone.device)
    with torch.no_grad():
        losses = functional.cross_entropy(
            evaluator.model.logits(batch), batch.labels, reduction="none"
        )
    torch.testing.assert_close(probe.losses(state, slice(None)), losses, rtol=0, atol=1e-5)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(probe.losses(state, part), losses[part], rtol=0, atol=1e-5)
    assert evaluator.probe(0, 4) is None


def test_the_probes_slopes_are_those_of_its_losses(digits_experiment: Build) -> None:
    """By central differences; the direction is the adapter's own delta, and any head."""
    evaluator = Evaluator(digits_experiment())
    probe = evaluator.probe(40, 4)
    assert probe is not None
    state = evaluator.initial(0)
    draw = torch.Generator().manual_seed(2)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in state.items()}
    heads = {n: torch.randn(1, *t.shape, generator=draw) for n, t in state.items() if "head" in n}
    stacks = {m: Term.of(state, m) for m in adapted_modules(state)}
    mixing = torch.full((4, 1), 6 / 4, dtype=torch.float64)  # s, so that a move by h is (1 + h)·B
    directions = Directions(stacks, mixing, heads)
    losses, found = probe.slopes(state, directions, slice(1, None, 2))
    torch.testing.assert_close(losses, probe.losses(state, slice(1, None, 2)), rtol=0, atol=1e-5)

    def moved(by: float) -> Tensor:
        model = {n: t * (1 + by) if "lora_B" in n else t for n, t in state.items()}
        model |= {n: state[n] + by * heads[n][0] for n in heads}
        return probe.losses(model, slice(1, None, 2)).double()

    numeric = (moved(5e-3) - moved(-5e-3)) / 1e-2
    torch.testing.assert_close(found[:, 0], numeric, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "copra-merge", "scaffold", "hetlora"])
def test_clients_may_start_from_factors_of_their_own(digits_experiment: Build, name: str) -> None:
    settings = {"strategy__name": name, "train__learning_rate": 1e-5, "federation__rounds": 1}
    alike = run(digits_experiment(**settings)).updates
    apart = run(digits_experiment(**settings, federation__start="own")).updates
    assert len(apart) == 3
    for tensor in (n for n in apart[0].sent if part_of(n) == "lora_A"):
        sent = apart[0].sent[tensor]
        for one, other in itertools.combinations(apart, 2):
            assert torch.equal(one.sent[tensor], other.sent[tensor])
            # Independent draws of one spread are √2 of their length apart.
            gap = (one.tensors[tensor] - other.tensors[tensor]).norm() / sent.norm()
            assert 1.0 < float(gap) < 2.2
        torch.testing.assert_close(alike[0].tensors[tensor], sent, rtol=0, atol=1e-3)
    for update in apart:
        assert all(not t.any() for n, t in update.sent.items() if "lora_B" in n)


def test_a_client_with_random_labels_harms_its_own_update_alone(digits_experiment: Build) -> None:
    settings = {"federation__rounds": 1, "strategy__name": "fedavg"}
    honest = run(digits_experiment(**settings)).updates
    harmed = run(
        digits_experiment(**settings, harm__kind="random-labels", harm__clients=[1])
    ).updates
    same = [digest(a.tensors) == digest(b.tensors) for a, b in zip(honest, harmed, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("factor", [-1.0, 10.0])
def test_a_scaled_update_is_the_honest_one_times_a_factor(
    digits_experiment: Build, factor: float
) -> None:
    settings = {"federation__rounds": 1, "strategy__name": "fedavg"}
    honest = run(digits_experiment(**settings)).updates
    settings |= {"harm__kind": "scaled-update", "harm__clients": [2], "harm__factor": factor}
    harmed = run(digits_experiment(**settings)).updates
    for plain, other, times in zip(honest, harmed, (1, 1, factor), strict=True):
        for name, tensor in plain.tensors.items():
            expected = plain.sent[name] + times * (tensor - plain.sent[name])
            torch.testing.assert_close(other.tensors[name], expected, rtol=1e-5, atol=1e-6)


def test_own_starts_are_for_the_first_round_only(digits_experiment: Build) -> None:
    settings = {"train__learning_rate": 1e-5, "federation__start": "own"}
    for update in run(digits_experiment(**settings)).updates:
        for tensor in (n for n in update.sent if "lora_A" in n):
            torch.testing.assert_close(
                update.tensors[tensor], update.sent[tensor], rtol=0, atol=1e-3
            )


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fedsvd"])
def test_a_method_that_freezes_a_factor_refuses_own_starts(
    digits_experiment: Build, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"federation.start = 'own': strategy {name}"):
        resolve(digits_experiment(strategy__name=name, federation__start="own"))


def test_clients_judge_candidates_and_send_back_scores_alone(digits_experiment: Build) -> None:
    settings = {"strategy__copra-merge__probe": "clients", "strategy__copra-merge__judges": 2}
    done = run(digits_experiment(strategy__name="copra-merge", **settings))
    plain = run(
        digits_experiment(strategy__name="copra-merge", **{"strategy__copra-merge__probe": "none"})
    )
    for row, without in zip(done.rounds, plain.rounds, strict=True):
        assert len(row["merge"]["judges"]) == 2
        assert len(row["merge"]["votes"]) == 1
        whole = sum(without["bytes"]["down"].get(kind, 0) for kind in ("A", "B", "head")) / 3
        if row["round"] == 2:
            # Two judges, two candidates each; A, which everyone draws, is new from round 2 on.
            assert row["bytes"]["down"]["candidate"] == pytest.approx(4 * whole, rel=1e-6)
        assert row["bytes"]["up"]["score"] == 2 * 2 * 2 * 4
    assert all("candidate" not in name for u in done.updates for name in u.sent)


def test_runs_that_start_while_others_evaluate_do_not_disturb_them(
    digits_experiment: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in flight share a model: a head that one is slow to make must not replace another's."""
    from transformers import AutoModelForImageClassification

    plain = AutoModelForImageClassification.from_config

    def slowly(config: Any) -> Any:
        thread = threading.current_thread().name
        time.sleep(float(thread) if thread[0].isdigit() else 0.0)
        return plain(config)

    monkeypatch.setattr(AutoModelForImageClassification, "from_config", slowly)
    load_model.cache_clear()
    experiment = digits_experiment()
    shards = deal_shards(experiment.task, experiment.partition, 0)
    evaluator = Evaluator(experiment)
    late = [
        threading.Thread(target=lambda: evaluator.initial(0), name=f"{0.2 + 0.07 * k}")
        for k in range(8)
    ]
    for thread in late:
        thread.start()
    time.sleep(0.05)
    losses = set()
    while any(thread.is_alive() for thread in late) or not losses:
        losses.add(evaluator.evaluate([Served(evaluator.initial(0), 4)], shards).loss)
    assert len(losses) == 1


def finished(experiment: Experiment, clients: Clients = client_app) -> Finished:
    return Finished(experiment, run(experiment, clients), Evaluator(experiment))


@pytest.mark.parametrize("name", LORA_METHODS)
def test_a_record_is_plain_json_and_can_be_read_again(
    digits_experiment: Build, tmp_path: Path, name: str
) -> None:
    experiment = digits_experiment(strategy__name=name)
    done = finished(experiment, failing([1], rounds=[1]))
    record = build_record(done, "a label")
    assert record["task"]["sizes"]["probe"] == experiment.task.probe_examples > 0
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    write_run(tmp_path, record, done.outcomes)
    again, read, tensors = read_run(tmp_path)
    assert again == record
    assert read == experiment
    assert record["digest"] == digest_of(done.outcomes.served)
    served = [model.tensors for model in done.outcomes.served]
    prefix = [f"model.{k}/" if len(served) > 1 else "" for k in range(len(served))]
    flat = {p + n: t for p, model in zip(prefix, served, strict=True) for n, t in model.items()}
    assert digest(tensors) == digest(flat)
    kept = read_updates(tmp_path, record)
    assert [update.client for update in kept] == [u.client for u in done.outcomes.updates]
    for one, other in zip(kept, done.outcomes.updates, strict=True):
        assert digest(one.sent) == digest(other.sent)
        assert digest(one.tensors) == digest({n: other.tensors[n] for n in other.sent})


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (2, [0, 1]), (8, [0, 1, 2])])
def test_a_run_keeps_what_the_first_clients_sent_last(
    digits_experiment: Build, tmp_path: Path, keep: int, kept: list[int]
) -> None:
    done = finished(digits_experiment(federation__keep_updates=keep))
    record = build_record(done, "a label")
    write_run(tmp_path, record, done.outcomes)
    assert [u.client.client for u in read_updates(tmp_path, record)] == kept
    assert (tmp_path / "updates.safetensors").is_file() == bool(kept)


def test_a_run_that_diverged_can_still_be_recorded(
    digits_experiment: Build, tmp_path: Path
) -> None:
    """One huge step leaves finite factors whose logits overflow; JSON has no NaN."""
    experiment = digits_experiment(train__learning_rate=1e25, train__local_steps=1)
    done = finished(experiment)
    write_run(tmp_path, build_record(done, "diverged"), done.outcomes)
    record, _, _ = read_run(tmp_path)
    assert [row["loss"] for row in record["rounds"]] == [None, None]
    write_report([tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_progress_is_told_after_every_round(digits_experiment: Build) -> None:
    told: list[tuple[int, int]] = []
    experiments = [digits_experiment(), digits_experiment(strategy__name="flexlora")]
    simulate(experiments, lambda index, row: told.append((index, row["round"])))
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]
