"""What every strategy must do, over the whole table: a new method joins with no line here."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor
from toy_federation import (
    HEAD,
    MODULES,
    PROMPTS,
    Toy,
    assert_close,
    assert_same_models,
    client,
    cohort,
    deltas,
    drift,
    heads,
    idle,
    model_after,
    probe_of,
    updates_of,
)

from common.lowrank import Directions, factor_names
from common.memory import under
from common.residuals import is_residual, residual_name
from common.tensors import Tensors, digest, part_of
from strategies import STRATEGIES
from strategies.base import Client, Probe, Served, Strategy, Update, model_of

ALL = [Toy(name, kind) for name, method in STRATEGIES.items() for kind in method.adapters]
METHOD = {toy: STRATEGIES[toy.name] for toy in ALL}
LORA = [toy for toy in ALL if toy.kind == "lora"]
UNEQUAL = [toy for toy in LORA if METHOD[toy].unequal_ranks]
# Weights by norms belong to averages of raw factors, which stand for another delta at every rank.
UNEQUAL_DELTAS = [toy for toy in UNEQUAL if METHOD[toy].weighting != "norms"]
BY_TASK = [toy for toy in ALL if METHOD[toy].by_task]


def averages(toy: Toy) -> bool:
    """Say whether a method makes one model of several updates: all but two of the controls."""
    strategy = toy.build()
    updates = updates_of(strategy, strategy.start(toy.start()), cohort(0, 1), drift(0))
    return len(updates) > 1 and len(strategy.serve(toy.play(strategy, [cohort(0, 1)]))) == 1


AVERAGING = [toy for toy in ALL if averages(toy)]
# Where clients keep parts to themselves, what is served holds the shared parts only.
WHOLE = [toy for toy in ALL if not toy.build().personalised]
# What clients count by in the heads: methods that weigh deltas by their norms keep to examples.
HEADS_BY_EXAMPLES = [toy for toy in WHOLE if toy in AVERAGING and METHOD[toy].weighting != "equal"]
BY_EXAMPLES = [toy for toy in HEADS_BY_EXAMPLES if METHOD[toy].weighting == "examples"]
EQUAL = [toy for toy in AVERAGING if METHOD[toy].weighting == "equal"]
FULL = (0, 1, 2, 3)


def test_all_but_controls_average() -> None:
    """Guards this file: a method that falls out of AVERAGING would not be tested."""
    assert {toy for toy in ALL if not METHOD[toy].control} <= set(AVERAGING)
    assert {toy.name for toy in ALL} == set(STRATEGIES)


# --- shape of what is sent, kept and served ------------------------------------------------------


def expected_shapes(
    kind: str, rank: int, tasks: Sequence[str] = ("toy",)
) -> dict[str, tuple[int, ...]]:
    shapes = dict(PROMPTS) if kind == "prompt" else {}
    for module, (m, n) in MODULES.items() if kind == "lora" else ():
        name_B, name_A = factor_names(module)
        shapes |= {name_B: (m, rank), name_A: (rank, n)}
    return shapes | {f"head.{task}.{name}": shape for task in tasks for name, shape in HEAD.items()}


def is_beside(name: str) -> bool:
    """Say whether a tensor is none that every model of its kind has."""
    return is_residual(name) or part_of(name) == "local"


# What a model may hold beside those.
BESIDE = {
    "lora": {residual_name(module): size for module, size in MODULES.items()},
    "prompt": {"local.text": PROMPTS["prompt.text"]},
}


def assert_well_formed(
    toy: Toy, tensors: Tensors, rank: int, tasks: Sequence[str] = ("toy",)
) -> None:
    """A complete model: names, shapes, float32, finite; beside it at most what may be."""
    model = {name: tensor for name, tensor in tensors.items() if not is_beside(name)}
    shapes = {name: tuple(t.shape) for name, t in model.items()}
    assert shapes == expected_shapes(toy.kind, rank, tasks)
    assert {t.dtype for t in model.values()} == {torch.float32}
    beside = {name: tuple(t.shape) for name, t in tensors.items() if is_beside(name)}
    assert beside.items() <= BESIDE[toy.kind].items()
    for name, tensor in tensors.items():
        assert bool(torch.isfinite(tensor).all()), name
        assert tensor.is_contiguous(), name


def assert_may_be_sent(
    toy: Toy, tensors: Tensors, rank: int, tasks: Sequence[str] = ("toy",)
) -> None:
    """A complete model, and beside it at most a control variate for each of its tensors."""
    model = {n: t for n, t in tensors.items() if not n.startswith("control/")}
    assert_well_formed(toy, model, rank, tasks)
    for name, control in under("control/", tensors).items():
        assert control.shape == model[name].shape
        assert control.dtype == torch.float32
        assert bool(torch.isfinite(control).all()), name


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_names_shapes_and_dtypes_are_kept(toy: Toy) -> None:
    strategy = toy.build()
    for rounds in range(4):
        state = (
            toy.play(strategy, [cohort(*FULL)] * rounds) if rounds else strategy.start(toy.start())
        )
        for who in cohort(*FULL):
            assert_may_be_sent(toy, strategy.send(state, who), who.rank)
        for model in strategy.serve(state):
            assert_well_formed(toy, model.tensors, model.rank)
            assert model.task in (None, "toy")


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_the_common_start_is_served_unchanged(toy: Toy) -> None:
    strategy = toy.build()
    for served in strategy.serve(strategy.start(toy.start())):
        assert_close(heads(served.tensors), heads(toy.start()), tolerance=0)
        for module, delta in deltas(served).items():
            assert not delta.any(), module


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_every_client_starts_from_the_common_start(toy: Toy) -> None:
    strategy = toy.build()
    state = strategy.start(toy.start())
    for who in cohort(*FULL):
        sent = {n: t for n, t in model_of(strategy.send(state, who)).items() if not is_beside(n)}
        assert_close(sent, toy.start(), tolerance=0)


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_served_models_can_be_saved_and_are_the_same_afterwards(toy: Toy) -> None:
    strategy = toy.build()
    for model in strategy.serve(toy.play(strategy, [cohort(*FULL)] * 2)):
        assert digest(load_bytes(save_bytes(dict(model.tensors)))) == digest(model.tensors)


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_the_state_is_all_there_is(toy: Toy) -> None:
    """A run resumed from its saved state, by a strategy built anew, goes on as if never stopped."""
    rounds = [cohort(*FULL), cohort(0, 2), cohort(1, 3)]
    through = toy.play(toy.build(), rounds)
    saved = {n: t.clone() for n, t in toy.play(toy.build(), rounds[:2]).items()}
    resumed = toy.play(toy.build(), rounds[2:], state=saved, first=2)
    assert digest(resumed) == digest(through)


# --- purity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_merge_is_deterministic_to_the_bit(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    first = digest(strategy.merge(state, updates, None).state)
    torch.rand(3)  # the global stream has no say
    assert digest(strategy.merge(state, updates, None).state) == first
    assert digest(toy.build().merge(state, updates, None).state) == first


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_inputs_are_not_mutated_and_the_global_stream_is_left_alone(toy: Toy) -> None:
    strategy = toy.build()
    start = toy.start()
    before, random_state = digest(start), torch.random.get_rng_state()
    state = toy.play(strategy, [cohort(*FULL)], state=strategy.start(start))
    assert digest(start) == before
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    held = [state, *(u.tensors for u in updates), *(u.sent for u in updates)]
    before_merge = [digest(tensors) for tensors in held]
    merged = strategy.merge(state, updates, None).state
    strategy.serve(merged)
    strategy.send(merged, client(0))
    assert [digest(tensors) for tensors in held] == before_merge
    assert torch.equal(torch.random.get_rng_state(), random_state)


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_client_order_is_irrelevant(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    expected = strategy.serve(strategy.merge(state, updates, None).state)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        shuffled = [updates[k] for k in order if k < len(updates)]
        found = strategy.serve(strategy.merge(state, shuffled, None).state)
        assert_same_models(found, expected)


# --- fixed points -----------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ALL, ids=str)
@pytest.mark.parametrize("warm", [0, 2])
def test_agreeing_clients_are_left_alone(toy: Toy, warm: int) -> None:
    """All come from one model to one model: that model is served, whatever their weights."""
    strategy = toy.build()
    state = toy.play(
        strategy,
        [cohort(*FULL)] * warm,
        train=lambda r: drift(r, alike=True),
        state=strategy.start(toy.start()),
    )
    updates = updates_of(strategy, state, cohort(*FULL), drift(9, alike=True))
    served = strategy.serve(strategy.merge(state, updates, None).state)
    returned = updates[0].tensors
    if strategy.rules.sketch:
        returned = model_after(strategy, state, updates[0], drift(9, alike=True))
    for model in served:
        assert_close(deltas(model), deltas(Served(model_of(returned), 4)))
        assert_close(heads(model.tensors), heads(returned))


@pytest.mark.parametrize("toy", ALL, ids=str)
@pytest.mark.parametrize("back", [(0, 1, 2, 3), (1, 3)])
def test_clients_that_return_what_they_were_sent_change_nothing(
    toy: Toy, back: tuple[int, ...]
) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)] * 2)
    later = toy.play(strategy, [cohort(*back)] * 3, train=lambda _: idle, state=state)
    assert_same_models(strategy.serve(later), strategy.serve(state))


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_idle_clients_leave_the_common_start_alone(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)] * 3, train=lambda _: idle)
    for model in strategy.serve(state):
        assert not any(bool(delta.any()) for delta in deltas(model).values())
        assert_close(heads(model.tensors), heads(toy.start()))


@pytest.mark.parametrize("toy", LORA, ids=str)
def test_no_direction_is_ever_dead(toy: Toy) -> None:
    """A direction whose two factors are both zero could never be trained again."""
    strategy = toy.build()
    few = drift(0)

    def one_direction(who: Client, sent: Tensors) -> Tensors:
        moved = dict(few(who, sent))
        for module in MODULES:
            name_B, _ = factor_names(module)
            moved[name_B] = moved[name_B] * (torch.arange(4) < 1)
        return moved

    for train in (idle, one_direction):
        state = toy.play(strategy, [cohort(*FULL)] * 2, train=lambda _, train=train: train)
        sent = strategy.send(state, client(0))
        for module in MODULES:
            name_B, name_A = factor_names(module)
            alive = sent[name_B].abs().amax(dim=0) + sent[name_A].abs().amax(dim=1)
            assert bool((alive > 1e-4).all()), (module, alive)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", HEADS_BY_EXAMPLES, ids=str)
def test_heads_are_averaged_by_number_of_examples(toy: Toy) -> None:
    strategy = toy.build()
    state = strategy.start(toy.start())
    updates = updates_of(strategy, state, cohort(*FULL), drift(0))
    total = sum(u.num_examples for u in updates)
    assert len({u.num_examples for u in updates}) == 4
    served = strategy.serve(strategy.merge(state, updates, None).state)[0]
    for head, tensor in heads(served.tensors).items():
        mean = sum(u.num_examples * u.tensors[head].double() for u in updates) / total
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
        assert not torch.equal(tensor, state[head])


@pytest.mark.parametrize("toy", BY_EXAMPLES, ids=str)
def test_a_client_with_twice_the_rows_counts_as_two(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    first, second = updates_of(strategy, state, cohort(0, 1), drift(5))
    twin = Update(client(2), first.num_examples, first.tensors, first.sent)
    double = Update(first.client, 2 * first.num_examples, first.tensors, first.sent)
    twice = strategy.serve(strategy.merge(state, [first, second, twin], None).state)
    at_once = strategy.serve(strategy.merge(state, [double, second], None).state)
    assert_same_models(twice, at_once)
    once = strategy.serve(strategy.merge(state, [first, second], None).state)
    for module, delta in deltas(twice[0]).items():
        assert float((deltas(once[0])[module] - delta).norm()) > 1e-3


@pytest.mark.parametrize("toy", AVERAGING, ids=str)
def test_only_the_shares_of_examples_count(toy: Toy) -> None:
    strategy = toy.build()
    state = strategy.start(toy.start())
    updates = updates_of(strategy, state, cohort(*FULL), drift(0))
    more = [Update(u.client, 7 * u.num_examples, u.tensors, u.sent) for u in updates]
    expected = strategy.serve(strategy.merge(state, updates, None).state)
    assert_same_models(strategy.serve(strategy.merge(state, more, None).state), expected)


@pytest.mark.parametrize("toy", EQUAL, ids=str)
def test_a_client_cannot_claim_a_weight(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    claims = [replace(u, num_examples=10**6 if u.client.client == 2 else 1) for u in updates]
    expected = strategy.serve(strategy.merge(state, updates, None).state)
    assert_same_models(strategy.serve(strategy.merge(state, claims, None).state), expected)


# --- several rounds -------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_partial_participation_over_many_rounds_stays_sound(toy: Toy) -> None:
    strategy = toy.build()
    rounds = [cohort(*who) for who in [(0, 2), (1,), (0, 1, 2, 3), (3,), (0, 3), (1, 2)]]
    state = strategy.start(toy.start())
    for number, clients in enumerate(rounds):
        updates = updates_of(strategy, state, clients, drift(number))
        state = strategy.merge(state, updates, None).state
        for who in cohort(*FULL):
            assert_may_be_sent(toy, strategy.send(state, who), who.rank)
        for model in strategy.serve(state):
            assert_well_formed(toy, model.tensors, model.rank)


@pytest.mark.parametrize("toy", WHOLE, ids=str)
def test_training_reaches_what_is_served(toy: Toy) -> None:
    strategy = toy.build()
    before = strategy.serve(toy.play(strategy, [cohort(*FULL)]))
    after = strategy.serve(toy.play(strategy, [cohort(*FULL)] * 2))
    for one, other in zip(before, after, strict=True):
        for module, delta in deltas(other).items():
            assert float((deltas(one)[module] - delta).norm()) > 1e-3


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_a_tiny_or_huge_model_stays_finite(toy: Toy) -> None:
    for size in (1e-18, 1e12):
        strategy = toy.build()

        def sized(who: Client, sent: Tensors, size: float = size) -> Tensors:
            return {n: size * t for n, t in drift(0)(who, sent).items()}

        state = toy.play(strategy, [cohort(*FULL)], train=lambda _, sized=sized: sized)
        for model in strategy.serve(state):
            assert_well_formed(toy, model.tensors, model.rank)


# --- the probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_a_probe_that_sees_no_difference_decides_nothing(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    found = strategy.merge(state, updates, probe_of(lambda _, rows: torch.ones(64)[rows])).state
    assert digest(found) == digest(strategy.merge(state, updates, None).state)


@pytest.mark.parametrize("toy", ALL, ids=str)
def test_a_probe_is_shown_whole_models_of_the_served_rank(toy: Toy) -> None:
    strategy = toy.build()
    state = toy.play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    rank = strategy.serve(state)[0].rank
    shown = 0

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        nonlocal shown
        shown += 1
        assert_well_formed(toy, tensors, rank)
        return torch.full((64,), float(tensors["head.toy.bias"].norm()))[rows]

    def slopes(tensors: Tensors, directions: Directions, rows: slice) -> tuple[Tensor, Tensor]:
        assert_well_formed(toy, tensors, rank)
        # One client stands out, so that a method that screens by slopes goes on to ask for losses.
        count = directions.mixing.shape[1]
        noise = torch.rand(64, count, generator=torch.Generator().manual_seed(0))
        return probe(tensors, rows), (noise + torch.arange(count))[rows]

    strategy.merge(state, updates, Probe(probe, slopes))
    assert bool(shown) == bool(strategy.probe_examples)


# --- unequal ranks --------------------------------------------------------------------------------

RANKS = (2, 4, 8)


@pytest.mark.parametrize("toy", UNEQUAL, ids=str)
def test_unequal_ranks_get_factors_of_their_own_rank(toy: Toy) -> None:
    strategy = toy.build(rank=8, ranks=RANKS)
    rounds = [cohort(*who, ranks=RANKS) for who in [(0, 1, 2, 3), (0, 3), (1,), (2, 3), (0,)]]
    for played in range(len(rounds) + 1):
        start = strategy.start(toy.start(8))
        state = toy.play(strategy, rounds[:played], state=start)
        for who in cohort(*FULL, ranks=RANKS):
            assert_may_be_sent(toy, strategy.send(state, who), who.rank)
        for model in strategy.serve(state):
            assert_well_formed(toy, model.tensors, model.rank)


@pytest.mark.parametrize("toy", UNEQUAL, ids=str)
def test_at_the_start_a_low_rank_is_a_prefix_of_the_common_start(toy: Toy) -> None:
    strategy = toy.build(rank=8)
    state = strategy.start(toy.start(8))
    for who in cohort(0, 1, 2, ranks=RANKS):
        sent = strategy.send(state, who)
        for module in MODULES:
            name_B, name_A = factor_names(module)
            assert torch.equal(sent[name_A], toy.start(8)[name_A][: who.rank])
            assert not sent[name_B].any()


@pytest.mark.parametrize("toy", UNEQUAL_DELTAS, ids=str)
def test_agreeing_clients_of_unequal_ranks_are_left_alone(toy: Toy) -> None:
    """All return one delta, of rank 2, in factors of their own rank and scale."""
    strategy = toy.build(rank=8, ranks=RANKS, clients=3)
    stream = torch.Generator().manual_seed(3)
    wanted = {
        module: (torch.randn(m, 2, generator=stream), torch.randn(2, n, generator=stream))
        for module, (m, n) in MODULES.items()
    }

    def train(who: Client, sent: Tensors) -> Tensors:
        returned = {name: tensor.clone() for name, tensor in sent.items()}
        for module, (B, A) in wanted.items():
            name_B, name_A = factor_names(module)
            returned[name_B] = torch.zeros_like(sent[name_B])
            returned[name_B][:, :2], returned[name_A][:2] = B / who.scale, A
        return returned

    everyone = cohort(0, 1, 2, ranks=RANKS)
    served = strategy.serve(toy.play(strategy, [everyone], train=lambda _: train))
    for model in served:
        assert_close(deltas(model), {m: B.double() @ A.double() for m, (B, A) in wanted.items()})


@pytest.mark.parametrize("toy", UNEQUAL, ids=str)
def test_unequal_ranks_are_deterministic_and_indifferent_to_order(toy: Toy) -> None:
    strategy = toy.build(rank=8)
    everyone = cohort(*FULL, ranks=RANKS)
    state = toy.play(strategy, [everyone])
    updates = updates_of(strategy, state, everyone, drift(5))
    merged = strategy.merge(state, updates, None).state
    assert digest(strategy.merge(state, updates, None).state) == digest(merged)
    found = strategy.merge(state, updates[::-1], None).state
    assert_same_models(strategy.serve(found), strategy.serve(merged))


# --- several tasks --------------------------------------------------------------------------------

TASKS = ("news", "mail")


def by_task_round(toy: Toy, strategy: Strategy, clients: Sequence[Client]) -> Tensors:
    state = strategy.start(toy.start(tasks=TASKS))
    updates = updates_of(strategy, state, clients, drift(0))
    return strategy.merge(state, updates, None).state


@pytest.mark.parametrize("toy", BY_TASK, ids=str)
def test_a_client_is_sent_the_head_of_its_own_task_only(toy: Toy) -> None:
    strategy = toy.build()
    state = strategy.start(toy.start(tasks=TASKS))
    for task in TASKS:
        assert_may_be_sent(toy, strategy.send(state, client(0, task=task)), 4, [task])


@pytest.mark.parametrize("toy", [toy for toy in BY_TASK if toy in AVERAGING], ids=str)
def test_a_head_is_averaged_over_the_clients_that_hold_it(toy: Toy) -> None:
    strategy = toy.build()
    clients = [client(k, task=TASKS[k % 2]) for k in range(3)]
    state = strategy.start(toy.start(tasks=TASKS))
    updates = updates_of(strategy, state, clients, drift(0))
    merged = strategy.merge(state, updates, None)
    served = strategy.serve(merged.state)
    assert len(served) == 1
    assert_well_formed(toy, served[0].tensors, 4, TASKS)
    first, second, third = updates
    counts = (first.num_examples, third.num_examples)
    if toy in EQUAL:
        counts = tuple(merged.diagnostics["weights"][str(u.client.client)] for u in (first, third))
    for part in HEAD:
        head = f"head.news.{part}"
        mean = (counts[0] * first.tensors[head] + counts[1] * third.tensors[head]) / sum(counts)
        torch.testing.assert_close(served[0].tensors[head], mean, rtol=0, atol=1e-6)
        other = f"head.mail.{part}"
        torch.testing.assert_close(
            served[0].tensors[other], second.tensors[other], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("toy", BY_TASK, ids=str)
def test_a_head_that_no_client_of_the_round_holds_stays(toy: Toy) -> None:
    strategy = toy.build()
    state = by_task_round(toy, strategy, [client(0, task="news")])
    absent = client(1, task="mail")
    sent, start = strategy.send(state, absent), toy.start(tasks=TASKS)
    for part in HEAD:
        assert torch.equal(sent[f"head.mail.{part}"], start[f"head.mail.{part}"])


@pytest.mark.parametrize("toy", BY_TASK, ids=str)
def test_what_is_served_names_its_task_or_serves_all(toy: Toy) -> None:
    strategy = toy.build(tasks=TASKS, clients=3)
    state = by_task_round(toy, strategy, [client(k, task=TASKS[k % 2]) for k in range(3)])
    for model in strategy.serve(state):
        assert model.task in (None, *TASKS)
        tasks = TASKS if model.task is None else [model.task]
        assert_well_formed(toy, model.tensors, model.rank, tasks)
