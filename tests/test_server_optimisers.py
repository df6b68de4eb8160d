"""Optimisers on the server, and corrections at the client: by hand, and through whole runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from test_federation import run
from torch import Tensor
from toy_federation import (
    HEAD,
    assert_close,
    assert_same_models,
    build,
    client,
    cohort,
    common_start,
    drift,
    idle,
    play,
    setting,
    updates_of,
)

from clients.app import app as client_app
from clients.training import LocalRun, Trained, train_locally
from clients.upload import returned
from common.adapters import AdaptedBackbone
from common.backbones import load_backbone
from common.config import Adapter, Backbone, Copra, Experiment, Train
from common.errors import ConfigError
from common.features import Features
from common.memory import Memory, prefixed, under
from common.messages import Plan, recall, unpack_instruction, unpack_update
from common.rules import NO_RULES, LocalRules
from common.tasks import LabelledTask
from common.tensors import Tensors, digest, part_of
from strategies import STRATEGIES, resolve
from strategies.base import Merged, Served, Strategy, Update
from strategies.server_optimisers import Rule, optimised

Build = Callable[..., Experiment]
ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")
FULL = (0, 1, 2, 3)
PARTS = ("lora_A", "lora_B", "head")

# --- server optimisers ----------------------------------------------------------------------------


def chosen(name: str, **options: Any) -> Strategy:
    """Build with the method's own defaults, and not with what makes it neutral."""
    method = STRATEGIES[name]
    return method.build(method.options(**options), setting())


def steps(strategy: Strategy, deltas: Sequence[float]) -> list[float]:
    """Return the head's bias after each round in which it was trained to be higher by a Δ."""
    state = {"head.toy.bias": torch.ones(1)}
    found = []
    for delta in deltas:
        trained = {"head.toy.bias": state["head.toy.bias"] + delta}
        update = Update(client(0), 10, trained, state)
        state = dict(strategy.merge(state, [update], None).state)
        found.append(float(state["head.toy.bias"]))
    return found


ROOT = math.sqrt


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # v = 2, then ½·2 + 2.
        ("fedavgm", {"momentum": 0.5, "learning_rate": 0.5}, [2, 3.5]),
        # v = τ² + 4, then + 4.
        ("fedadagrad", {}, [1 + 2 / (ROOT(5) + 1), 1 + 2 / (ROOT(5) + 1) + 2 / 4]),
        # m = 1, then 1.5; v = ¾·1 + ¼·4 = 1.75, then ¾·1.75 + 1 = 2.3125.
        (
            "fedadam",
            {"beta1": 0.5, "beta2": 0.75},
            [
                1 + 1 / (ROOT(1.75) + 1),
                1 + 1 / (ROOT(1.75) + 1) + 1.5 / (ROOT(2.3125) + 1),
            ],
        ),
        # v = 1 + ½·4 = 3, since v < Δ²; then 3 + 2 = 5.
        (
            "fedyogi",
            {"beta1": 0.5, "beta2": 0.5},
            [1 + 1 / (ROOT(3) + 1), 1 + 1 / (ROOT(3) + 1) + 1.5 / (ROOT(5) + 1)],
        ),
    ],
)
def test_two_steps_by_hand(
    name: str, options: Mapping[str, float], expected: Sequence[float]
) -> None:
    """From 1, Δ = 2 twice; τ = 1 and η = 1 unless told otherwise."""
    unit = {"learning_rate": 1.0, "tau": 1.0} if name in ADAPTIVE else {}
    strategy = chosen(name, **{**unit, **options})
    assert steps(strategy, [2.0, 2.0]) == pytest.approx(expected, rel=1e-6)


