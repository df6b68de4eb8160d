"""Robust reductions: what they compute, and how far a malicious client can move them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_federation import (
    MODULES,
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
    play,
    truncated,
    updates_of,
)

from common.errors import ConfigError
from common.lowrank import factor_names
from common.tensors import Tensors
from strategies.base import Served, Strategy, Update
from strategies.robust import krum_scores, middle_mean, squared_distances, trimmed_each_side

SEVEN = tuple(range(7))
RANKS = (2, 4, 8)
ROBUST: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed-mean": {"trim": 0.2},
    "multi-krum": {"byzantine": 2},
    "geometric-median": {},
}


def robust(name: str, rank: int = 4, ranks: Sequence[int] = (4,), clients: int = 7) -> Strategy:
    return build(name, rank, ranks=ranks, clients=clients, **ROBUST[name])


def warm(strategy: Strategy, ranks: Sequence[int] = (4,)) -> tuple[Tensors, list[Update]]:
    """Return a state that two rounds of seven clients have led to, and the updates of a third."""
    everyone = cohort(*SEVEN, ranks=ranks)
    state = play(strategy, [everyone] * 2)
    return state, updates_of(strategy, state, everyone, drift(5))


def served_after(strategy: Strategy, state: Tensors, updates: Sequence[Update]) -> Served:
    (served,) = strategy.serve(strategy.merge(state, updates, None).state)
    return served


def increment_of(update: Update, module: str) -> Tensor:
    after = delta_of(update.tensors, module, update.client.scale)
    return after - delta_of(update.sent, module, update.client.scale)


def norm_of(by_name: Tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in by_name.values()) ** 0.5


def distance(one: Served, other: Served) -> float:
    """Return the distance of two served models over their deltas and heads."""
    first, second = ({**deltas(model), **heads(model.tensors)} for model in (one, other))
    return norm_of({name: tensor - second[name] for name, tensor in first.items()})


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(4,), RANKS])
@pytest.mark.parametrize(("name", "cut"), [("median", 3), ("trimmed-mean", 2)])
def test_entries_are_sorted_over_clients_and_the_middle_is_averaged(
    name: str, cut: int, ranks: tuple[int, ...]
) -> None:
    strategy = robust(name, max(ranks), ranks)
    state, updates = warm(strategy, ranks)
    (before,) = strategy.serve(state)
    merged = strategy.merge(state, updates, None)
    (after,) = strategy.serve(merged.state)
    assert merged.diagnostics["trimmed_each_side"] == cut
    expected = {}
    for module, G in deltas(before).items():
        flat = torch.stack([increment_of(u, module).flatten() for u in updates], dim=1)
        rows = [sorted(row.tolist())[cut : 7 - cut] for row in flat]
        middle = torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)
        expected[module] = truncated(G + middle.reshape(G.shape), after.rank)
    assert_close(deltas(after), expected)


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_the_geometric_median_has_the_least_sum_of_distances(ranks: tuple[int, ...]) -> None:
    """Against dense vectors, and against points a little to every side of what was found."""
    strategy = build("geometric-median", max(ranks), ranks=ranks, clients=7, iterations=200)
    state, updates = warm(strategy, ranks)
    merged = strategy.merge(state, updates, None)
    shares = torch.tensor([merged.diagnostics["weights"][str(k)] for k in SEVEN]).double()
    points = torch.stack(
        [
            torch.cat(
                [increment_of(u, module).flatten() for module in MODULES]
                + [(u.tensors[n] - u.sent[n]).double().flatten() for n in sorted(heads(u.tensors))]
            )
            for u in updates
        ]
    )
    found = shares @ points
    least = float((points - found).norm(dim=1).sum())
    stream = torch.Generator().manual_seed(0)
    for _ in range(20):
        aside = torch.randn(points.shape[1], generator=stream, dtype=torch.float64)
        moved = found + 0.05 * found.norm() * aside / aside.norm()
        assert float((points - moved).norm(dim=1).sum()) > least
    assert float((points - points.mean(dim=0)).norm(dim=1).sum()) > least
    (before,), (after,) = strategy.serve(state), strategy.serve(merged.state)
    assert_close(
        deltas(after),
        {
            module: truncated(
                G + sum(w * increment_of(u, module) for w, u in zip(shares, updates, strict=True)),
                after.rank,
            )
            for module, G in deltas(before).items()
        },
    )


def test_the_median_is_that_of_numpy_for_even_and_odd_numbers_of_clients() -> None:
    for clients in range(1, 8):
        stream = torch.Generator().manual_seed(clients)
        values = torch.randn(clients, 5, 3, generator=stream, dtype=torch.float64)
        torch.testing.assert_close(middle_mean(values, 0.5), values.quantile(0.5, dim=0))


@pytest.mark.parametrize(
    ("clients", "share", "cut"),
    [
        *[(1, 0.2, 0), (2, 0.2, 0), (3, 0.2, 1), (4, 0.2, 1), (10, 0.2, 2), (11, 0.2, 3)],
        *[(100, 0.07, 7), (10, 0.0, 0), (10, 0.49, 4), (9, 0.5, 4), (10, 0.5, 4)],
    ],
)
def test_a_share_of_a_client_is_a_client_and_somebody_stays(
    clients: int, share: float, cut: int
) -> None:
    assert trimmed_each_side(clients, share) == cut


def test_trimming_half_or_more_is_refused() -> None:
    with pytest.raises(ValueError, match="less than"):
        build("trimmed-mean", trim=0.5)


@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_distances_are_those_of_dense_increments_and_heads(ranks: tuple[int, ...]) -> None:
    strategy = robust("multi-krum", max(ranks), ranks)
    _, updates = warm(strategy, ranks)
    vectors = torch.stack(
        [
            torch.cat(
                [increment_of(u, module).flatten() for module in MODULES]
                + [(t - u.sent[n]).double().flatten() for n, t in heads(u.tensors).items()]
            )
            for u in updates
        ]
    )
    expected = (vectors[:, None] - vectors).square().sum(dim=2)
    torch.testing.assert_close(squared_distances(updates), expected, rtol=1e-9, atol=1e-9)


def test_krum_scores_by_hand() -> None:
    points = torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0], dtype=torch.float64)
    distances = (points[:, None] - points).square()
    # K - f - 2 = 2 nearest others.
    assert krum_scores(distances, 1) == [1 + 9, 1 + 4, 4 + 9, 16 + 36, 169 + 289]


@pytest.mark.parametrize("ranks", [(4,), RANKS])
@pytest.mark.parametrize(("keep", "kept"), [(0, 5), (1, 1), (3, 3), (7, 5)])
def test_multi_krum_averages_the_increments_of_the_lowest_scores(
    ranks: tuple[int, ...], keep: int, kept: int
) -> None:
    strategy = build("multi-krum", max(ranks), ranks=ranks, clients=7, byzantine=2, keep=keep)
    state, updates = warm(strategy, ranks)
    (before,) = strategy.serve(state)
    merged = strategy.merge(state, updates, None)
    (after,) = strategy.serve(merged.state)
    scores = krum_scores(squared_distances(updates), 2)
    chosen = sorted(sorted(SEVEN, key=lambda k: scores[k])[:kept])
    assert merged.diagnostics["selected"] == chosen
    expected = {}
    for module, G in deltas(before).items():
        mean = sum(increment_of(updates[k], module) for k in chosen) / kept
        expected[module] = truncated(G + mean, after.rank)
    assert_close(deltas(after), expected)
    for name, head in heads(after.tensors).items():
        mean = sum(updates[k].tensors[name].double() for k in chosen) / kept
        torch.testing.assert_close(head.double(), mean, rtol=0, atol=1e-6)


# --- attacks --------------------------------------------------------------------------------------


def attack(update: Update, times: float, parts: tuple[str, ...] = ("lora_B", "head")) -> Update:
    """Return the update with everything it learned turned round and made larger."""
    wrong = {
        name: update.sent[name] - times * (tensor - update.sent[name])
        if any(part in name for part in parts)
        else tensor
        for name, tensor in update.tensors.items()
    }
    return replace(update, tensors=wrong, num_examples=10**6)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("parts", [("lora_B", "head"), ("head",), ("enc.0.value",)])
def test_a_malicious_client_moves_the_model_by_a_bounded_amount(
    name: str, parts: tuple[str, ...]
) -> None:
    """However large the attack, it does no more than honest clients differ; fedavg follows it."""
    strategy = robust(name)
    state, updates = warm(strategy)
    honest = served_after(strategy, state, updates)
    spread = max(
        norm_of({module: increment_of(u, module) for module in MODULES} | heads(u.tensors))
        for u in updates
    )
    moved = {
        times: distance(
            served_after(strategy, state, [attack(updates[0], times, parts), *updates[1:]]), honest
        )
        for times in (1e3, 1e6)
    }
    assert 0 < moved[1e3] < 2 * spread
    # The limit is reached: a thousand times the attack does nothing more.
    assert moved[1e6] == pytest.approx(moved[1e3], rel=0.05)

    plain = build("fedavg", clients=7)
    start = plain.start(common_start())
    theirs = updates_of(plain, start, cohort(*SEVEN), drift(5))
    follows = [
        distance(
            served_after(plain, start, [attack(theirs[0], times, parts), *theirs[1:]]),
            served_after(plain, start, theirs),
        )
        for times in (1e3, 1e6)
    ]
    assert follows[0] > 100 * moved[1e3]
    assert follows[1] > 100 * follows[0]


@pytest.mark.parametrize("name", ROBUST)
def test_as_many_malicious_clients_as_promised_are_withstood(name: str) -> None:
    """Two of seven; they agree with each other, which is Krum's hard case."""
    strategy = robust(name)
    state, updates = warm(strategy)
    honest = served_after(strategy, state, updates)
    first = attack(updates[0], 1e4)
    twin = replace(updates[1], tensors=first.tensors, sent=first.sent)
    found = served_after(strategy, state, [first, twin, *updates[2:]])
    assert distance(found, honest) < 2 * distance(
        honest, served_after(strategy, state, updates[2:3])
    )


