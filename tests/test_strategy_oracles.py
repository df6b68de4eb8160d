"""Known answers: every method against dense float64 sums, and numbers worked by hand."""

import math
import statistics
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_federation import (
    LORA_METHODS,
    MODULES,
    Scale,
    Train,
    assert_close,
    assert_same_models,
    build,
    client,
    cohort,
    common_start,
    delta_of,
    deltas,
    drift,
    heads,
    idle,
    mean_deltas,
    play,
    probe_of,
    scale,
    setting,
    truncated,
    updates_of,
)

from common.lowrank import Directions, Term, factor_names
from common.residuals import residual_name
from common.tensors import Tensors, digest
from strategies.aggregation_error import aggregation_error
from strategies.base import (
    Client,
    Merged,
    Probe,
    Served,
    Strategy,
    Update,
    revive_dead_directions,
)

FULL = (0, 1, 2, 3)
RANKS = (2, 4, 8)
SETTING = setting()


def rs_scale(rank: int) -> float:
    return 6.0 / math.sqrt(rank)


def one_round(
    strategy: Strategy, clients: Sequence[Client], train: Train, probe: Probe | None = None
) -> tuple[Merged, list[Update]]:
    """Return the merge of a round from the common start, and its updates."""
    state = strategy.start(common_start(max(who.rank for who in clients)))
    updates = updates_of(strategy, state, clients, train)
    return strategy.merge(state, updates, probe), updates


def served_delta(strategy: Strategy, merged: Merged, scale: Scale = scale) -> dict[str, Tensor]:
    (model,) = strategy.serve(merged.state)
    return deltas(model, scale)


