"""Methods that change the base, or leave parts at the client: what is kept and caught up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from test_federation import run
from torch import Tensor
from toy_federation import (
    MODULES,
    assert_close,
    build,
    client,
    cohort,
    common_start,
    delta_of,
    deltas,
    drift,
    mean_deltas,
    play,
    truncated,
    updates_of,
)

from clients.app import app as client_app
from common.adapters import AdaptedBackbone
from common.config import Experiment
from common.lowrank import Term, factor_names, kaiming_start
from common.memory import Memory, under
from common.messages import Plan, recall, unpack_instruction, unpack_scores, unpack_update
from common.models import load_model
from common.residuals import (
    base_version,
    caught_up,
    change_base,
    is_change,
    is_residual,
    missed,
    residual_name,
)
from common.tensors import Tensors, digest, part_of
from server.evaluation import Evaluator
from server.parcels import Parcel, Parcels
from strategies import STRATEGIES
from strategies.base import Client, Update
from strategies.cost import Sizes

Build = Callable[..., Experiment]
FULL = (0, 1, 2, 3)
RANKS = (2, 4, 8)

# --- changes of the base --------------------------------------------------------------------------

SIZES = {"enc.0.query": (12, 10), "enc.0.value": (10, 10)}


def change(seed: int, rank: int = 1) -> dict[str, Term]:
    stream = torch.Generator().manual_seed(seed)
    return {
        module: Term(torch.randn(m, rank, generator=stream), torch.randn(rank, n, generator=stream))
        for module, (m, n) in SIZES.items()
    }


def states(changes: int, rank: int = 1) -> list[dict[str, Tensor]]:
    """Return the states after 0, 1, … changes."""
    every: list[dict[str, Tensor]] = [{"head.toy.bias": torch.ones(3)}]
    for number in range(changes):
        every.append(change_base(every[-1], change(number, rank)))
    return every


def residuals(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if is_residual(name)}


def test_the_residual_is_the_sum_of_all_changes() -> None:
    every = states(4, rank=2)
    assert [base_version(state) for state in every] == [0, 1, 2, 3, 4]
    for module in SIZES:
        total = sum(change(k, 2)[module].B @ change(k, 2)[module].A for k in range(4))
        torch.testing.assert_close(every[-1][residual_name(module)], total)
    assert torch.equal(every[-1]["head.toy.bias"], torch.ones(3))
    assert not residuals(every[0])


def test_a_change_leaves_the_state_before_it_alone() -> None:
    every = states(2)
    before = digest(every[1])
    change_base(every[1], change(7))
    assert digest(every[1]) == before


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_whoever_missed_whatever_catches_up_to_the_same_bits(rank: int) -> None:
    every = states(12, rank)
    forms = set()
    for version, held in enumerate(every):
        for later in every[version:]:
            parcel = missed(later, version)
            assert digest(caught_up(held, parcel)) == digest(residuals(later))
            forms |= {(is_change(name), is_residual(name)) for name in parcel}
    assert forms == {(True, False), (False, True)}


def test_the_smaller_form_travels() -> None:
    """A change of rank 1 is 22 + 20 numbers, the residuals 120 + 100: five changes are fewer."""
    latest = states(12)[-1]
    for absent in range(1, 13):
        parcel = missed(latest, 12 - absent)
        assert sum(tensor.numel() for tensor in parcel.values()) == min(42 * absent, 220)
        assert all(map(is_residual if absent > 5 else is_change, parcel))


def test_whoever_missed_nothing_is_sent_nothing() -> None:
    latest = states(3)[-1]
    assert missed(latest, 3) == {}
    assert digest(caught_up(residuals(latest), {})) == digest(residuals(latest))


def test_old_changes_are_forgotten_once_the_residual_is_no_larger() -> None:
    for number, state in enumerate(states(20)):
        kept = sum(tensor.numel() for name, tensor in state.items() if is_change(name))
        assert kept == 42 * min(number, 5)
        assert base_version(state) == number
    # However large, the latest is kept: a version has no other mark.
    large = states(3, rank=10)[-1]
    assert base_version(large) == 3
    assert all(map(is_residual, missed(large, 2)))


# --- FLoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_the_mean_of_the_deltas_is_served_exactly(name: str) -> None:
    """At alpha ≠ r, on matrices that are not square, with unequal weights, on a changed base."""
    strategy = build(name)
    state = play(strategy, [cohort(*FULL), cohort(0, 2)])
    updates = updates_of(strategy, state, cohort(1, 2, 3), drift(5))
    (model,) = strategy.serve(strategy.merge(state, updates, None).state)
    expected = mean_deltas(updates)
    assert_close(deltas(model), expected)
    assert all(float(delta.norm()) > 0.1 for delta in expected.values())


def test_flora_is_exact_at_unequal_ranks() -> None:
    """Scales 3, 1.5 and 0.75: the scale stands inside the sum."""
    strategy = build("flora", rank=8, ranks=RANKS)
    state = play(strategy, [cohort(*FULL, ranks=RANKS)] * 2)
    updates = updates_of(strategy, state, cohort(*FULL, ranks=RANKS), drift(5))
    (model,) = strategy.serve(strategy.merge(state, updates, None).state)
    assert_close(deltas(model), mean_deltas(updates))


def one_by_one(strategy: Any, state: Tensors, trained: dict[int, tuple[float, float]]) -> Tensors:
    """Merge clients of 30 and 10 examples whose only module is `b·a`, both numbers."""
    updates = []
    for number, (b, a) in trained.items():
        sent = strategy.send(state, client(number, 1))
        name_B, name_A = factor_names("enc.0.q")
        returned = {**sent, name_B: torch.tensor([[b]]), name_A: torch.tensor([[a]])}
        updates.append(Update(client(number, 1), (30, 10)[number], returned, sent))
    merged: Tensors = strategy.merge(state, updates, None).state
    return merged


def test_flora_by_hand() -> None:
    """s = 6: 6·(¾·2·3 + ¼·4·1) = 33, and again on top of it; the adapter adds nothing."""
    strategy = build("flora", rank=1)
    state = strategy.start(common_start(1, modules={"enc.0.q": (1, 1)}))
    first = one_by_one(strategy, state, {0: (2.0, 3.0), 1: (4.0, 1.0)})
    assert float(first[residual_name("enc.0.q")]) == pytest.approx(33.0)
    second = one_by_one(strategy, first, {0: (-1.0, 1.0)})
    assert float(second[residual_name("enc.0.q")]) == pytest.approx(33.0 - 6.0)
    assert float(delta_of(second, "enc.0.q", 6.0)) == pytest.approx(27.0)


def test_flora_restarts_with_an_a_that_is_new_every_round() -> None:
    strategy = build("flora", rank=4)
    state = strategy.start(common_start())
    for restart in (1, 2, 3):
        updates = updates_of(strategy, state, cohort(*FULL), drift(restart))
        state = strategy.merge(state, updates, None).state
        for module, (_, n) in MODULES.items():
            name_B, name_A = factor_names(module)
            assert torch.equal(state[name_A], kaiming_start(4, n, module, 0, restart))
            assert not state[name_B].any()


# --- FedEx-LoRA -----------------------------------------------------------------------------------


def test_fedex_by_hand() -> None:
    """s = 6, means 2.5 and 2.5: 6·(¾·2·3 + ¼·4·1 - 2.5·2.5) = 6·(5.5 - 6.25) = -4.5."""
    strategy = build("fedex-lora", rank=1)
    state = strategy.start(common_start(1, modules={"enc.0.q": (1, 1)}))
    merged = one_by_one(strategy, state, {0: (2.0, 3.0), 1: (4.0, 1.0)})
    assert [float(merged[name]) for name in factor_names("enc.0.q")] == [2.5, 2.5]
    assert float(merged[residual_name("enc.0.q")]) == pytest.approx(-4.5)


def test_fedex_sends_the_factors_of_fedavg_and_k_minus_one_blocks() -> None:
    strategy, plain = build("fedex-lora"), build("fedavg")
    start = strategy.start(common_start())
    updates = updates_of(strategy, start, cohort(*FULL), drift(0))
    merged = strategy.merge(start, updates, None).state
    averaged = plain.merge(start, updates, None).state
    assert_close({name: merged[name] for name in averaged}, averaged, tolerance=0)
    for module, (m, n) in MODULES.items():
        name_B, name_A = factor_names(module)
        assert merged[f"base.1/{name_B}"].shape == (m, 3 * 4)
        assert merged[f"base.1/{name_A}"].shape == (3 * 4, n)


def test_a_round_of_one_client_changes_no_base() -> None:
    strategy = build("fedex-lora")
    before = play(strategy, [cohort(*FULL)])
    (update,) = updates_of(strategy, before, cohort(2), drift(5))
    after = strategy.merge(before, [update], None).state
    assert base_version(after) == base_version(before) == 1
    (model,) = strategy.serve(after)
    assert_close(model.tensors, update.tensors)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_residual_is_the_best_of_its_rank(rank: int) -> None:
    whole, cut = build("fedex-lora"), build("fedex-lora", residual_rank=rank)
    state = whole.start(common_start())
    updates = updates_of(whole, state, cohort(*FULL), drift(0))
    exact, merged = whole.merge(state, updates, None).state, cut.merge(state, updates, None)
    kept = total = 0.0
    for module, (m, n) in MODULES.items():
        name_B, name_A = factor_names(module)
        assert merged.state[f"base.1/{name_B}"].shape == (m, rank)
        assert merged.state[f"base.1/{name_A}"].shape == (rank, n)
        dense = exact[residual_name(module)].double()
        best = truncated(dense, rank)
        torch.testing.assert_close(
            merged.state[residual_name(module)].double(), best, rtol=0, atol=1e-6
        )
        kept, total = kept + float(best.square().sum()), total + float(dense.square().sum())
    assert merged.diagnostics["residual_kept_energy"] == pytest.approx(kept / total)
    assert 0 < kept / total < 0.95


# --- through the bridge ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One message to a client, and what it made of it."""

    kind: str
    plan: Plan
    received: Tensors
    before: Memory
    loaded: Tensors
    after: Memory
    reply: RecordDict