def test_multi_krum_leaves_the_malicious_out_and_says_so() -> None:
    strategy = robust("multi-krum")
    state, updates = warm(strategy)
    merged = strategy.merge(state, [*updates[:3], attack(updates[3], 20.0), *updates[4:]], None)
    assert 3 not in merged.diagnostics["selected"]
    assert merged.diagnostics["weights"]["3"] == 0
    assert merged.diagnostics["weights"].keys() == {str(k) for k in SEVEN}
    assert sum(merged.diagnostics["weights"].values()) == pytest.approx(1)


def test_a_head_of_one_task_is_defended_by_its_own_holders() -> None:
    tasks = ("news", "mail")
    strategy = build("median", clients=6, tasks=tasks)
    state = strategy.start(common_start(tasks=tasks))
    clients = [client(k, task=tasks[k % 2]) for k in range(6)]
    updates = updates_of(strategy, state, clients, drift(0))
    updates[0] = attack(updates[0], 1e6)
    merged = strategy.merge(state, updates, None).state
    for number, task in enumerate(tasks):
        own = [u.tensors for u in updates[number::2]]
        for part in ("weight", "bias"):
            name = f"head.{task}.{part}"
            expected = torch.stack([tensors[name] for tensors in own]).median(dim=0).values
            assert torch.equal(merged[name], expected)