def shares_of(updates: Sequence[Update]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def factor_mean(updates: Sequence[Update], name: str) -> Tensor:
    weights = shares_of(updates)
    return sum(p * u.tensors[name].double() for p, u in zip(weights, updates, strict=True))


def norm_of(by_module: Tensors) -> float:
    """Return the Frobenius norm over all modules together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in by_module.values()))


def minus(one: Tensors, other: Tensors) -> dict[str, Tensor]:
    return {name: tensor - other[name] for name, tensor in one.items()}


def hand_made(
    strategy: Strategy, state: Tensors, by_hand: dict[int, tuple[int, list[float]]]
) -> list[Update]:
    """Updates of equal weight whose one 2x2 delta has these diagonals: `{client: (rank, diag)}`."""
    updates = []
    for number, (rank, diagonal) in by_hand.items():
        who = Client(number, "toy", rank, scale=1.0)
        sent = strategy.send(state, who)
        B = torch.diag(torch.tensor(diagonal))[:, :rank]
        returned = {
            **sent,
            "enc.0.q.lora_B.weight": B,
            "enc.0.q.lora_A.weight": torch.eye(2)[:rank],
        }
        updates.append(Update(who, 10, returned, sent))
    return updates


def diagonal_state(diagonal: list[float]) -> dict[str, Tensor]:
    """A 2x2 global delta in balanced factors at scale 1."""
    root = torch.diag(torch.tensor(diagonal).sqrt())
    head = {"head.toy.weight": torch.zeros(3, 10), "head.toy.bias": torch.zeros(3)}
    return {"enc.0.q.lora_B.weight": root, "enc.0.q.lora_A.weight": root.clone(), **head}


def unit_scale(_: int) -> float:
    return 1.0


# --- worked by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The client of rank 1 was sent diag(4, 0) and adds 2; the other adds nothing.
        ("copra-merge", [5.0, 2.0]),
        # ½·diag(6, 0) + ½·diag(4, 2): the second direction shrinks.
        ("flexlora", [5.0, 1.0]),
    ],
)
def test_unequal_ranks_by_hand(name: str, expected: list[float]) -> None:
    strategy = build(name, 2, scale=unit_scale)
    state = diagonal_state([4.0, 2.0])
    updates = hand_made(strategy, state, {0: (1, [6.0, 0.0]), 1: (2, [4.0, 2.0])})
    sent = delta_of(updates[0].sent, "enc.0.q", 1.0)
    torch.testing.assert_close(sent, torch.diag(torch.tensor([4.0, 0.0])).double())
    found = served_delta(strategy, strategy.merge(state, updates, None), unit_scale)["enc.0.q"]
    torch.testing.assert_close(found, torch.diag(torch.tensor(expected)).double())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", [2.0, 1.0]),  # mean of B times mean of A
        ("flexlora", [2.0, 1.0]),
        ("copra-merge", [2.0, 1.0]),
        ("dense-oracle", [2.0, 1.0]),
    ],
)
def test_clients_that_share_their_a_by_hand(name: str, expected: list[float]) -> None:
    strategy = build(name, 2, scale=unit_scale)
    state = strategy.start(diagonal_state([0.0, 0.0]))
    updates = hand_made(strategy, state, {0: (2, [1.0, 2.0]), 1: (2, [3.0, 0.0])})
    found = served_delta(strategy, strategy.merge(state, updates, None), unit_scale)["enc.0.q"]
    torch.testing.assert_close(found, torch.diag(torch.tensor(expected)).double())


# --- fedavg ---------------------------------------------------------------------------------------


def test_fedavg_serves_the_weighted_mean_of_every_factor() -> None:
    strategy = build("fedavg")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    for name, tensor in merged.state.items():
        torch.testing.assert_close(tensor.double(), factor_mean(updates, name), rtol=0, atol=1e-7)
        first = shares_of(updates)[0] * updates[0].tensors[name]
        assert not torch.allclose(tensor, first, atol=1e-2), "only the first client counts"


def test_fedavg_misses_the_weighted_covariance_of_the_factors() -> None:
    strategy = build("fedavg")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    found, exact = served_delta(strategy, merged), mean_deltas(updates)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        mean_B, mean_A = factor_mean(updates, name_B), factor_mean(updates, name_A)
        covariance = sum(
            p * (u.tensors[name_B].double() - mean_B) @ (u.tensors[name_A].double() - mean_A)
            for p, u in zip(shares_of(updates), updates, strict=True)
        )
        assert float(covariance.norm()) > 0.1
        torch.testing.assert_close(
            found[module] - exact[module], -scale(4) * covariance, rtol=0, atol=1e-6
        )


# --- ffa-lora -------------------------------------------------------------------------------------


def test_ffa_lora_is_exact_over_rounds_with_partial_participation() -> None:
    strategy = build("ffa-lora")
    state = strategy.start(common_start())
    for number, who in enumerate([FULL, (0, 3), (1,), FULL]):
        updates = updates_of(strategy, state, cohort(*who), drift(number))
        merged = strategy.merge(state, updates, None)
        assert_close(served_delta(strategy, merged), mean_deltas(updates))
        state = merged.state


def test_ffa_lora_keeps_a_at_its_start_to_the_bit() -> None:
    strategy = build("ffa-lora")
    state = play(strategy, [cohort(*FULL)] * 3)
    for module in MODULES:
        _, name_A = factor_names(module)
        assert torch.equal(state[name_A], common_start()[name_A])


def test_ffa_lora_neither_trains_nor_sends_a() -> None:
    assert "lora_A" not in build("ffa-lora").trains({})
    assert {"lora_B", "head"} <= set(build("ffa-lora").trains({}))


# --- flexlora -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [scale, rs_scale])
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_flexlora_is_the_dense_svd_of_the_mean_delta(rule: Scale, ranks: tuple[int, ...]) -> None:
    strategy = build("flexlora", max(ranks), scale=rule)
    clients = cohort(*FULL, ranks=ranks, scale=rule)
    merged, updates = one_round(strategy, clients, drift(0))
    exact = mean_deltas(updates)
    best = {module: truncated(delta, max(ranks)) for module, delta in exact.items()}
    assert_close(served_delta(strategy, merged, rule), best)
    for who in clients:
        sent = strategy.send(merged.state, who)
        for module in MODULES:
            found = delta_of(sent, module, who.scale)
            assert_close({module: found}, {module: truncated(exact[module], who.rank)})


def test_flexlora_does_not_sum_raw_products_of_unequal_scales() -> None:
    """NVFlare's HLoRA example forgets that alpha/r differs between ranks: 61 % off."""
    strategy = build("flexlora", 8)
    merged, updates = one_round(strategy, cohort(*FULL, ranks=RANKS), drift(0))
    raw = {
        module: sum(
            p * delta_of(u.tensors, module, scale(8))
            for p, u in zip(shares_of(updates), updates, strict=True)
        )
        for module in MODULES
    }
    found = served_delta(strategy, merged)
    for module in MODULES:
        defect = truncated(raw[module], 8)
        assert float((found[module] - defect).norm() / found[module].norm()) > 0.1


def test_flexlora_puts_all_singular_values_into_b() -> None:
    """A is orthonormal and B·A is UΣVᵀ: FedLLM-Factory returns U√ΣVᵀ."""
    strategy = build("flexlora")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    for module in MODULES:
        term = Term.of(merged.state, module)
        torch.testing.assert_close(term.A @ term.A.T, torch.eye(4), rtol=0, atol=1e-6)
        values = torch.linalg.svdvals(mean_deltas(updates)[module])[:4]
        torch.testing.assert_close(
            term.B.norm(dim=0).double() * scale(4), values, rtol=1e-6, atol=0
        )


def test_flexlora_fills_what_a_cohort_of_low_rank_leaves_empty() -> None:
    """One client of rank 2 under a server of rank 8: its delta exactly, and no dead direction."""
    strategy = build("flexlora", 8)
    state = strategy.start(common_start(8))
    updates = updates_of(strategy, state, [client(0, 2)], drift(0))
    merged = strategy.merge(state, updates, None)
    assert_close(served_delta(strategy, merged), mean_deltas(updates))
    for module in MODULES:
        assert bool((Term.of(merged.state, module).A.norm(dim=1) > 0.1).all())


def test_flexlora_reports_the_energy_it_kept() -> None:
    strategy = build("flexlora")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    exact, found = mean_deltas(updates), served_delta(strategy, merged)
    kept = (norm_of(found) / norm_of(exact)) ** 2
    assert merged.diagnostics["kept_energy"] == pytest.approx(kept, rel=1e-5)
    assert kept < 0.999


@pytest.mark.parametrize("buffer", [8, 16])
def test_flexlora_in_bounded_memory_errs_no_more_than_it_says(buffer: int) -> None:
    many = cohort(*range(12))
    strategy, exact = build("flexlora", buffer_rank=buffer, clients=12), build("flexlora")
    state = play(exact, [many])
    updates = updates_of(exact, state, many, drift(1))
    merged = strategy.merge(state, updates, None)
    whole, found = mean_deltas(updates), served_delta(strategy, merged)
    best = served_delta(exact, exact.merge(state, updates, None))
    said = merged.diagnostics["buffer_error_at_most"]
    # Of the best rank 4 of a sum that is off by e, at most 2e is lost beside the tail itself.
    lost, least = norm_of(minus(found, whole)), norm_of(minus(best, whole))
    assert lost <= least + 2 * said * norm_of(whole)
    assert lost < 1.2 * least
    assert 0 < said < 1


# --- copra-merge: increments ----------------------------------------------------------------------


def test_copra_merge_equals_the_mean_delta_when_its_rank_holds_them_all() -> None:
    strategy = build("copra-merge", 3, server_rank=9)
    clients = cohort(0, 1, 2, ranks=(3,))
    state = strategy.start(common_start(3))
    updates = updates_of(strategy, state, clients, drift(0))
    merged = strategy.merge(state, updates, None)
    assert_close(served_delta(strategy, merged), mean_deltas(updates))
    assert merged.diagnostics["kept_energy"] == pytest.approx(1.0, abs=1e-9)


def test_copra_merge_may_have_a_server_rank_above_the_layers() -> None:
    strategy = build("copra-merge", 4, server_rank=16)
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    (model,) = strategy.serve(merged.state)
    assert model.rank == 16
    assert_close(deltas(model), mean_deltas(updates))


@pytest.mark.parametrize("rank", [4, 8])
def test_copra_merge_of_one_client_returns_that_client(rank: int) -> None:
    strategy = build("copra-merge", 8)
    state = strategy.start(common_start(8))
    updates = updates_of(strategy, state, [client(2, rank)], drift(0))
    merged = strategy.merge(state, updates, None)
    assert_close(served_delta(strategy, merged), mean_deltas(updates))
    assert_close(heads(merged.state), heads(updates[0].tensors))


def exact_increment_merge(
    strategy: Strategy, state: Tensors, updates: Sequence[Update], factors: Sequence[float]
) -> dict[str, Tensor]:
    """Return `T_R(G + Σ c_k (ΔW_k - S_k))`, dense, with S_k as it was really sent."""
    (model,) = strategy.serve(state)
    merged = {}
    for module, G in deltas(model).items():
        for c, u in zip(factors, updates, strict=True):
            change = delta_of(u.tensors, module, u.client.scale) - delta_of(
                u.sent, module, u.client.scale
            )
            G = G + c * change
        merged[module] = truncated(G, model.rank)
    return merged


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_copra_merge_adds_weighted_increments_under_partial_participation(
    ranks: tuple[int, ...],
) -> None:
    strategy = build("copra-merge", max(ranks), norm_limit=1000.0)
    state = strategy.start(common_start(max(ranks)))
    for number, who in enumerate([FULL, (0, 2), (1,), (3, 0), (2, 1, 3), FULL]):
        clients = cohort(*who, ranks=ranks)
        updates = updates_of(strategy, state, clients, drift(number))
        exact = exact_increment_merge(strategy, state, updates, shares_of(updates))
        state = strategy.merge(state, updates, None).state
        assert_close(deltas(strategy.serve(state)[0]), exact, 2e-6)


def test_copra_merge_serves_balanced_factors_whose_prefixes_are_best() -> None:
    strategy = build("copra-merge", 8)
    everyone = cohort(*FULL, ranks=RANKS)
    state = play(strategy, [everyone] * 2)
    for module in MODULES:
        whole = delta_of(state, module, scale(8))
        term = Term.of(state, module)
        torch.testing.assert_close(term.B.T @ term.B, term.A @ term.A.T, rtol=0, atol=1e-5)
        for who in everyone:
            sent = delta_of(strategy.send(state, who), module, who.scale)
            assert_close({module: sent}, {module: truncated(whole, who.rank)})


def plain_average(
    state: Tensors, strategy: Strategy, clients: Sequence[Client]
) -> dict[str, Tensor]:
    """What averaging whole deltas makes of idle clients: `Σ w_k S_k`."""
    updates = updates_of(strategy, state, clients, idle)
    return mean_deltas(updates)


def test_idle_clients_of_unequal_ranks_leave_the_global_delta_alone() -> None:
    """Where a plain average of deltas would let directions of high rank decay, round by round."""
    strategy = build("copra-merge", 8)
    everyone = cohort(0, 1, 2, ranks=RANKS)  # ranks 2, 4 and 8, with 30, 10 and 50 rows
    start = play(strategy, [cohort(0, 1, 2, ranks=(8,))])
    G = deltas(strategy.serve(start)[0])
    state = start
    for _ in range(5):
        state = play(strategy, [everyone], train=lambda _: idle, state=state)
    assert_close(deltas(strategy.serve(state)[0]), G)
    assert_close(heads(state), heads(start))

    decaying = build("flexlora", 8)
    plain = play(decaying, [everyone] * 5, train=lambda _: idle, state=start)
    held = [1.0, 1.0, 60 / 90, 60 / 90, 50 / 90, 50 / 90, 50 / 90, 50 / 90]  # Σ w_k over r_k >= i
    for module in MODULES:
        before = torch.linalg.svdvals(G[module])[:8]
        after = torch.linalg.svdvals(deltas(decaying.serve(plain)[0])[module])[:8]
        predicted = before * torch.tensor(held, dtype=torch.float64) ** 5
        torch.testing.assert_close(after, predicted, rtol=1e-4, atol=1e-6)
        assert after[7] < 0.06 * before[7]


def halved(tensors: Tensors) -> dict[str, Tensor]:
    """What arrives of a model that travels in half precision."""
    return {name: tensor.half().float() for name, tensor in tensors.items()}


def updates_after_rounding(
    strategy: Strategy, state: Tensors, clients: Sequence[Client], train: Train
) -> list[Update]:
    """Updates of clients to whom the way down was narrow; every second one, so that both occur."""
    updates = []
    for u in updates_of(strategy, state, clients, idle):
        sent = halved(u.sent) if u.client.client % 2 else u.sent
        updates.append(Update(u.client, u.num_examples, dict(train(u.client, sent)), sent))
    return updates


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_increments_are_taken_from_what_was_really_sent(ranks: tuple[int, ...]) -> None:
    """Half precision keeps three digits; G has to be left alone to seven."""
    strategy = build("copra-merge", max(ranks), norm_limit=1000.0)
    everyone = cohort(*FULL, ranks=ranks)
    state = play(strategy, [everyone] * 2, state=strategy.start(common_start(max(ranks))))
    assert any(
        not torch.equal(sent[n], halved(sent)[n])
        for who in everyone
        for sent in [strategy.send(state, who)]
        for n in sent
    )
    back = updates_after_rounding(strategy, state, everyone, idle)
    merged = strategy.merge(state, back, None).state
    assert_same_models(strategy.serve(merged), strategy.serve(state), 2e-6)

    updates = updates_after_rounding(strategy, state, everyone, drift(3))
    exact = exact_increment_merge(strategy, state, updates, shares_of(updates))
    found = strategy.merge(state, updates, None).state
    assert_close(deltas(strategy.serve(found)[0]), exact, 2e-6)


@pytest.mark.parametrize("rounding", [False, True])
def test_the_probe_is_asked_for_slopes_along_the_increments(rounding: bool) -> None:
    """Every direction is `ΔW_k - S_k` of its client, and the change of its heads."""
    strategy = build("copra-merge", 8)
    everyone = cohort(*FULL, ranks=RANKS)
    state = play(strategy, [everyone], state=strategy.start(common_start(8)))
    make = updates_after_rounding if rounding else updates_of
    updates = make(strategy, state, everyone, drift(3))
    asked: list[Directions] = []

    def slopes(_: Tensors, directions: Directions, rows: slice) -> tuple[Tensor, Tensor]:
        asked.append(directions)
        return torch.ones(64)[rows], torch.zeros(64, 4)[rows]

    strategy.merge(state, updates, Probe(lambda _, rows: torch.ones(64)[rows], slopes))
    (directions,) = asked
    assert directions.stacks.keys() == MODULES.keys()
    assert directions.entries.keys() == heads(state).keys()
    for k, u in enumerate(updates):
        for module, stack in directions.stacks.items():
            found = (stack.B.double() * directions.mixing[:, k]) @ stack.A.double()
            moved = [delta_of(t, module, u.client.scale) for t in (u.tensors, u.sent)]
            torch.testing.assert_close(found, moved[0] - moved[1], rtol=0, atol=1e-6)
        for name, changes in directions.entries.items():
            assert torch.equal(changes[k], u.tensors[name] - u.sent[name])


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_a_block_that_a_client_never_trained_adds_nothing_there(ranks: tuple[int, ...]) -> None:
    """As where CopRA's switches kept it off all round: D_k = 0 in that module, and only there."""
    strategy = build("copra-merge", max(ranks), norm_limit=1000.0)
    everyone = cohort(*FULL, ranks=ranks)
    state = play(strategy, [everyone], state=strategy.start(common_start(max(ranks))))

    def train(who: Client, sent: Tensors) -> Tensors:
        moved = drift(4)(who, sent)
        asleep = "enc.0." if who.client != 1 else "enc.1."
        return {n: sent[n] if n.startswith(asleep) else t for n, t in moved.items()}

    updates = updates_of(strategy, state, everyone, train)
    found = strategy.merge(state, updates, None).state
    (model,) = strategy.serve(found)
    exact = exact_increment_merge(strategy, state, updates, shares_of(updates))
    assert_close(deltas(model), exact, 2e-6)
    before = deltas(strategy.serve(state)[0])["enc.1.query"]
    alone = [
        c if u.client.client == 1 else 0.0 for c, u in zip(shares_of(updates), updates, strict=True)
    ]
    of_one = exact_increment_merge(strategy, state, updates, alone)
    for module in ("enc.0.query", "enc.0.value"):
        torch.testing.assert_close(deltas(model)[module], of_one[module], rtol=0, atol=1e-5)
    assert float((deltas(model)["enc.1.query"] - before).norm()) > 0.1


def test_other_weights_of_equal_increments_give_the_same_model() -> None:
    strategy = build("copra-merge", tilt_steps=3, step_lengths=(0.75,), barrier_limit=0.25)
    state = play(strategy, [cohort(*FULL)])
    same = updates_of(strategy, state, cohort(*FULL), drift(3, alike=True))
    probe = target_probe(goal())
    found = []
    for rows in ((30, 10, 50, 20), (1, 1000, 1, 5)):
        updates = [Update(u.client, n, u.tensors, u.sent) for u, n in zip(same, rows, strict=True)]
        merged = strategy.merge(state, updates, probe)
        shares = {str(k): n / sum(rows) for k, n in enumerate(rows)}
        assert merged.diagnostics["weights"] == pytest.approx(shares)
        found.append(strategy.serve(merged.state))
    assert_same_models(*found)


EVERY_STEP = {
    "tilt_steps": 4,
    "step_lengths": (0.75, 1.25),
    "barrier_limit": 0.25,
    "shorten": True,
    "server_rank": 9,
}


def turned(update: Update) -> Update:
    """Return the update in other factors of the same deltas, `(B·Q)(Q⁻¹·A)`."""
    draw = torch.Generator().manual_seed(70 + update.client.client)
    tensors = dict(update.tensors)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        rank = update.client.rank
        Q = torch.eye(rank).double() + 0.3 * torch.randn(rank, rank, generator=draw).double()
        tensors[name_B] = (tensors[name_B].double() @ Q).float()
        tensors[name_A] = torch.linalg.solve(Q, tensors[name_A].double()).float()
    return Update(update.client, update.num_examples, tensors, update.sent)


def probed_round(
    ranks: tuple[int, ...], options: dict[str, Any]
) -> tuple[Strategy, Tensors, list[Update], Probe]:
    """A second round in which one client of four has gone the wrong way."""
    strategy, target = build("copra-merge", max(ranks), **options), goal()
    everyone = cohort(*FULL, ranks=ranks)
    state = play(strategy, [everyone], state=strategy.start(common_start(max(ranks))))
    train = towards(target, far=[3], times=-2.0)
    updates = updates_of(strategy, state, everyone, train)
    return strategy, state, updates, target_probe(target)


@pytest.mark.parametrize("options", [{}, EVERY_STEP], ids=["plain", "every step"])
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_neither_order_nor_gauge_changes_a_probed_merge(
    ranks: tuple[int, ...], options: dict[str, Any]
) -> None:
    strategy, state, updates, probe = probed_round(ranks, options)
    expected = strategy.merge(state, updates, probe)
    assert expected.diagnostics["vetoed"] == [3]
    for other in ([updates[k] for k in (2, 0, 3, 1)], [turned(u) for u in updates]):
        found = strategy.merge(state, other, probe)
        assert found.diagnostics["vetoed"] == [3]
        weights = expected.diagnostics["weights"]
        assert found.diagnostics["weights"] == pytest.approx(weights, abs=1e-4)
        assert_same_models(strategy.serve(found.state), strategy.serve(expected.state), 1e-4)


# --- copra-merge: what is logged, and what it costs -----------------------------------------------


@pytest.mark.parametrize(("rank", "alarmed"), [(2, True), (8, False)])
def test_energy_and_stable_rank_are_told_by_module_with_an_alarm_below_nine_tenths(
    rank: int, alarmed: bool
) -> None:
    strategy = build("copra-merge", 2, server_rank=rank, norm_limit=1000.0)
    state = strategy.start(common_start(2))
    updates = updates_of(strategy, state, cohort(*FULL, ranks=(2,)), drift(0))
    told = strategy.merge(state, updates, None).diagnostics
    kept = {}
    for module, exact in mean_deltas(updates).items():
        squares = torch.linalg.svdvals(exact).square()
        kept[module] = float(squares[:rank].sum() / squares.sum())
        assert told["energy"][module] == {
            "kept_energy": pytest.approx(kept[module], rel=1e-6),
            "stable_rank": pytest.approx(float(squares.sum() / squares[0]), rel=1e-6),
        }
    assert told["least_kept_energy"] == pytest.approx(min(kept.values()), rel=1e-6)
    assert (min(kept.values()) < 0.9) == alarmed
    assert ("alarm" in told) == alarmed


def test_a_merge_of_nothing_has_no_stable_rank_and_no_alarm() -> None:
    merged, _ = one_round(build("copra-merge"), cohort(*FULL), idle)
    assert {e["stable_rank"] for e in merged.diagnostics["energy"].values()} == {None}
    assert merged.diagnostics["kept_energy"] == merged.diagnostics["least_kept_energy"] == 1
    assert "alarm" not in merged.diagnostics


class NoFullMatrix(TorchDispatchMode):
    """Refuses every tensor that is as large as a whole delta."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.sides = {m, n}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor):
                assert not self.sides <= set(tensor.shape), func
        return found


def test_no_full_matrix_is_formed_and_one_qr_a_module_serves_every_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {"enc.0.query": (61, 47), "enc.1.query": (61, 47)}
    monkeypatch.setattr(import_module("strategies.copra_merge"), "cores_here", lambda: 1)
    decompositions = 0
    plain = torch.geqrf

    def counted(matrix: Tensor) -> Any:
        nonlocal decompositions
        decompositions += 1
        return plain(matrix)

    monkeypatch.setattr(torch, "geqrf", counted)
    strategy = build("copra-merge", screening="none", barrier_limit=0.1, step_lengths=(0.75,))
    state = strategy.start(common_start(modules=modules))
    updates = updates_of(strategy, state, cohort(*FULL), drift(0))
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(64, generator=draw)
    probe = Probe(lambda t, part: (rows * t["head.toy.bias"].norm())[part], unasked)
    with NoFullMatrix(61, 47):
        merged = strategy.merge(state, updates, probe)
    assert set(merged.diagnostics["leave_one_out_z"]) == set("0123")
    assert decompositions == 2 * len(modules)


def unasked(*_: Any) -> tuple[Tensor, Tensor]:
    raise AssertionError("nobody asked for slopes")


def test_the_probe_is_asked_as_seldom_as_the_costs_say() -> None:
    """Honest clients: K + 1 models to leave one out, 2K + 1 along the lines, none to judge."""
    target = goal()
    inner = target_probe(target)
    for options, models in (({}, 4 + 1), ({"barrier_limit": 0.25}, 4 + 1 + 2 * 4 + 1)):
        asked: list[str] = []

        def losses(tensors: Tensors, rows: slice, asked: list[str] = asked) -> Tensor:
            asked.append(digest(tensors))
            return inner.losses(tensors, rows)

        strategy = build("copra-merge", screening="none", veto_z=1e9, **options)
        one_round(strategy, cohort(*FULL), towards(target), Probe(losses, unasked))
        assert len(asked) == models


def test_512_rows_are_probed_unless_told_otherwise() -> None:
    """256 were too noisy (specification 7.3)."""
    assert build("copra-merge").probe_examples == 512
    assert build("copra-merge", probe_examples=64).probe_examples == 64
    assert build("copra-merge", probe="none").probe_examples == 0


# --- copra-merge: lengths -------------------------------------------------------------------------


def longer(times: float, who: int) -> Train:
    """One client moves `times` as far as the others, in B alone, so that lengths are plain."""

    def train(c: Client, sent: Tensors) -> Tensors:
        stream = torch.Generator().manual_seed(c.client)
        size = times if c.client == who else 1.0
        return {
            name: tensor + size * torch.randn(tensor.shape, generator=stream)
            if ".lora_A." not in name
            else tensor
            for name, tensor in sorted(sent.items())
        }

    return train


@pytest.mark.parametrize("times", [40.0, 1e4, 1e8, 1e15])
def test_an_increment_far_above_the_median_is_scaled_back_to_the_limit(times: float) -> None:
    """However far: the longest must not decide what is short."""
    strategy = build("copra-merge", 4, server_rank=9, norm_limit=3.0)
    state = strategy.start(common_start(4))
    updates = updates_of(strategy, state, cohort(*FULL), longer(times, who=2))
    merged = strategy.merge(state, updates, None)
    lengths = [norm_of({m: delta_of(u.tensors, m, scale(4)) for m in MODULES}) for u in updates]
    limits = [min(1.0, 3.0 * statistics.median(lengths) / length) for length in lengths]
    assert [limit < 1 for limit in limits] == [False, False, True, False]
    assert merged.diagnostics["clipped"] == [2]
    steps = [w * limit for w, limit in zip(shares_of(updates), limits, strict=True)]
    assert_close(
        served_delta(strategy, merged), exact_increment_merge(strategy, state, updates, steps)
    )
    for name, head in heads(state).items():
        moved = sum(
            c * (u.tensors[name] - u.sent[name]).double()
            for c, u in zip(steps, updates, strict=True)
        )
        torch.testing.assert_close(merged.state[name].double(), head + moved, rtol=0, atol=1e-5)


def test_increments_within_the_limit_keep_their_length() -> None:
    strategy = build("copra-merge", 4, server_rank=9)
    merged, updates = one_round(strategy, cohort(*FULL), longer(3.0, who=2))
    assert merged.diagnostics["clipped"] == []
    assert_close(served_delta(strategy, merged), mean_deltas(updates))


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_one_client_that_trains_counts_even_if_most_are_idle(
    warm: int, ranks: tuple[int, ...]
) -> None:
    """The median increment is then nought but rounding, which is no measure of a length."""
    strategy = build("copra-merge", max(ranks))
    everyone = cohort(*FULL, ranks=ranks)
    start = strategy.start(common_start(max(ranks)))
    state = play(strategy, [everyone] * warm, state=start)

    def train(who: Client, sent: Tensors) -> Tensors:
        return drift(8)(who, sent) if who.client == 2 else idle(who, sent)

    updates = updates_of(strategy, state, everyone, train)
    merged = strategy.merge(state, updates, None)
    assert merged.diagnostics["clipped"] == []
    exact = exact_increment_merge(strategy, state, updates, shares_of(updates))
    assert_close(served_delta(strategy, merged), exact, 2e-6)


# --- copra-merge: dead directions -----------------------------------------------------------------


def test_padding_leaves_the_delta_alone_and_gives_every_direction_a_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 3, generator=draw), torch.randn(3, 14, generator=draw)
    S = torch.tensor([2.0, 2.1e-6, 1.9e-6])  # the third has vanished, the second not quite
    B[:, 2], A[2] = 0.0, 0.0
    term = revive_dead_directions("enc.1.query", Term(B, A), S, 6, seed=3)
    assert term.B.shape == (9, 6)
    assert term.A.shape == (6, 14)
    assert torch.equal(term.B @ term.A, B @ A)
    assert not term.B[:, 2:].any()
    assert torch.equal(term.A[:2], A[:2])
    bound = 14**-0.5
    assert 0.1 * bound < float(term.A[2:].abs().mean()) < bound >= float(term.A[2:].abs().max())

    live_B, live_A = term.B.clone().requires_grad_(), term.A.clone().requires_grad_()
    loss = ((live_B @ live_A) @ torch.randn(14, 5, generator=draw)).square().sum()
    (loss + (live_B @ live_A).sum()).backward()
    assert live_B.grad is not None
    assert bool((live_B.grad.norm(dim=0) > 1e-3).all())


def test_reviving_is_deterministic_and_differs_between_modules() -> None:
    term, S = Term(torch.zeros(9, 2), torch.zeros(2, 14)), torch.zeros(2)
    first = revive_dead_directions("a", term, S, 4, seed=3)
    assert torch.equal(first.A, revive_dead_directions("a", term, S, 4, seed=3).A)
    assert not torch.equal(first.A, revive_dead_directions("b", term, S, 4, seed=3).A)
    assert not torch.equal(first.A, revive_dead_directions("a", term, S, 4, seed=4).A)


@pytest.mark.parametrize("name", ["copra-merge", "dense-oracle"])
def test_a_merge_of_low_rank_leaves_its_spare_directions_trainable(name: str) -> None:
    """All clients move along one direction: three of four are spare afterwards."""
    strategy = build(name)

    def along_one(who: Client, sent: Tensors) -> Tensors:
        moved = dict(drift(0, alike=True)(who, sent))
        for module in MODULES:
            moved[factor_names(module)[0]] = moved[factor_names(module)[0]] * (torch.arange(4) < 1)
        return moved

    merged, updates = one_round(strategy, cohort(*FULL), along_one)
    assert_close(served_delta(strategy, merged), mean_deltas(updates))
    for module in MODULES:
        term = Term.of(merged.state, module)
        assert not term.B[:, 1:].any()
        assert bool((term.A[1:].abs().amax(dim=1) > 0.05).all())


# --- copra-merge: the probe -----------------------------------------------------------------------

ROWS_OF_PROBE = 64


def target_probe(
    target: dict[str, Tensor], judge: Callable[[Tensor], Tensor] = lambda losses: losses
) -> Probe:
    """Losses fall as the delta nears `target`; the judging rows may be changed by `judge`."""
    draw = torch.Generator().manual_seed(5)
    X = {
        module: torch.randn(ROWS_OF_PROBE, n, generator=draw, dtype=torch.float64)
        for module, (_, n) in MODULES.items()
    }

    def losses(tensors: Tensors, rows: slice) -> Tensor:
        rank = Term.of(tensors, "enc.0.query").rank
        loss = sum(
            (X[m] @ (delta_of(tensors, m, scale(rank)) - target[m]).T).square().mean(dim=1)
            for m in MODULES
        )
        odd = torch.arange(ROWS_OF_PROBE) % 2 == 1
        return torch.where(odd, judge(loss), loss)[rows]

    return probe_of(losses)


def goal() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(8)
    return {
        module: torch.randn(m, 2, generator=draw).double()
        @ torch.randn(2, n, generator=draw).double()
        for module, (m, n) in MODULES.items()
    }


def towards(target: dict[str, Tensor], far: Sequence[int] = (), times: float = -3.0) -> Train:
    """Honest clients return nearly the target, those in `far` a multiple of it."""

    def train(who: Client, sent: Tensors) -> Tensors:
        stream = torch.Generator().manual_seed(who.client)
        returned = {name: tensor.clone() for name, tensor in sent.items()}
        for module, delta in target.items():
            name_B, name_A = factor_names(module)
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            size = times if who.client in far else 1.0
            B = size * U[:, : who.rank] * S[: who.rank] / who.scale
            returned[name_B] = (B + 0.05 * torch.randn(B.shape, generator=stream)).float()
            returned[name_A] = Vh[: who.rank].float().contiguous()
        for name in heads(sent):
            returned[name] = sent[name] + 0.1 * torch.randn(sent[name].shape, generator=stream)
        return returned

    return train


def test_a_client_that_hurts_by_far_is_vetoed() -> None:
    strategy = build("copra-merge", screening="none")
    target = goal()
    train = towards(target, far=[3])
    merged, updates = one_round(strategy, cohort(*FULL), train, target_probe(target))
    assert merged.diagnostics["vetoed"] == [3]
    assert merged.diagnostics["clipped"] == []
    assert merged.diagnostics["leave_one_out_z"]["3"] > 2
    assert all(merged.diagnostics["leave_one_out_z"][str(k)] < 2 for k in (0, 1, 2))
    assert merged.diagnostics["judged_z"] > 1
    weights = {"0": 30 / 90, "1": 10 / 90, "2": 50 / 90, "3": 0.0}
    assert merged.diagnostics["weights"] == pytest.approx(weights)

    state = strategy.start(common_start())
    without = strategy.merge(state, updates[:3], None)
    assert_same_models(strategy.serve(merged.state), strategy.serve(without.state))


def test_without_a_probe_the_weighted_increments_are_merged() -> None:
    target = goal()
    train = towards(target, far=[3])
    for options, probe in (({}, None), ({"probe": "none"}, None)):
        strategy = build("copra-merge", **options)
        merged, updates = one_round(strategy, cohort(*FULL), train, probe)
        assert merged.diagnostics["vetoed"] == []
        shares = {str(k): share for k, share in enumerate(shares_of(updates))}
        assert merged.diagnostics["weights"] == pytest.approx(shares)
        best = {m: truncated(delta, 4) for m, delta in mean_deltas(updates).items()}
        assert_close(served_delta(strategy, merged), best)


@pytest.mark.parametrize(
    ("clients", "far", "most"),
    [(2, [1], 0), (3, [1, 2], 1), (4, [1, 2, 3], 1), (6, [0, 2, 4, 5], 2)],
)
def test_at_most_a_third_of_the_cohort_is_vetoed(clients: int, far: list[int], most: int) -> None:
    strategy = build("copra-merge")
    target = goal()
    train = towards(target, far=far)
    everyone = cohort(*range(clients))
    merged, _ = one_round(strategy, everyone, train, target_probe(target))
    assert len(merged.diagnostics["vetoed"]) == most
    assert set(merged.diagnostics["vetoed"]) <= set(far)
    alive = {k for k, w in merged.diagnostics["weights"].items() if w > 0}
    assert len(alive) == clients - most


def test_the_worst_is_vetoed_first() -> None:
    """Worst is who hurts most surely: the largest paired z, not the largest mean."""
    strategy = build("copra-merge", screening="none")
    target = goal()

    def train(who: Client, sent: Tensors) -> Tensors:
        size = {1: -1.5, 2: -4.0}.get(who.client, 1.0)
        return towards(target, far=[1, 2], times=size)(who, sent)

    state = strategy.start(common_start())
    updates = [
        Update(u.client, 10, u.tensors, u.sent)
        for u in updates_of(strategy, state, cohort(*range(8)), train)
    ]
    diagnostics = strategy.merge(state, updates, target_probe(target)).diagnostics
    z = diagnostics["leave_one_out_z"]
    assert min(z["1"], z["2"]) > 2 > max(z[k] for k in "034567")
    first, second = diagnostics["vetoed"]
    assert {first, second} == {1, 2}
    assert z[str(first)] > z[str(second)]


def test_honest_clients_are_all_kept() -> None:
    strategy = build("copra-merge")
    target = goal()
    merged, updates = one_round(strategy, cohort(*FULL), towards(target), target_probe(target))
    assert merged.diagnostics["vetoed"] == []
    plain = strategy.merge(strategy.start(common_start()), updates, None)
    assert digest(merged.state) == digest(plain.state)


def test_a_veto_that_the_judging_half_disputes_is_dropped() -> None:
    strategy = build("copra-merge")
    target = goal()
    probe = target_probe(target, judge=lambda losses: 1000 - losses)
    merged, updates = one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe)
    assert merged.diagnostics["proposed"] == [3]
    assert merged.diagnostics["vetoed"] == []
    assert "dropped" in merged.diagnostics["decision"]
    shares = {str(k): share for k, share in enumerate(shares_of(updates))}
    assert merged.diagnostics["weights"] == pytest.approx(shares)
    plain = strategy.merge(strategy.start(common_start()), updates, None)
    assert digest(merged.state) == digest(plain.state)


def test_a_veto_that_makes_no_difference_to_the_judging_half_is_dropped() -> None:
    strategy = build("copra-merge")
    target = goal()
    probe = target_probe(target, judge=torch.ones_like)
    merged, _ = one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe)
    assert merged.diagnostics["proposed"] == [3]
    assert merged.diagnostics["vetoed"] == []


@pytest.mark.parametrize(
    ("z", "veto_z", "vetoed"), [(1.5, 2.0, []), (2.5, 2.0, [3]), (2.5, 3.0, []), (1.5, 1.0, [3])]
)
def test_a_veto_needs_as_many_standard_errors_as_asked_for(
    z: float, veto_z: float, vetoed: list[int]
) -> None:
    """Losses are the distance to the target times fixed numbers, whose z is known by hand."""
    strategy = build("copra-merge", veto_z=veto_z, screening="none")
    target = goal()
    half = ROWS_OF_PROBE // 2
    swing = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(half // 2)
    factors = torch.empty(ROWS_OF_PROBE, dtype=torch.float64)
    factors[0::2] = swing + z * float(swing.std()) / half**0.5
    factors[1::2] = swing + 10.0  # the judging half has no doubt

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        rank = Term.of(tensors, "enc.0.query").rank
        found = {module: delta_of(tensors, module, scale(rank)) for module in MODULES}
        return (norm_of(minus(found, target)) * factors)[rows]

    merged, _ = one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe_of(probe))
    assert merged.diagnostics["leave_one_out_z"]["3"] == pytest.approx(z)
    assert merged.diagnostics["vetoed"] == vetoed
    assert ("proposed" in merged.diagnostics) == bool(vetoed)


@pytest.mark.parametrize(("z", "accepted"), [(0.5, False), (0.95, False), (1.05, True)])
def test_a_proposal_needs_one_standard_error_of_the_judging_half(z: float, accepted: bool) -> None:
    """As the test above, with the choosing half beyond doubt."""
    strategy, target = build("copra-merge", screening="none"), goal()
    half = ROWS_OF_PROBE // 2
    swing = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(half // 2)
    factors = torch.empty(ROWS_OF_PROBE, dtype=torch.float64)
    factors[0::2] = swing + 10.0
    factors[1::2] = swing + z * float(swing.std()) / half**0.5

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        rank = Term.of(tensors, "enc.0.query").rank
        found = {module: delta_of(tensors, module, scale(rank)) for module in MODULES}
        return (norm_of(minus(found, target)) * factors)[rows]

    merged, _ = one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe_of(probe))
    assert merged.diagnostics["judged_z"] == pytest.approx(z)
    assert merged.diagnostics["vetoed"] == ([3] if accepted else [])


def test_choosing_and_judging_use_different_rows_and_together_all() -> None:
    strategy = build("copra-merge")
    target, asked = goal(), set[tuple[int, ...]]()
    inner = target_probe(target)

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        asked.add(tuple(range(ROWS_OF_PROBE)[rows]))
        return inner.losses(tensors, rows)

    one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe_of(probe))
    first, second = asked
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(ROWS_OF_PROBE))


def test_identical_clients_are_never_vetoed() -> None:
    strategy = build("copra-merge")
    target = goal()
    train = towards(target)
    merged, updates = one_round(
        strategy, cohort(*FULL), lambda _, sent: train(client(0), sent), target_probe(target)
    )
    assert merged.diagnostics["vetoed"] == []
    assert_close(
        served_delta(strategy, merged),
        {m: delta_of(updates[0].tensors, m, scale(4)) for m in MODULES},
    )


def test_a_probe_of_one_row_has_no_say() -> None:
    """One row has no standard error."""
    strategy = build("copra-merge")
    target = goal()
    inner = target_probe(target)
    probe = probe_of(lambda t, rows: inner.losses(t, rows)[:1])
    merged, _ = one_round(strategy, cohort(*FULL), towards(target, far=[3]), probe)
    assert merged.diagnostics["vetoed"] == []


def test_losses_that_are_not_numbers_decide_nothing() -> None:
    strategy = build("copra-merge")
    merged, _ = one_round(
        strategy,
        cohort(*FULL),
        drift(0),
        probe_of(lambda _, rows: torch.full((ROWS_OF_PROBE,), float("nan"))[rows]),
    )
    assert merged.diagnostics["vetoed"] == []


# --- copra-merge: lines and steps -----------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_a_longer_step_is_one_of_the_mean_increment(ranks: tuple[int, ...]) -> None:
    """`T_R(G + η Σ w_k D_k)`: never of factors, whose products would grow with η²."""
    rank = max(ranks)
    everyone = cohort(*FULL, ranks=ranks)
    strategy = build("copra-merge", rank, step_lengths=(0.75, 1.5), veto_z=1e9, norm_limit=1000.0)
    state = play(strategy, [everyone], state=strategy.start(common_start(rank)))
    updates = updates_of(strategy, state, everyone, drift(3))
    aim = exact_increment_merge(
        strategy, state, updates, [1.5 * share for share in shares_of(updates)]
    )
    stepped = strategy.merge(state, updates, target_probe(aim))
    assert stepped.diagnostics["step"] == 1.5
    assert_close(served_delta(strategy, stepped), aim, 2e-6)
    plain = strategy.merge(state, updates, None).state
    for name, head in heads(state).items():
        torch.testing.assert_close(
            stepped.state[name] - head, 1.5 * (plain[name] - head), rtol=1e-4, atol=1e-5
        )


def wavy(draw: torch.Generator) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """Losses of 64 rows that swing with the delta and the head, so that lines have bumps."""
    rows = {
        m: torch.randn(64, size[0] * size[1], generator=draw).double()
        for m, size in MODULES.items()
    }
    last = torch.randn(64, 30, generator=draw).double()

    def losses(found: dict[str, Tensor], head: Tensor) -> Tensor:
        at = sum((0.05 * rows[m] @ delta.flatten() for m, delta in found.items()))
        return 2 + torch.cos(at + 0.1 * last @ head.double().flatten())

    return losses


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_barriers_are_those_of_dense_models_on_the_lines_to_the_clients(
    ranks: tuple[int, ...],
) -> None:
    """`f_k(λ) = L(T_R(G + λ·D_k))` with its head, D_k within its length limit as it is merged."""
    rank, losses = max(ranks), wavy(torch.Generator().manual_seed(3))
    strategy = build("copra-merge", rank, barrier_limit=1e9, veto_z=1e9, norm_limit=1.5)
    everyone = cohort(*FULL, ranks=ranks)
    state = play(strategy, [everyone], state=strategy.start(common_start(rank)))
    updates = updates_of(strategy, state, everyone, longer(4.0, who=2))

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        found = {m: delta_of(tensors, m, scale(rank)) for m in MODULES}
        return losses(found, tensors["head.toy.weight"])[rows]

    told = strategy.merge(state, updates, probe_of(probe)).diagnostics
    lengths = [
        norm_of(
            {
                m: delta_of(u.tensors, m, u.client.scale) - delta_of(u.sent, m, u.client.scale)
                for m in MODULES
            }
        )
        for u in updates
    ]
    limits = [min(1.0, 1.5 * statistics.median(lengths) / length) for length in lengths]
    assert [limit < 1 for limit in limits] == [u.client.client in told["clipped"] for u in updates]
    assert 2 in told["clipped"]
    expected = {}
    for k, (u, limit) in enumerate(zip(updates, limits, strict=True)):
        along = []
        for position in (0.0, 0.5, 1.0):
            factors = [position * limit * (j == k) for j in range(4)]
            found = exact_increment_merge(strategy, state, updates, factors)
            change = u.tensors["head.toy.weight"] - u.sent["head.toy.weight"]
            head = state["head.toy.weight"] + position * limit * change
            along.append(float(losses(found, head)[0::2].mean()))
        expected[str(u.client.client)] = max(0.0, along[1] - (along[0] + along[2]) / 2)
    assert sum(height > 0.01 for height in expected.values()) >= 2
    assert told["barriers"] == pytest.approx(expected, abs=1e-5)


def test_where_everybody_is_behind_a_barrier_the_data_weighs_and_the_round_is_flagged() -> None:
    strategy = build("copra-merge", barrier_limit=0.25, tilt_steps=2)
    state = strategy.start(common_start())
    updates = updates_of(strategy, state, cohort(*FULL), drift(1, alike=True))
    start, end = state["head.toy.bias"], updates[0].tensors["head.toy.bias"]
    way = (end - start).double()

    def probe(tensors: Tensors, rows: slice) -> Tensor:
        gone = float((tensors["head.toy.bias"] - start).double() @ way / way.square().sum())
        return (1 + 1e6 * gone * (1 - gone) * torch.ones(64).double())[rows]

    merged = strategy.merge(state, updates, probe_of(probe))
    assert merged.diagnostics["decision"] == "nobody is left: weights by data"
    plain = strategy.merge(state, updates, None)
    assert digest(merged.state) == digest(plain.state)
    assert merged.diagnostics["weights"] == plain.diagnostics["weights"]


def test_an_increment_that_goes_too_far_is_shortened_and_not_left_out() -> None:
    """Client 3 returns three times the target: its best position is a third of the others'."""
    target = goal()
    train = towards(target, far=[3], times=3.0)
    strategy = build("copra-merge", shorten=True, veto_z=1e9, norm_limit=1000.0)
    state = strategy.start(common_start())
    updates = updates_of(strategy, state, cohort(*FULL), train)
    merged = strategy.merge(state, updates, target_probe(target))
    assert merged.diagnostics["best_positions"]["3"] == pytest.approx(1 / 3, abs=0.02)
    factors = [merged.diagnostics["shortened"].get(str(k), 1.0) for k in FULL]
    assert factors[3] == 0.5
    assert min(factors[:3]) > 0.9
    assert merged.diagnostics["judged_z"] > 1
    shares = {str(k): share for k, share in enumerate(shares_of(updates))}
    assert merged.diagnostics["weights"] == pytest.approx(shares)
    steps = [c * f for c, f in zip(shares_of(updates), factors, strict=True)]
    exact = exact_increment_merge(strategy, state, updates, steps)
    assert_close(served_delta(strategy, merged), exact)
    idle_option = build("copra-merge", veto_z=1e9, norm_limit=1000.0)
    assert "shortened" not in idle_option.merge(state, updates, target_probe(target)).diagnostics


# --- controls -------------------------------------------------------------------------------------


def test_dense_oracle_serves_the_exact_mean_for_many_rounds() -> None:
    strategy = build("dense-oracle")
    state = strategy.start(common_start())
    for number, who in enumerate([FULL, (0, 2), (1,), FULL, (3, 1)]):
        updates = updates_of(strategy, state, cohort(*who), drift(number))
        state = strategy.merge(state, updates, None).state
        found, exact = deltas(strategy.serve(state)[0]), mean_deltas(updates)
        for module in MODULES:
            error = float((found[module] - exact[module]).norm() / exact[module].norm())
            assert error < 1e-12, (number, module)
        assert state[residual_name("enc.0.query")].dtype == torch.float64


def test_dense_oracle_puts_the_best_of_the_rank_into_the_factors() -> None:
    strategy = build("dense-oracle")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    for module, exact in mean_deltas(updates).items():
        term = Term.of(merged.state, module)
        factors = scale(4) * term.B.double() @ term.A.double()
        assert_close({module: factors}, {module: truncated(exact, 4)})
        assert float(merged.state[residual_name(module)].norm()) > 0.1


def test_local_only_keeps_clients_apart() -> None:
    strategy = build("local-only")
    together = play(strategy, [cohort(*FULL)] * 3)
    for who in cohort(*FULL):
        alone = play(strategy, [[who]] * 3)
        assert digest(strategy.send(together, who)) == digest(strategy.send(alone, who))


def test_local_only_goes_on_from_a_clients_own_last_model() -> None:
    strategy = build("local-only", 8)
    who = client(1, 4)
    state = strategy.start(common_start(8))
    for number in range(3):
        updates = updates_of(strategy, state, [who], drift(number))
        state = strategy.merge(state, updates, None).state
        assert digest(strategy.send(state, who)) == digest(updates[0].tensors)


def test_local_only_serves_every_clients_model_at_its_own_rank() -> None:
    strategy = build("local-only", 8, ranks=RANKS, clients=3)
    everyone = cohort(0, 1, 2, ranks=RANKS)
    state = strategy.start(common_start(8))
    updates = updates_of(strategy, state, everyone, drift(0))
    served = strategy.serve(strategy.merge(state, updates, None).state)
    assert [model.rank for model in served] == list(RANKS)
    for model, update in zip(served, updates, strict=True):
        assert digest(model.tensors) == digest(update.tensors)


def test_centralised_trains_once_on_all_shards_with_all_their_steps() -> None:
    strategy = build("centralised")
    (assignment,) = strategy.assign([1, 4, 7])
    assert set(assignment.shards) == {1, 4, 7}
    assert assignment.client in assignment.shards
    assert assignment.steps_factor == 3


def test_centralised_serves_the_one_model_that_was_trained() -> None:
    strategy = build("centralised")
    merged, updates = one_round(strategy, cohort(*FULL), drift(0))
    assert len(updates) == 1
    (model,) = strategy.serve(merged.state)
    assert digest(model.tensors) == digest(updates[0].tensors)


# --- square layers, as many rows as ranks ---------------------------------------------------------

SQUARE = {"enc.0.query": (4, 4), "enc.0.value": (4, 9), "enc.1.query": (9, 4)}


@pytest.mark.parametrize("name", ["ffa-lora", "flexlora", "copra-merge", "dense-oracle"])
def test_exact_methods_stay_exact_where_a_and_b_have_one_shape(name: str) -> None:
    """At full rank all of these are the mean; A told from B by shape[0] == r would show."""
    strategy = build(name)
    state = strategy.start(common_start(modules=SQUARE))
    for number in range(2):
        updates = updates_of(strategy, state, cohort(*FULL), drift(number))
        state = strategy.merge(state, updates, None).state
        assert_close(deltas(strategy.serve(state)[0]), mean_deltas(updates), 2e-6)


def test_fedavg_tells_a_from_b_in_square_layers() -> None:
    strategy = build("fedavg")
    state = strategy.start(common_start(modules=SQUARE))
    updates = updates_of(strategy, state, cohort(*FULL), drift(0))
    merged = strategy.merge(state, updates, None).state
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), factor_mean(updates, name), rtol=0, atol=1e-7)