def test_yogi_lets_go_of_its_second_moment_more_slowly_than_adam() -> None:
    """After a large Δ a small one: Adam's v falls by its half, Yogi's by half of the small Δ²."""
    options = {"beta1": 0.0, "beta2": 0.5, "tau": 1.0, "learning_rate": 1.0}
    adam, yogi = (steps(chosen(name, **options), [3.0, 1.0]) for name in ("fedadam", "fedyogi"))
    assert adam[1] - adam[0] == pytest.approx(1 / (ROOT(0.5 * 5 + 0.5) + 1))
    assert yogi[1] - yogi[0] == pytest.approx(1 / (ROOT(5.5 - 0.5) + 1))


def test_the_second_moment_starts_at_the_square_of_tau() -> None:
    """With β2 = 1 it stays there: a step is η·Δ/2τ."""
    strategy = chosen("fedadam", beta1=0.0, beta2=1.0, tau=0.1, learning_rate=0.05)
    assert steps(strategy, [1.0])[0] == pytest.approx(1 + 0.05 / 0.2)


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
@pytest.mark.parametrize("over", ["fedavg", "ffa-lora"])
def test_a_neutral_optimiser_is_the_method_underneath(name: str, over: str) -> None:
    rounds = [cohort(*FULL), cohort(0, 2), cohort(1, 2, 3)]
    strategy, plain = build(name, over=over), build(over)
    found, expected = play(strategy, rounds), play(plain, rounds)
    assert_same_models(strategy.serve(found), plain.serve(expected))


def test_momentum_goes_on_where_clients_stand_still() -> None:
    strategy = chosen("fedavgm", momentum=0.5)
    before = play(strategy, [cohort(*FULL)])
    after = play(strategy, [cohort(*FULL)], train=lambda _: idle, state=before)
    start = common_start()
    for name, tensor in start.items():
        torch.testing.assert_close(after[name] - before[name], 0.5 * (before[name] - tensor))


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
def test_only_what_was_trained_in_a_round_moves(name: str) -> None:
    """The head of a task that nobody of the cohort holds stays, and so do its moments."""
    strategy, tasks = chosen(name), ("news", "mail")
    state = strategy.start(common_start(tasks=tasks))
    for number, holders in enumerate([tasks, ("news",), ("news",)]):
        clients = [client(k, task=task) for k, task in enumerate(holders)]
        before = state
        updates = updates_of(strategy, state, clients, drift(number))
        state = strategy.merge(state, updates, None).state
        for entry in state:
            if not entry.startswith("server/"):
                moved = "head.mail." not in entry or "mail" in holders
                assert torch.equal(state[entry], before[entry]) != moved, entry
            elif "head.mail." in entry and "mail" not in holders:
                assert torch.equal(state[entry], before[entry]), entry


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
def test_over_ffa_lora_a_never_moves_and_has_no_moments(name: str) -> None:
    strategy = chosen(name, over="ffa-lora")
    state = play(strategy, [cohort(*FULL)] * 3)
    for entry, tensor in state.items():
        assert part_of(entry) != "lora_A" or torch.equal(tensor, common_start()[entry]), entry
    assert any(entry.startswith("server/v/") for entry in state)


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
def test_everything_stays_in_float32(name: str) -> None:
    state = play(chosen(name), [cohort(*FULL)] * 2)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_what_clients_are_sent_stays_in_float32(digits_experiment: Build) -> None:
    """Twice the bytes otherwise, in every round."""
    dtypes = set()

    def noting(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            _, received = unpack_instruction(message.content)
            dtypes.update(tensor.dtype for tensor in received.values())
        return reply

    outcomes = run(digits_experiment(strategy__name="fedadam"), noting)
    assert dtypes == {torch.float32}
    plain = run(digits_experiment(strategy__name="fedavg"))
    for kind in ("A", "B", "head"):
        for row, other in zip(outcomes.rounds[1:], plain.rounds[1:], strict=True):
            assert row["bytes"]["down"][kind] == other["bytes"]["down"][kind]


def test_any_method_that_moves_tensors_can_be_wrapped() -> None:
    """`optimised` asks nothing of the merge: here it goes to 5, whatever clients return."""
    inner = Strategy(
        start=dict,
        send=lambda state, _: state,
        merge=lambda state, updates, _: Merged(
            {**state, "head.toy.bias": torch.full((1,), 5.0 * len(list(updates)))}, {"note": 1}
        ),
        serve=lambda state: [Served(state, 4)],
    )
    seen: list[float] = []

    def step(moments: Mapping[str, Tensor], delta: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        seen.append(float(delta))
        return moments, delta / 4

    wrapped = optimised(inner, Rule(lambda _: {}, step))
    state = {"head.toy.bias": torch.ones(1)}
    merged = wrapped.merge(state, iter([Update(client(0), 10, state, state)]), None)
    assert float(merged.state["head.toy.bias"]) == 2.0
    assert seen == [4.0]
    assert merged.diagnostics == {"note": 1}


# --- local training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return empty_task("image")


@pytest.fixture(scope="module")
def vit(vit_folder: Path) -> AdaptedBackbone:
    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    return AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0))