@dataclass
class Watched:
    """Clients that do their work, and let what they load and remember be seen."""

    loads: list[Tensors] = field(default_factory=list)
    parcels: dict[tuple[int, int], Parcel] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return client_app(message, context)
        plan, received = unpack_instruction(message.content)
        before = recall(context.state, plan.client, plan.run)
        reply = client_app(message, context)
        after = recall(context.state, plan.client, plan.run)
        self.exchanges.append(
            Exchange(
                message.metadata.message_type,
                plan,
                received,
                before,
                self.loads[-1],
                after,
                reply.content,
            )
        )
        return reply

    def of(self, client: int, server_round: int, kind: str = "train") -> Exchange:
        (found,) = (
            e
            for e in self.exchanges
            if (e.plan.client, e.plan.round, e.kind) == (client, server_round, kind)
        )
        return found

    def trained(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.kind == "train"]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    plain_load, plain_pack = AdaptedBackbone.load, Parcels.pack

    def load(model: AdaptedBackbone, state: Tensors, *rest: Any) -> None:
        seen.loads.append(dict(state))
        plain_load(model, state, *rest)

    def pack(parcels: Parcels, to: Client, *rest: Any) -> Parcel:
        parcel = plain_pack(parcels, to, *rest)
        seen.parcels[to.client, parcel.number] = parcel
        return parcel

    monkeypatch.setattr(AdaptedBackbone, "load", load)
    monkeypatch.setattr(Parcels, "pack", pack)
    return seen


