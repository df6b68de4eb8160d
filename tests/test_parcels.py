"""Parcels: nothing travels twice, nothing is missing, and the server knows what a client has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_federation import LORA_METHODS

from clients import app
from clients.app import app as client_app
from common.adapters import at_rank
from common.compression import Format
from common.config import Experiment, build_experiment
from common.errors import ConfigError
from common.lowrank import Term, adapted_modules, factor_names
from common.messages import unpack_instruction
from common.residuals import caught_up, change_base, is_change, is_residual, residual_name
from common.tensors import Tensors, digest, part_of
from server import flower_strategy
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, find_clients, run_federation, share_nodes
from server.local_grid import LocalGrid
from server.parcels import Parcel, Parcels
from strategies import STRATEGIES, resolve, setting_of
from strategies.base import Client, Merged, Probe, Update
from strategies.cost import Cost, Sizes

Build = Callable[..., Experiment]
Clients = Callable[[Message, Context], Message]

WHO = Client(0, "toy", 2, 1.0)
MODULE = "enc.0.q"
NAME_B, NAME_A = factor_names(MODULE)
NAMES = (NAME_A, NAME_B, factor_names("enc.1.q")[1], factor_names("enc.1.q")[0], "head.toy.bias")


def drawn(_: Client, restart: int) -> dict[str, Tensor]:
    """What a client draws: A of this restart, B zero, and a head that no restart changes."""
    stream = torch.Generator().manual_seed(restart)
    start = {
        name: torch.rand(2, 3, generator=stream) for name in NAMES if part_of(name) == "lora_A"
    }
    start |= {name: torch.zeros(4, 2) for name in NAMES if part_of(name) == "lora_B"}
    return {**start, "head.toy.bias": torch.tensor([0.1, 0.2])}


@dataclass
class Holder:
    """A client's side of it, done by hand."""

    held: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0

    def unpack(self, parcel: Parcel, restart: int = 0) -> dict[str, Tensor]:
        known = self.held if parcel.since else {}
        assert parcel.since in (0, self.number)
        fresh = {n: t for n, t in drawn(WHO, restart).items() if part_of(n) in parcel.fresh}
        plain = {n: t for n, t in parcel.payload.items() if not is_change(n)}
        singles = {n: t.float() if t.dtype == torch.float16 else t for n, t in plain.items()}
        residuals = caught_up(known, parcel.payload)
        kept = {n: t for n, t in known.items() if not is_residual(n)}
        self.held, self.number = {**kept, **fresh, **singles, **residuals}, parcel.number
        return self.held


def parcels(form: Format = "float32", *, remembering: bool = True) -> Parcels:
    return Parcels(drawn, form, remembering)


# --- one client -----------------------------------------------------------------------------------


def test_the_common_start_never_travels() -> None:
    made = parcels()
    start = drawn(WHO, 0)
    parcel = made.pack(WHO, start, start, 0)
    assert (dict(parcel.payload), parcel.since) == ({}, 0)
    assert parcel.fresh == ("head", "lora_A", "lora_B")
    assert digest(Holder().unpack(parcel)) == digest(start)


def test_of_what_has_changed_that_and_no_more_travels() -> None:
    made, client = parcels(), Holder()
    model = drawn(WHO, 0)
    first = made.pack(WHO, model, model, 0)
    client.unpack(first)
    made.arrived(0, first)
    model = {**model, NAME_B: torch.ones(4, 2)}
    second = made.pack(WHO, model, model, 0)
    assert set(second.payload) == {NAME_B}
    assert second.since == first.number
    assert digest(client.unpack(second)) == digest(model)
    made.arrived(0, second)
    third = made.pack(WHO, model, model, 0)
    assert dict(third.payload) == {}
    assert digest(client.unpack(third)) == digest(model)


@pytest.mark.parametrize("told", ["nothing", "lost"])
def test_what_is_not_known_to_have_arrived_travels_again(told: str) -> None:
    made = parcels()
    model = {**drawn(WHO, 0), NAME_B: torch.ones(4, 2), "head.toy.bias": torch.ones(2)}
    first = made.pack(WHO, model, model, 0)
    if told == "lost":
        made.arrived(0, first)
        made.lost(0)
    second = made.pack(WHO, model, model, 0)
    # Of the part B one is as drawn, but parts are drawn whole or not at all.
    assert set(second.payload) == {n for n in NAMES if part_of(n) != "lora_A"}
    assert second.since == 0
    assert digest(Holder().unpack(second)) == digest(model)