def test_multi_krum_judges_the_heads_of_several_tasks_too() -> None:
    tasks = ("news", "mail")
    strategy = build("multi-krum", clients=6, tasks=tasks, byzantine=1)
    state = strategy.start(common_start(tasks=tasks))
    clients = [client(k, task=tasks[k % 2]) for k in range(6)]
    updates = updates_of(strategy, state, clients, drift(0))
    for number in range(6):
        attacked = list(updates)
        attacked[number] = attack(updates[number], 100.0, ("head",))
        merged = strategy.merge(state, attacked, None)
        assert merged.diagnostics["selected"] == [k for k in range(6) if k != number]


# --- factors have no median -----------------------------------------------------------------------


def turned(update: Update, seed: int) -> Update:
    """Return the same delta in other factors: `(BQ, Q⁻¹A)`."""
    stream = torch.Generator().manual_seed(seed)
    tensors = dict(update.tensors)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        rank = update.client.rank
        Q = torch.eye(rank) + 0.4 * torch.randn(rank, rank, generator=stream)
        tensors[name_B], tensors[name_A] = tensors[name_B] @ Q, Q.inverse() @ tensors[name_A]
    return replace(update, tensors=tensors)


def factor_median(updates: Sequence[Update], module: str) -> Tensor:
    """The median on factors: what this project does not do."""
    name_B, name_A = factor_names(module)
    B, A = (
        torch.stack([u.tensors[name].double() for u in updates]).quantile(0.5, dim=0)
        for name in (name_B, name_A)
    )
    return updates[0].client.scale * B @ A


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_other_factors_of_the_same_deltas_give_the_same_model(
    name: str, ranks: tuple[int, ...]
) -> None:
    strategy = robust(name, max(ranks), ranks)
    state, updates = warm(strategy, ranks)
    others = [turned(u, u.client.client) for u in updates]
    for one, other in zip(updates, others, strict=True):
        for module in MODULES:
            name_B, _ = factor_names(module)
            assert not torch.allclose(one.tensors[name_B], other.tensors[name_B], atol=0.1)
    found = strategy.serve(strategy.merge(state, others, None).state)
    # Q⁻¹ is float32.
    assert_same_models(found, strategy.serve(strategy.merge(state, updates, None).state), 1e-4)


def test_a_median_of_factors_depends_on_how_a_delta_is_written() -> None:
    _, updates = warm(robust("median"))
    others = [turned(u, u.client.client) for u in updates]
    for module in MODULES:
        once, again = factor_median(updates, module), factor_median(others, module)
        assert float((once - again).norm()) > 0.2 * float(once.norm())


# --- cohorts --------------------------------------------------------------------------------------


def test_more_malicious_clients_than_the_federation_admits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multi-krum.byzantine = 3: .* of 9 .* 8 .* at most 2"):
        build("multi-krum", clients=8, byzantine=3)
    build("multi-krum", clients=9, byzantine=3)


@pytest.mark.parametrize(
    ("came", "byzantine", "used", "said"),
    [
        (7, 2, 2, None),
        (7, 1, 1, None),
        (7, 0, 2, None),
        (6, 2, 1, "a cohort of 6 admits f = 1, not 2"),
        (4, 2, 0, "a cohort of 4 is too small to suspect anyone: that takes 5"),
        (1, 0, 0, "a cohort of 1 is too small to suspect anyone: that takes 5"),
    ],
)
def test_a_cohort_that_has_lost_clients_suspects_fewer_and_says_so(
    came: int, byzantine: int, used: int, said: str | None
) -> None:
    strategy = build("multi-krum", clients=7, byzantine=byzantine)
    state, updates = warm(strategy)
    diagnostics = strategy.merge(state, updates[:came], None).diagnostics
    assert diagnostics["byzantine"] == used
    assert len(diagnostics["selected"]) == came - used
    assert diagnostics.get("decision") == said