@pytest.fixture
def cohorts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[int]]], None]:
    """A function of the cohorts of all rounds, which replaces their draw."""

    def fix(wanted: Sequence[Sequence[int]]) -> None:
        monkeypatch.setattr(
            "server.flower_strategy.choose_cohort",
            lambda _, server_round: list(wanted[server_round - 1]),
        )

    return fix


MODULES_OF_VIT, NUMBERS = 8, 4  # 16x16 each; bytes of a float32


@pytest.mark.parametrize(
    ("name", "ranks", "away", "dense"),
    [
        # At rank 1 the stack of K clients has rank K, the residual of FedEx rank K - 1.
        ("flora", (3, 2), 1, False),
        ("flora", (3, 2), 3, True),
        ("fedex-lora", (2, 1), 3, False),
        ("fedex-lora", (2, 1), 7, True),
    ],
)
def test_a_client_that_was_away_catches_up_to_the_bit_and_is_charged_for_it(
    digits_experiment: Build,
    watched: Watched,
    cohorts: Callable[[Sequence[Sequence[int]]], None],
    name: str,
    ranks: tuple[int, int],
    away: int,
    dense: bool,
) -> None:
    last = away + 2
    cohorts([(0, 1, 2), *[(0, 2)] * away, (0, 1, 2)])
    experiment = digits_experiment(
        strategy__name=name, adapter__rank=1, adapter__alpha=3.0, federation__rounds=last
    )
    outcomes = run(experiment, watched)
    present, back = watched.of(0, last), watched.of(1, last)
    assert back.plan.since, "it is not sent everything again"
    assert digest(back.after.held) == digest(present.after.held)
    assert digest(back.loaded) == digest(present.loaded)
    assert any(bool(tensor.any()) for tensor in residuals(back.loaded).values())
    assert {is_residual(n) for n in back.received if is_change(n) or is_residual(n)} == {dense}

    def charged(client: int) -> int:
        return int(outcomes.rounds[-1]["clients"][client]["bytes"]["down"]["residual"])

    per_rank = MODULES_OF_VIT * (16 + 16) * NUMBERS
    missed_ranks = ranks[0] + away * ranks[1]
    assert charged(1) == min(missed_ranks * per_rank, MODULES_OF_VIT * 16 * 16 * NUMBERS)
    assert charged(0) == ranks[1] * per_rank
    assert dense == (missed_ranks > 8)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_a_client_that_failed_for_three_rounds_is_sent_everything_again(
    digits_experiment: Build, watched: Watched, name: str
) -> None:
    def failing(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            if plan.client == 1 and plan.round in (2, 3, 4):
                raise OSError("the disk of this client is full")
        return watched(message, context)

    experiment = digits_experiment(strategy__name=name, adapter__rank=1, federation__rounds=5)
    outcomes = run(experiment, failing)
    present, back = watched.of(0, 5), watched.of(1, 5)
    assert [row["clients"][1]["status"] for row in outcomes.rounds] == ["ok", *["failed"] * 3, "ok"]
    assert back.plan.since == 0
    assert digest(back.after.held) == digest(present.after.held)
    for row in outcomes.rounds[1:]:
        assert row["clients"][1]["bytes"]["down"]["residual"] > 0


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_clients_hold_what_the_server_believes_they_hold(
    digits_experiment: Build, watched: Watched, name: str, fraction: float
) -> None:
    settings = {"partition__clients": 4, "federation__fraction": fraction, "federation__rounds": 5}
    ranks = [2, 1] if name == "flora" else []
    run(digits_experiment(strategy__name=name, adapter__ranks=ranks, **settings), watched)
    assert watched.exchanges
    for exchange in watched.trained():
        believed = watched.parcels[exchange.plan.client, exchange.plan.parcel].model
        assert digest(exchange.after.held) == digest(believed)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    "name", ["flora", "fedex-lora", "fedsa-lora", "fedavgm", "fedadam", "fedprox", "scaffold"]
)
def test_what_travels_is_what_the_table_of_costs_says(
    digits_experiment: Build, name: str, rank: int
) -> None:
    """From the second round on, for clients that take part in all; at rank 4 dense is smaller."""
    factor = MODULES_OF_VIT * 16 * rank
    sizes = Sizes(
        A=factor, B=factor, H=170, P=0, D=8 * 256, m=8 * 16, n=8 * 16, q=0, S=3 * 2 * factor, K=3
    )
    experiment = digits_experiment(
        strategy__name=name,
        adapter__rank=rank,
        adapter__alpha=2.0 * rank,
        federation__rounds=3,
        train__learning_rate=0.2,  # so that every tensor moves by more than float32 can miss
    )
    for row in run(experiment).rounds[1:]:
        for told in row["clients"]:
            expected = STRATEGIES[name].cost.numbers(sizes, row["round"])
            for direction, numbers in zip(("up", "down"), expected, strict=True):
                counted = told["bytes"][direction]
                assert counted["total"] - counted["protocol"] == NUMBERS * numbers