def test_a_restart_is_drawn_and_does_not_travel() -> None:
    made, client = parcels(), Holder()
    model = {**drawn(WHO, 0), **{n: torch.ones(4, 2) for n in NAMES if part_of(n) == "lora_B"}}
    first = made.pack(WHO, model, model, 0)
    client.unpack(first)
    made.arrived(0, first)
    restarted = drawn(WHO, 1)
    second = made.pack(WHO, restarted, restarted, 1)
    assert dict(second.payload) == {}
    assert digest(client.unpack(second, 1)) == digest(restarted)


@pytest.mark.parametrize("form", ["float32", "float16"])
def test_what_stands_beside_the_model_is_not_taken_for_a_part_of_it(form: Format) -> None:
    """A control variate is called after a factor; no client can draw it."""
    made, client = parcels(form), Holder()
    control = {f"control/{NAME_A}": torch.full((2, 3), 1 / 3)}
    model = {**drawn(WHO, 0), **control}
    parcel = made.pack(WHO, model, model, 0)
    assert parcel.payload.keys() == control.keys()
    assert digest(client.unpack(parcel)) == digest(parcel.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_is_never_rounded(dtype: torch.dtype) -> None:
    """Residuals gather: what is lost of them would never come back."""
    made, client = parcels("float16"), Holder()
    model = {**drawn(WHO, 0), residual_name(MODULE): torch.full((4, 3), 1 / 3, dtype=dtype)}
    parcel = made.pack(WHO, model, model, 0)
    assert parcel.payload.keys() == {residual_name(MODULE)}
    assert digest(client.unpack(parcel)) == digest(parcel.model) == digest(model)


def test_clients_are_told_apart() -> None:
    made = parcels()
    model = {**drawn(WHO, 0), NAME_B: torch.ones(4, 2)}
    made.arrived(0, made.pack(WHO, model, model, 0))
    assert not made.pack(WHO, model, model, 0).payload
    other = made.pack(Client(1, "toy", 2, 1.0), model, model, 0)
    assert NAME_B in other.payload
    assert other.since == 0


def test_where_nobody_remembers_all_but_the_start_travels_every_time() -> None:
    made = parcels(remembering=False)
    model = {**drawn(WHO, 0), **{n: torch.ones(4, 2) for n in NAMES if part_of(n) == "lora_B"}}
    for _ in range(3):
        parcel = made.pack(WHO, model, model, 0)
        made.arrived(0, parcel)
        assert parcel.payload.keys() == {n for n in NAMES if part_of(n) == "lora_B"}
        assert parcel.since == 0
        assert digest(Holder().unpack(parcel)) == digest(model)


@pytest.mark.parametrize("form", ["float32", "float16"])
@settings(deadline=None)
@given(data=st.data())
def test_whatever_happens_the_client_has_what_the_server_believes(
    form: Format, data: st.DataObject
) -> None:
    """Any order of merges, restarts, losses and messages that only seem lost; names come back too.

    A tensor travels only if the client does not hold this very one, or cannot be known to.
    """
    made, client = parcels(form), Holder()
    known: dict[str, Tensor] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        restart = data.draw(st.integers(0, 1))
        start = drawn(WHO, restart)
        values = {n: data.draw(st.sampled_from([None, 1 / 3, 2 / 3])) for n in NAMES}
        model = {n: t if values[n] is None else t + values[n] for n, t in start.items()}
        parcel = made.pack(WHO, model, model, restart)
        for name in parcel.payload:
            assert name not in known or not torch.equal(known[name], model[name])
        fate = data.draw(st.sampled_from(["arrives", "reply is lost", "is lost"]))
        if fate != "is lost":
            assert digest(client.unpack(parcel, restart)) == digest(parcel.model)
        if fate == "arrives":
            made.arrived(0, parcel)
            known = model
            allowed = 0.0 if form == "float32" else 2.0**-11
            for name, tensor in model.items():
                torch.testing.assert_close(parcel.model[name], tensor, rtol=allowed, atol=0)
        else:
            made.lost(0)
            known = {}


# --- changes of the base --------------------------------------------------------------------------


def changed(state: Tensors, seed: int, rank: int = 1) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    sizes = (8, rank), (rank, 6)
    B, A = (torch.randn(size, generator=stream) for size in sizes)
    return change_base(state, {MODULE: Term(B, A)})


def model_in(state: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "/" not in name}


@pytest.mark.parametrize(
    ("missed_rounds", "travels"),
    [
        (0, "nothing"),
        (1, "changes"),
        (2, "changes"),
        (3, "changes"),
        (4, "residual"),
        (9, "residual"),
    ],
)
def test_an_absent_client_catches_up_in_the_smaller_way(missed_rounds: int, travels: str) -> None:
    """A change has (8 + 6)·1 numbers and the residual 8·6: from the fourth on this is smaller."""
    made, client = parcels(), Holder()
    state = changed(drawn(WHO, 0), seed=100)
    first = made.pack(WHO, model_in(state), state, 0)
    client.unpack(first)
    made.arrived(0, first)
    for number in range(missed_rounds):
        state = changed(state, seed=number)
    parcel = made.pack(WHO, model_in(state), state, 0)
    if travels == "residual":
        assert parcel.payload.keys() == {residual_name(MODULE)}
    else:
        assert all(is_change(name) for name in parcel.payload)
        assert sum(t.numel() for t in parcel.payload.values()) == 14 * missed_rounds
    # To the bit, whichever way it came.
    assert digest(client.unpack(parcel)) == digest(parcel.model) == digest(model_in(state))


@pytest.mark.parametrize("form", ["float32", "float16"])
@pytest.mark.parametrize("rounds", [1, 6])
def test_a_lost_client_is_sent_the_whole_base_in_full(form: Format, rounds: int) -> None:
    made = parcels(form)
    state = drawn(WHO, 0)
    for number in range(rounds):
        state = changed(state, seed=number)
        made.arrived(0, made.pack(WHO, model_in(state), state, 0))
    made.lost(0)
    parcel = made.pack(WHO, model_in(state), state, 0)
    assert parcel.since == 0
    assert {tensor.dtype for tensor in parcel.payload.values()} == {torch.float32}
    held = Holder().unpack(parcel)
    assert torch.equal(held[residual_name(MODULE)], state[residual_name(MODULE)])


# --- through the bridge ---------------------------------------------------------------------------


def run(experiment: Experiment, clients: Clients = client_app) -> Outcomes:
    grid = LocalGrid(clients, experiment.partition.clients)  # type: ignore[arg-type]
    nodes = find_clients(grid, experiment.partition.clients, timeout=1.0)
    return run_federation(grid, experiment, Evaluator(experiment), nodes, lambda _: None)


def statuses(row: Mapping[str, Any]) -> dict[int, str]:
    return {client["client"]: client["status"] for client in row["clients"]}


def failing(client: int, rounds: Sequence[int]) -> Clients:
    """Clients of which one raises, in these rounds."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            if plan.client == client and plan.round in rounds:
                raise OSError("the disk of this client is full")
        return client_app(message, context)

    return answer


@pytest.fixture
def both_sides(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensors], list[Tensors]]:
    """What clients start from, and what the server believes they do, in the same order."""
    started: list[Tensors] = []
    believed: list[Tensors] = []
    plain_returned, plain_resolve = app.returned, flower_strategy.resolve

    def note_start(plan: Any, seed: int, scale: float, held: Tensors, *rest: Any) -> Any:
        started.append(held)
        return plain_returned(plan, seed, scale, held, *rest)

    def note_belief(experiment: Experiment) -> Any:
        strategy = plain_resolve(experiment)

        def merge(state: Tensors, updates: Sequence[Update], probe: Probe | None) -> Merged:
            believed.extend(update.sent for update in updates)
            return strategy.merge(state, updates, probe)

        return type(strategy)(**{**strategy.__dict__, "merge": merge})

    monkeypatch.setattr(app, "returned", note_start)
    monkeypatch.setattr(flower_strategy, "resolve", note_belief)
    return started, believed


@pytest.mark.parametrize("name", LORA_METHODS)
def test_the_server_knows_to_the_bit_what_its_clients_start_from(
    digits_experiment: Build, both_sides: tuple[list[Tensors], list[Tensors]], name: str
) -> None:
    """In half precision, at unequal ranks, after absences and failures; or increments go astray."""
    started, believed = both_sides
    experiment = digits_experiment(
        strategy__name=name,
        partition__clients=4,
        federation__fraction=0.75,
        federation__rounds=6,
        # Scored in mid-run too: what is sent for scoring must not count as held.
        federation__evaluate_every=3,
        train__local_steps=1,
        wire__down="float16",
        adapter__ranks=[2, 4] if STRATEGIES[name].unequal_ranks else [4],
    )
    outcomes = run(experiment, failing(0, rounds=[2, 3]))
    assert "failed" in {status for row in outcomes.rounds for status in statuses(row).values()}
    assert len(started) >= 5
    assert [digest(tensors) for tensors in started] == [digest(tensors) for tensors in believed]


def test_the_oracles_residual_travels_in_float64_whatever_the_wire(
    digits_experiment: Build, both_sides: tuple[list[Tensors], list[Tensors]]
) -> None:
    started, _ = both_sides
    outcomes = run(digits_experiment(strategy__name="dense-oracle", wire__down="float16"))
    last = started[-1]
    residuals = {name: tensor for name, tensor in last.items() if is_residual(name)}
    assert {tensor.dtype for tensor in residuals.values()} == {torch.float64}
    assert all(bool(tensor.any()) for tensor in residuals.values())
    assert outcomes.rounds[1]["bytes"]["down"]["residual"] == 3 * 8 * 16 * 16 * 8


def test_a_client_whose_memory_is_gone_says_so_and_is_sent_everything(
    digits_experiment: Build,
) -> None:
    experiment = digits_experiment(federation__rounds=4)

    def forgetful(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            if (plan.client, plan.round) == (1, 3):
                context.state = RecordDict()
        return client_app(message, context)

    outcomes = run(experiment, forgetful)
    assert [statuses(row)[1] for row in outcomes.rounds] == ["ok", "ok", "failed", "ok"]
    assert "no longer holds parcel" in outcomes.rounds[2]["clients"][1]["reason"]
    sent = outcomes.rounds[3]["clients"][1]["bytes"]["down"]
    assert (sent["A"], sent["B"], sent["head"]) == (8 * 64 * 4, 8 * 64 * 4, 170 * 4)
    assert outcomes.digest == run(experiment, failing(1, rounds=[3])).digest


def test_a_client_that_lost_everything_is_sent_what_does_not_change_too(
    digits_experiment: Build,
) -> None:
    """RoLoRA sends B and A in turn: after a loss both."""
    outcomes = run(
        digits_experiment(strategy__name="rolora", federation__rounds=5), failing(1, rounds=[3])
    )
    kinds = [
        {kind for kind in ("A", "B") if kind in row["clients"][1]["bytes"]["down"]}
        for row in outcomes.rounds
    ]
    assert kinds == [set(), {"B"}, {"A"}, {"A", "B"}, {"A"}]


def test_a_late_client_is_sent_what_it_has_missed_and_charged_for_it(
    digits_experiment: Build,
) -> None:
    """FLoRA changes the base every round: an absent client needs every change, or the base."""
    experiment = digits_experiment(
        strategy__name="flora",
        adapter__rank=1,
        partition__clients=3,
        federation__fraction=0.34,
        federation__rounds=8,
        train__local_steps=1,
    )
    outcomes = run(experiment)
    # A cohort of one: a change has 8 modules of (16 + 16) numbers, and the base 8 of 16x16.
    seen: dict[int, int] = {}
    for row in outcomes.rounds:
        (client,) = row["clients"]
        absent = row["round"] - 1 - seen.get(client["client"], 0)
        expected = 4 * min(8 * 32 * absent, 8 * 256)
        assert client["bytes"]["down"].get("residual", 0) == expected
        seen[client["client"]] = row["round"] - 1
    assert len(seen) == 3


class _Poison:
    """Training that diverges at one client in round 2."""

    def __init__(self, plain: Callable[..., Any], client: int) -> None:
        self._plain, self._client, self._turn = plain, client, 0

    def __call__(self, model: Any, rows: Any, run: Any, *rest: Any) -> Any:
        trained = self._plain(model, rows, run, *rest)
        if run.first_step == run.steps:
            if self._turn == self._client:
                with torch.no_grad():
                    for parameter in model.parameters().values():
                        parameter.fill_(float("inf"))
            self._turn += 1
        return trained


@pytest.mark.parametrize("name", ["fedavg", "fedsa-lora", "scaffold"])
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_client_that_diverged_once_takes_part_again(
    digits_experiment: Build, monkeypatch: pytest.MonkeyPatch, name: str, form: Format
) -> None:
    """What it keeps to itself must not carry NaN into every later round."""
    monkeypatch.setattr(app, "train_locally", _Poison(app.train_locally, client=1))
    outcomes = run(digits_experiment(strategy__name=name, wire__up=form, federation__rounds=4))
    assert [statuses(row)[1] for row in outcomes.rounds] == ["ok", "refused", "ok", "ok"]
    for row in outcomes.rounds:
        assert [statuses(row)[client] for client in (0, 2)] == ["ok", "ok"]
        assert row["own_loss"] < 10


# --- nodes that several clients share -------------------------------------------------------------


def run_shared(experiment: Experiment, nodes: int) -> Outcomes:
    grid = LocalGrid(client_app, nodes)
    shared = share_nodes(grid, experiment.partition.clients, patience=0.0)
    assert len(set(shared.values())) == nodes
    evaluator = Evaluator(experiment)
    return run_federation(grid, experiment, evaluator, shared, lambda _: None, remembering=False)


def needs_memory(name: str) -> bool:
    return bool(STRATEGIES[name].client_state or STRATEGIES[name].cost.up[0].count("q"))


@pytest.mark.parametrize("name", [name for name in LORA_METHODS if not needs_memory(name)])
def test_nodes_that_several_clients_share_give_the_same_digest(
    digits_experiment: Build, name: str
) -> None:
    experiment = digits_experiment(
        strategy__name=name, federation__rounds=3, federation__fraction=0.7
    )
    plain, shared = run(experiment), run_shared(experiment, nodes=2)
    assert shared.digest == plain.digest
    assert [row["loss"] for row in shared.rounds] == [row["loss"] for row in plain.rounds]


def test_shared_nodes_are_sent_everything_every_time(digits_experiment: Build) -> None:
    experiment = digits_experiment(strategy__name="rolora", federation__rounds=4)
    plain, shared = run(experiment), run_shared(experiment, nodes=2)
    each = 3 * 8 * 64 * 4
    down = [[row["bytes"]["down"].get(kind, 0) for kind in ("A", "B")] for row in shared.rounds]
    # A that has not been trained yet is drawn, as ever.
    assert down == [[0, 0], [0, each], [each, each], [each, each]]
    once = [[row["bytes"]["down"].get(kind, 0) for kind in ("A", "B")] for row in plain.rounds]
    assert once == [[0, 0], [0, each], [each, 0], [0, each]]


@pytest.mark.parametrize("name", [name for name in LORA_METHODS if needs_memory(name)])
def test_shared_nodes_refuse_methods_whose_clients_have_to_remember(
    digits_experiment: Build, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"share_nodes.* {name} needs clients that remember"):
        run_shared(digits_experiment(strategy__name=name), nodes=2)


def test_shared_nodes_refuse_feedback_that_they_would_forget(digits_experiment: Build) -> None:
    with pytest.raises(ConfigError, match=r"share_nodes.* wire.up = 'int8'"):
        run_shared(digits_experiment(wire__up="int8"), nodes=2)
    forgetting = digits_experiment(strategy__name="flora", wire__up="int8")
    assert run_shared(forgetting, nodes=2).digest == run(forgetting).digest


# --- what a method costs --------------------------------------------------------------------------


def sizes(experiment: Experiment, start: Tensors, cohort: Sequence[int], client: int) -> Sizes:
    """Return what the formulas are made of, from the shapes of the common start alone."""

    def own(k: int) -> dict[str, Tensor]:
        return at_rank(start, experiment.adapter.rank_of(k))

    def numbers(state: Tensors, *parts: str) -> int:
        return sum(tensor.numel() for name, tensor in state.items() if part_of(name) in parts)

    outputs = [start[factor_names(module)[0]].shape[0] for module in adapted_modules(start)]
    inputs = [start[factor_names(module)[1]].shape[1] for module in adapted_modules(start)]
    return Sizes(
        A=numbers(own(client), "lora_A"),
        B=numbers(own(client), "lora_B"),
        H=numbers(own(client), "head"),
        P=numbers(own(client), "prompt"),
        D=sum(m * n for m, n in zip(outputs, inputs, strict=True)),
        m=sum(outputs),
        n=sum(inputs),
        q=resolve(experiment).rules.sketch,
        S=sum(numbers(own(k), "lora_A", "lora_B") for k in cohort),
        K=len(cohort),
    )


def rounds_to_cost(cost: Cost) -> int:
    """Return so many rounds that after the first one every formula has its turn twice."""
    return 1 + 2 * max(len(cost.up), len(cost.down))


def check_cost(experiment: Experiment) -> None:
    """Demand that every client's payload, from round 2 on, is what the table says.

    Where the ranks of clients do not shrink.
    """
    cost = STRATEGIES[experiment.strategy_name].cost
    start = Evaluator(experiment).initial(0)
    outcomes = run(experiment)
    assert [row["round"] for row in outcomes.rounds] == list(range(1, rounds_to_cost(cost) + 1))
    for row in outcomes.rounds[1:]:
        cohort = [client["client"] for client in row["clients"]]
        for client in row["clients"]:
            found = sizes(experiment, start, cohort, client["client"])
            up, down = cost.numbers(found, row["round"])
            for direction, expected in (("up", up), ("down", down)):
                counted = client["bytes"][direction]
                payload = sum(n for k, n in counted.items() if k not in ("protocol", "total"))
                assert payload == 4 * expected, (row["round"], client["client"], direction)


@pytest.mark.parametrize("rank", [2, 6], ids=lambda rank: f"rank{rank}")
@pytest.mark.parametrize("name", LORA_METHODS)
def test_a_method_costs_what_its_formula_says(
    digits_experiment: Build, name: str, rank: int
) -> None:
    """Ranks 2 and 6: of three clients' stacked factors or the dense matrix either is smaller."""
    # Plain SGD at AdamW's rate would leave some factors as they are to the bit, and so at home.
    rate = 0.5 if STRATEGIES[name].optimiser == "sgd" else 0.02
    check_cost(
        digits_experiment(
            strategy__name=name,
            strategy__hetlora__tail_share=1.0,
            adapter__rank=rank,
            federation__rounds=rounds_to_cost(STRATEGIES[name].cost),
            federation__evaluate_every=5,
            train__learning_rate=rate,
        )
    )


@pytest.mark.parametrize("name", [n for n, m in STRATEGIES.items() if "prompt" in m.adapters])
def test_a_method_for_soft_prompts_costs_what_its_formula_says(
    clip_folder: Path, name: str
) -> None:
    """Of captions and of pictures; the prompts and nothing else."""
    tables = {
        "task": {"name": "digits", "limit": 120, "probe_examples": 0},
        "partition": {"kind": "iid", "clients": 3},
        "backbone": {"path": str(clip_folder)},
        "adapter": {"kind": "prompt", "prompt": {"length": 4, "visual": 2}},
        "train": {
            "local_steps": 1,
            "batch_size": 8,
            "learning_rate": 0.1,
            "optimiser": STRATEGIES[name].optimiser or "adamw",
        },
        "federation": {
            "rounds": rounds_to_cost(STRATEGIES[name].cost),
            "workers": 0,
            "evaluate_every": 5,
        },
        "strategy": {"name": name},
    }
    experiment = build_experiment(tables)
    found = sizes(experiment, Evaluator(experiment).initial(0), [0, 1, 2], 0)
    assert (found.A, found.B, found.H, found.P) == (0, 0, 0, 4 * 12 + 2 * 16)
    check_cost(experiment)


@pytest.mark.parametrize("name", [name for name in LORA_METHODS if STRATEGIES[name].unequal_ranks])
def test_a_client_of_low_rank_pays_for_its_own(digits_experiment: Build, name: str) -> None:
    experiment = digits_experiment(
        strategy__name=name,
        strategy__hetlora__tail_share=1.0,
        adapter__ranks=[2, 6, 3],
        federation__rounds=rounds_to_cost(STRATEGIES[name].cost),
        federation__evaluate_every=5,
    )
    assert len({client.rank for client in setting_of(experiment).clients}) == 3
    check_cost(experiment)