@pytest.fixture
def local(
    vit: AdaptedBackbone, task: LabelledTask, picture_rows: Features
) -> Callable[..., tuple[Tensors, Tensors, Trained]]:
    """A function: the state before and after plain SGD without clipping, and what it says."""

    def go(
        steps: int,
        rules: LocalRules = NO_RULES,
        correction: Tensors | None = None,
        trains: Sequence[str] = PARTS,
        **settings: Any,
    ) -> tuple[Tensors, Tensors, Trained]:
        stream = torch.Generator().manual_seed(2)
        start = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=stream)
            for name, tensor in vit.initial((task,), seed=0).items()
        }
        vit.load(start, 2, task)
        plan = LocalRun(1, 0, steps, 8, tuple(trains), rules)
        sgd = Train(optimiser="sgd", max_grad_norm=1e9, **{"learning_rate": 0.05, **settings})
        trained = train_locally(vit, picture_rows, plan, sgd, Copra(), correction)
        return start, vit.state(), trained

    return go


def distance(one: Tensors, other: Tensors) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


# --- FedProx --------------------------------------------------------------------------------------


def test_the_proximal_gradient_is_mu_times_the_way_gone(local: Callable[..., Any]) -> None:
    """Nothing at the first step, where x = x_t; `µ(x_1 - x_t)` at the second."""
    rules = LocalRules(proximal=3.0)
    _, plain_once, _ = local(1)
    start, once, _ = local(1, rules)
    assert digest(once) == digest(plain_once)
    _, plain_twice, _ = local(2)
    _, twice, _ = local(2, rules)
    for name, tensor in twice.items():
        pull = 0.05 * 3.0 * (once[name] - start[name])
        torch.testing.assert_close(tensor, plain_twice[name] - pull, rtol=0, atol=1e-7)
    moved = {
        part for part in PARTS for n in once if part_of(n) == part and (once[n] - start[n]).any()
    }
    assert moved == set(PARTS)


def test_a_huge_mu_holds_a_client_where_it_started(local: Callable[..., Any]) -> None:
    """At η·µ = 1 every step takes back the last: never further away than one gradient."""
    start, free, _ = local(8)
    _, held, _ = local(8, LocalRules(proximal=20.0))
    assert 0 < distance(held, start) < 0.3 * distance(free, start)


@pytest.mark.parametrize("over", ["fedavg", "ffa-lora"])
def test_without_mu_it_is_the_method_underneath_to_the_bit(
    digits_experiment: Build, over: str
) -> None:
    def at(mu: float) -> str:
        settings = {"strategy__fedprox__mu": mu, "strategy__fedprox__over": over}
        return run(digits_experiment(strategy__name="fedprox", **settings)).digest

    plain = run(digits_experiment(strategy__name=over)).digest
    assert at(0.0) == plain
    assert at(10.0) != plain


# --- SCAFFOLD -------------------------------------------------------------------------------------