# --- what is reported of all that -----------------------------------------------------------------


def dense_error(strategy: Strategy, merged: Merged, updates: Sequence[Update]) -> float:
    found, exact = served_delta(strategy, merged), mean_deltas(updates)
    return norm_of(minus(found, exact)) / norm_of(exact)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("fedavg", (4,)), ("flexlora", (4,)), ("flexlora", RANKS), ("copra-merge", RANKS)],
)
def test_aggregation_error_equals_the_dense_formula(name: str, ranks: tuple[int, ...]) -> None:
    strategy = build(name, max(ranks))
    known = setting(max(ranks), ranks=ranks)
    state = play(strategy, [cohort(*FULL, ranks=ranks)])
    updates = updates_of(strategy, state, cohort(*FULL, ranks=ranks), drift(1))
    merged = strategy.merge(state, updates, None)
    found = aggregation_error(strategy.serve(merged.state), updates, known)
    assert found is not None
    assert found.error.total == pytest.approx(dense_error(strategy, merged, updates), rel=1e-6)
    assert found is not None
    assert found.error.total > 0.01


@pytest.mark.parametrize("name", ["ffa-lora", "dense-oracle", "centralised"])
def test_aggregation_error_of_exact_methods_is_rounding(name: str) -> None:
    strategy = build(name)
    state = strategy.start(common_start())
    for number in range(3):
        updates = updates_of(strategy, state, cohort(*FULL), drift(number))
        state = strategy.merge(state, updates, None).state
        measured = aggregation_error(strategy.serve(state), updates, SETTING)
        assert measured is not None
        error = measured.error.total
        assert error is not None
        assert error < 1e-6