def test_flora_sends_the_stack_and_the_head_alone(
    digits_experiment: Build, watched: Watched
) -> None:
    """The new A is drawn by each client, as the server draws it."""
    run(digits_experiment(strategy__name="flora", adapter__rank=1, federation__rounds=3), watched)
    for exchange in watched.trained():
        received = exchange.received
        if exchange.plan.round == 1:
            assert not received
            continue
        assert all(is_change(name) or part_of(name) == "head" for name in received)
        assert exchange.plan.restart == exchange.plan.round - 1
        for name, tensor in exchange.loaded.items():
            if part_of(name) == "lora_A":
                module = name.removesuffix(".lora_A.weight")
                drawn = kaiming_start(1, 16, module, 0, exchange.plan.restart)
                assert torch.equal(tensor, drawn)
            assert part_of(name) != "lora_B" or not tensor.any()


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_nothing_is_written_into_the_pretrained_weights(
    digits_experiment: Build, name: str
) -> None:
    experiment = digits_experiment(strategy__name=name, federation__rounds=3)
    model = load_model(experiment.backbone, "image", experiment.adapter, "cpu")
    assert isinstance(model, AdaptedBackbone)

    def frozen() -> dict[str, Tensor]:
        # PEFT renames a layer that it wraps.
        everything = model.backbone.encoder.state_dict()
        return {n.replace(".base_layer", ""): t for n, t in everything.items() if ".lora_" not in n}

    before = digest(frozen())
    served = run(experiment).served[0].tensors
    assert any(bool(tensor.any()) for tensor in residuals(served).values())
    assert digest(frozen()) == before
    assert len(frozen()) > 20