def test_scaffold_is_refused_with_an_optimiser_that_it_does_not_hold_for(
    digits_experiment: Build,
) -> None:
    with pytest.raises(ConfigError, match=r"train.optimiser = 'adamw'.*scaffold.*'sgd'") as refusal:
        resolve(digits_experiment(strategy__name="scaffold", train__optimiser="adamw"))
    offered = str(refusal.value).partition("choose from ")[2].split(", ")
    assert "fedavg" in offered
    assert "scaffold" not in offered
    resolve(digits_experiment(strategy__name="scaffold", train__optimiser="sgd"))


def test_the_total_rate_is_the_sum_of_the_rates_of_the_steps(
    local: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    plain = torch.optim.SGD.step

    def note(optimiser: torch.optim.SGD) -> None:
        rates.append(optimiser.param_groups[0]["lr"])
        plain(optimiser)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    _, _, trained = local(4, warmup=0.5, decay="linear")
    assert len(set(rates)) == 4
    assert trained.total_rate == pytest.approx(sum(rates))
    _, _, trained = local(4)
    assert trained.total_rate == pytest.approx(4 * 0.05)


def test_the_correction_is_added_to_every_gradient(local: Callable[..., Any]) -> None:
    start, plain, _ = local(1)
    stream = torch.Generator().manual_seed(3)
    correction = {n: torch.randn(t.shape, generator=stream) for n, t in start.items()}
    _, corrected, _ = local(1, correction=correction)
    for name, tensor in corrected.items():
        expected = plain[name] - 0.05 * correction[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


class ByHand:
    """Clients of one bias `x`, who take `J = 4` steps of rate 0.1 along gradients given by hand."""

    def __init__(self, gradients: Mapping[int, Callable[[Tensor], Tensor]], clients: int) -> None:
        method = STRATEGIES["scaffold"]
        self.strategy = method.build(method.options(), setting(clients=clients))
        self.gradients = gradients
        self.memories: dict[int, Memory] = {}
        self.state = self.strategy.start({"head.toy.bias": torch.zeros(1)})
        self.ends: dict[int, float] = {}

    def play(self, *numbers: int) -> None:
        rules, updates = self.strategy.rules, []
        for number in numbers:
            sent = self.strategy.send(self.state, client(number))
            memory = self.memories.get(number, Memory())
            own = under("control/", memory.own).get("head.toy.bias", torch.zeros(1))
            x = sent["head.toy.bias"]
            for _ in range(4):
                step = self.gradients[number](x) - own + sent["control/head.toy.bias"]
                x = x - 0.1 * step
            plan = Plan("", "", number, (), 1, 4, ("head",), 1, 0, (), 0, "", rules)
            factor = {"enc.0.q.lora_A.weight": torch.zeros(4, 2)}  # tells the rank
            start, end = {"head.toy.bias": sent["head.toy.bias"]}, {"head.toy.bias": x}
            trained = Trained(0.0, 4 * 0.1)
            upload = returned(plan, 0, 1.0, {**sent, **factor}, start, end, memory, trained)
            self.memories[number] = Memory(1, sent, upload.own)
            updates.append(Update(client(number), 10, {**sent, **upload.tensors}, sent))
            self.ends[number] = float(x)
        self.state = self.strategy.merge(self.state, updates, None).state

    @property
    def x(self) -> float:
        return float(self.state["head.toy.bias"])

    @property
    def common(self) -> float:
        return float(self.state["server/control/head.toy.bias"])

    def own(self, number: int) -> float:
        return float(self.memories[number].own["control/head.toy.bias"])


def slope(gradient: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, gradient)


def bowl(curvature: float, bottom: float) -> Callable[[Tensor], Tensor]:
    return lambda x: curvature * (x - bottom)


def test_control_variates_are_the_gradients_and_take_drift_away() -> None:
    """Slopes 3 and -1: `c_k` is each, `c` their mean 1, and then both clients go the same way."""
    hand = ByHand({0: slope(3.0), 1: slope(-1.0)}, clients=2)
    hand.play(0, 1)
    assert hand.x == pytest.approx(-0.4)  # the mean of -1.2 and 0.4
    assert [hand.own(0), hand.own(1), hand.common] == pytest.approx([3.0, -1.0, 1.0])
    hand.play(0, 1)
    assert hand.ends[0] == pytest.approx(hand.ends[1])
    assert hand.x == pytest.approx(-0.8)
    assert [hand.own(0), hand.own(1), hand.common] == pytest.approx([3.0, -1.0, 1.0])


def test_the_common_variate_counts_clients_that_have_not_been_asked() -> None:
    """N is of the federation: of four clients two have said 3 and -2, so that c is 1/4, not 1/2."""
    hand = ByHand({k: slope(g) for k, g in enumerate((3.0, -2.0, 5.0, 2.0))}, clients=4)
    hand.play(0, 1)
    assert hand.common == pytest.approx(0.25)
    hand.play(2, 3)
    assert hand.common == pytest.approx(2.0)  # the mean of all four
    hand.play(0, 3)
    assert hand.common == pytest.approx(2.0)


def test_it_converges_where_averaging_is_biased() -> None:
    """Bowls of curvature 4 and 1 with bottoms 0 and 5: their sum is least at 5/5 = 1."""
    bowls = {0: bowl(4.0, 0.0), 1: bowl(1.0, 5.0)}
    hand = ByHand(bowls, clients=2)
    x = 0.0
    for _ in range(60):
        hand.play(0, 1)
        # Averaging alone: four steps take client k a share 1 - (1 - 0.1 h)⁴ of the way down.
        ways = ((1 - 0.6**4, 0.0), (1 - 0.9**4, 5.0))
        x = sum(x + share * (bottom - x) for share, bottom in ways) / 2
    assert hand.x == pytest.approx(1.0, abs=1e-3)
    assert hand.common == pytest.approx(0.0, abs=1e-3)
    assert x == pytest.approx(1.4158, abs=1e-3)


def test_a_head_has_the_clients_of_its_task() -> None:
    """Three clients: two of the first task, one of the other; factors have all three."""
    method, tasks = STRATEGIES["scaffold"], ("news", "mail")
    strategy = method.build(method.options(), setting(clients=3, tasks=tasks))
    state = strategy.start(common_start(tasks=tasks))
    clients = [client(k, task=tasks[k % 2]) for k in range(3)]
    updates = updates_of(strategy, state, clients, drift(0))
    merged = strategy.merge(state, updates, None).state
    for update in updates:
        other = tasks[1 - tasks.index(update.client.task)]
        assert not any(f"head.{other}." in name for name in update.sent)
    for name in common_start(tasks=tasks):
        changes = [u.tensors["control/" + name] for u in updates if "control/" + name in u.tensors]
        expected = torch.stack(changes).mean(dim=0)
        torch.testing.assert_close(merged["server/control/" + name], expected, rtol=0, atol=1e-6)


def test_a_cohort_of_one_task_leaves_the_variates_of_others_alone() -> None:
    strategy, tasks = build("scaffold", tasks=("news", "mail")), ("news", "mail")
    state = strategy.start(common_start(tasks=tasks))
    for number, holders in enumerate([tasks, ("news",)]):
        before = state
        clients = [client(k, task=task) for k, task in enumerate(holders)]
        updates = updates_of(strategy, state, clients, drift(number))
        state = strategy.merge(state, updates, None).state
    for part in HEAD:
        name = f"server/control/head.mail.{part}"
        assert torch.equal(state[name], before[name])
        assert state[name].any()


def test_averaging_is_that_of_the_method_underneath() -> None:
    """Not the last client's update, as in a well-known implementation."""
    for over in ("fedavg", "ffa-lora"):
        strategy, plain = build("scaffold", over=over), build(over)
        start = strategy.start(common_start())
        updates = updates_of(strategy, start, cohort(*FULL), drift(0))
        merged = strategy.merge(start, updates, None).state
        bare = [
            Update(u.client, u.num_examples, without_controls(u.tensors), without_controls(u.sent))
            for u in updates
        ]
        expected = plain.merge(common_start(), bare, None).state
        assert_close({name: merged[name] for name in expected}, expected, tolerance=0)
        trained = {n for n in common_start() if part_of(n) in plain.trains(common_start())}
        assert set(under("server/control/", merged)) == trained


def without_controls(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}


@pytest.mark.parametrize("over", ["fedavg", "ffa-lora"])
def test_in_a_run_the_common_variate_is_the_mean_of_the_clients_own(
    digits_experiment: Build, over: str
) -> None:
    sent: dict[tuple[int, int], Tensors] = {}
    own: dict[tuple[int, int], Tensors] = {}
    replies: list[Tensors] = []

    def noting(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            memory = recall(context.state, plan.client, plan.run)
            sent[plan.round, plan.client] = under("control/", memory.held)
            own[plan.round, plan.client] = under("control/", memory.own)
            replies.append(unpack_update(reply.content)[1])
        return reply

    experiment = digits_experiment(
        strategy__name="scaffold",
        strategy__scaffold__over=over,
        federation__rounds=3,
        train__learning_rate=0.2,  # so that every tensor moves by more than float32 can miss
    )
    outcomes = run(experiment, noting)
    parts = {"fedavg": set(PARTS), "ffa-lora": {"lora_B", "head"}}[over]
    for number in (1, 2):
        for k in range(3):
            assert {part_of(name) for name in own[number, k]} == parts
        means = {name: sum(own[number, k][name] for k in range(3)) / 3 for name in own[number, 0]}
        assert_close(sent[number + 1, 0], means, tolerance=1e-5)
        assert any(bool(mean.abs().max() > 1e-3) for mean in means.values())
    assert len({digest(own[2, k]) for k in range(3)}) == 3
    for tensors in replies:
        assert tensors.keys() == {*own[1, 0], *prefixed("control/", own[1, 0])}
    for row in outcomes.rounds[1:]:
        for direction in ("up", "down"):
            counted = row["bytes"][direction]
            moved = sum(counted.get(kind, 0) for kind in ("A", "B", "head"))
            assert counted["control"] == moved > 0


def test_in_a_run_every_client_is_corrected_by_the_common_variate_less_its_own(
    digits_experiment: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrections: list[Tensors] = []
    plain = train_locally

    def note(*args: Any) -> Trained:
        corrections.append(args[5])
        return plain(*args)

    monkeypatch.setattr("clients.app.train_locally", note)
    own: dict[int, Tensors] = {}

    def checked(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            memory = recall(context.state, plan.client, plan.run)
            before, common = own.get(plan.client, {}), under("control/", memory.held)
            assert (plan.round > 1) == any(bool(c.any()) for c in before.values())
            expected = {name: c - before.get(name, 0.0) for name, c in common.items()}
            assert_close(corrections[-1], expected, tolerance=0)
            own[plan.client] = under("control/", memory.own)
        return reply

    outcomes = run(digits_experiment(strategy__name="scaffold", federation__rounds=3), checked)
    for row in outcomes.rounds:
        assert [told["status"] for told in row["clients"]] == ["ok"] * 3
    assert len(corrections) == 9


def test_in_a_run_control_variates_change_what_is_learned(digits_experiment: Build) -> None:
    """From the second round on; in the first all of them are zero."""
    settings = {"train__optimiser": "sgd", "train__learning_rate": 0.2}
    corrected = run(digits_experiment(strategy__name="scaffold", **settings))
    plain = run(digits_experiment(strategy__name="fedavg", **settings))
    assert corrected.rounds[0]["loss"] == plain.rounds[0]["loss"]
    assert corrected.rounds[1]["loss"] != plain.rounds[1]["loss"]