def test_aggregation_error_of_copra_merge_is_rounding_when_its_rank_suffices() -> None:
    strategy = build("copra-merge", 3, server_rank=9)
    merged, updates = one_round(strategy, cohort(0, 1, 2, ranks=(3,)), drift(0))
    measured = aggregation_error(strategy.serve(merged.state), updates, setting(3))
    assert measured is not None
    error = measured.error.total
    assert error is not None
    assert error < 1e-6


@pytest.mark.parametrize("who", [FULL, (2,)])
def test_there_is_no_aggregation_error_where_clients_keep_their_models(
    who: tuple[int, ...],
) -> None:
    """Not even when only one of them has trained yet."""
    strategy = build("local-only")
    merged, updates = one_round(strategy, cohort(*who), drift(0))
    assert aggregation_error(strategy.serve(merged.state), updates, SETTING) is None


@pytest.mark.parametrize("name", LORA_METHODS)
def test_there_is_no_aggregation_error_before_there_is_a_delta(name: str) -> None:
    strategy = build(name)
    merged, updates = one_round(strategy, cohort(*FULL), idle)
    assert aggregation_error(strategy.serve(merged.state), updates, SETTING) is None


def test_aggregation_error_of_nothing_served_against_a_delta_is_one() -> None:
    strategy = build("fedavg")
    _, updates = one_round(strategy, cohort(*FULL), drift(0))
    measured = aggregation_error([Served(common_start(), 4)], updates, SETTING)
    assert measured is not None
    error = measured.error.total
    assert error == pytest.approx(1.0)