# --- FedSA-LoRA -----------------------------------------------------------------------------------


def test_fedsa_averages_a_alone() -> None:
    strategy = build("fedsa-lora")
    start = strategy.start(common_start())
    updates = updates_of(strategy, start, cohort(0, 1), drift(0))
    merged = strategy.merge(start, updates, None).state
    assert merged.keys() == start.keys()
    for name, tensor in merged.items():
        if part_of(name) == "lora_A":
            mean = (30 * updates[0].tensors[name] + 10 * updates[1].tensors[name]) / 40
            torch.testing.assert_close(tensor, mean)
            assert not torch.equal(tensor, start[name])
        else:
            assert torch.equal(tensor, start[name])


def kept(memory: Memory, *parts: str) -> dict[str, Tensor]:
    return {n: t for n, t in under("kept/", memory.own).items() if part_of(n) in parts}


def of_parts(tensors: Tensors, *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part_of(name) in parts}


def test_b_and_the_head_never_travel(digits_experiment: Build, watched: Watched) -> None:
    outcomes = run(digits_experiment(strategy__name="fedsa-lora", federation__rounds=3), watched)
    for exchange in watched.exchanges:
        assert {part_of(name) for name in exchange.received} <= {"lora_A"}
    for exchange in watched.trained():
        _, returned = unpack_update(exchange.reply)
        assert {part_of(name) for name in returned} == {"lora_A"}
    for row in outcomes.rounds:
        for direction in ("up", "down"):
            assert not row["bytes"][direction].keys() & {"B", "head"}
    assert outcomes.rounds[1]["bytes"]["down"]["A"] == 3 * MODULES_OF_VIT * 16 * 4 * NUMBERS


def test_every_client_goes_on_from_its_own_b_and_head(
    digits_experiment: Build,
    watched: Watched,
    cohorts: Callable[[Sequence[Sequence[int]]], None],
) -> None:
    """All pass through one model in one process, and client 1 misses two rounds."""
    cohorts([(0, 1), (0,), (0, 2), (0, 1, 2)])
    run(digits_experiment(strategy__name="fedsa-lora", federation__rounds=4), watched)
    latest: dict[int, dict[str, Tensor]] = {}
    for exchange in watched.exchanges:
        client, own = exchange.plan.client, of_parts(exchange.loaded, "lora_B", "head")
        if client in latest:
            assert digest(own) == digest(latest[client])
        else:
            assert not any(bool(t.any()) for t in of_parts(exchange.loaded, "lora_B").values())
        if exchange.kind == "train":
            latest[client] = kept(exchange.after, "lora_B", "head")
            assert latest[client].keys() == own.keys()
            assert digest(latest[client]) != digest(own)
    assert len({digest(own) for own in latest.values()}) == 3


def test_every_client_is_scored_by_itself_on_its_own_model(
    digits_experiment: Build,
    watched: Watched,
    cohorts: Callable[[Sequence[Sequence[int]]], None],
) -> None:
    """Client 2 has never trained: the shared A comes to nothing with its B of zero."""
    cohorts([(0, 1)] * 2)
    experiment = digits_experiment(strategy__name="fedsa-lora", partition__kind="dirichlet")
    outcomes = run(experiment, watched)
    for row in outcomes.rounds:
        assert (row["accuracy"], row["loss"]) == (None, None)
        asked = [watched.of(client, row["round"], "evaluate") for client in range(3)]
        scores = [unpack_scores(exchange.reply) for exchange in asked]
        assert row["own_accuracy"] == pytest.approx(sum(score[1] for score in scores) / 3)
        assert row["own_loss"] == pytest.approx(sum(score[2] for score in scores) / 3)
        assert len({score[2] for score in scores}) == 3
        initial = Evaluator(experiment).initial(0)
        assert_close(
            of_parts(asked[2].loaded, "lora_B", "head"),
            of_parts(initial, "lora_B", "head"),
            tolerance=0,
        )
        assert row["bytes"]["evaluation"]["total"] > 0
