"""Task arithmetic, TIES and DARE against dense sums, rules spelt out entry by entry, and PEFT."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from toy_federation import (
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
    mean_deltas,
    play,
    truncated,
    updates_of,
)

from common.tensors import Tensors, digest
from strategies.base import Merged, Strategy, Update
from strategies.ties import disjoint_mean, trimmed

FULL = (0, 1, 2, 3)
RANKS = (2, 4, 8)
FAMILY = ("task-arithmetic", "ties", "dare")


def shares_of(updates: Sequence[Update]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def increments_of(updates: Sequence[Update], module: str) -> list[Tensor]:
    """Return `ΔW_k - S_k`, dense."""
    return [
        delta_of(u.tensors, module, u.client.scale) - delta_of(u.sent, module, u.client.scale)
        for u in updates
    ]


def ties_by_entry(increments: Sequence[Tensor], shares: Sequence[float], density: float) -> Tensor:
    """TIES as the paper tells it, one number at a time."""
    m, n = increments[0].shape
    kept = math.ceil(Fraction(str(density)) * m * n)
    lists = [increment.flatten().tolist() for increment in increments]
    thresholds = [sorted(map(abs, values), reverse=True)[kept - 1] for values in lists]
    merged = []
    for entries in zip(*lists, strict=True):
        stay = [x if abs(x) >= t else 0.0 for x, t in zip(entries, thresholds, strict=True)]
        elected = sum(p * x for p, x in zip(shares, stay, strict=True))
        agree = [(p, x) for p, x in zip(shares, stay, strict=True) if x * elected > 0]
        total = sum(p for p, _ in agree)
        merged.append(sum(p * x for p, x in agree) / total if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(m, n)


def warm_round(
    strategy: Strategy, ranks: tuple[int, ...] = (4,)
) -> tuple[Tensors, list[Update], Merged]:
    """Return a state that two rounds have led to, the updates of a third, and their merge."""
    everyone = cohort(*FULL, ranks=ranks)
    state = play(strategy, [everyone] * 2)
    updates = updates_of(strategy, state, everyone, drift(5))
    return state, updates, strategy.merge(state, updates, None)


Dense = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def mean_rule(increments: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return sum(p * x for p, x in zip(shares, increments, strict=True))


def assert_adds(
    strategy: Strategy, state: Tensors, updates: Sequence[Update], merged: Merged, rule: Dense
) -> None:
    """Demand `T_R(G + rule(τ))` in every module."""
    (before,), (after,) = strategy.serve(state), strategy.serve(merged.state)
    expected = {
        module: truncated(G + rule(increments_of(updates, module), shares_of(updates)), after.rank)
        for module, G in deltas(before).items()
    }
    assert_close(deltas(after), expected)


# --- the sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(4,), RANKS])
@pytest.mark.parametrize("scaling", [1.0, 0.4])
def test_task_arithmetic_adds_a_multiple_of_the_mean_increment(
    ranks: tuple[int, ...], scaling: float
) -> None:
    strategy = build("task-arithmetic", max(ranks), ranks=ranks, scaling=scaling)
    state, updates, merged = warm_round(strategy, ranks)
    assert_adds(
        strategy, state, updates, merged, lambda taus, shares: scaling * mean_rule(taus, shares)
    )


@pytest.mark.parametrize("ranks", [(4,), RANKS])
@pytest.mark.parametrize(("density", "scaling"), [(0.2, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_ties_is_the_rule_of_the_paper_entry_by_entry(
    ranks: tuple[int, ...], density: float, scaling: float
) -> None:
    strategy = build("ties", max(ranks), ranks=ranks, density=density, scaling=scaling)
    state, updates, merged = warm_round(strategy, ranks)
    assert_adds(
        strategy,
        state,
        updates,
        merged,
        lambda taus, shares: scaling * ties_by_entry(taus, shares, density),
    )


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("warm", [0, 1])
def test_without_any_sparsity_one_client_is_returned_as_it_is(name: str, warm: int) -> None:
    strategy = build(name)
    state = play(strategy, [cohort(*FULL)] * warm) if warm else strategy.start(common_start())
    updates = updates_of(strategy, state, [client(2)], drift(5))
    (served,) = strategy.serve(strategy.merge(state, updates, None).state)
    assert_close(deltas(served), mean_deltas(updates))
    assert_close(heads(served.tensors), heads(updates[0].tensors))


def test_one_shot_task_arithmetic_is_the_mean_of_the_deltas() -> None:
    strategy = build("task-arithmetic")
    state = strategy.start(common_start())
    updates = updates_of(strategy, state, cohort(*FULL), drift(0))
    (served,) = strategy.serve(strategy.merge(state, updates, None).state)
    best = {module: truncated(delta, 4) for module, delta in mean_deltas(updates).items()}
    assert_close(deltas(served), best)


def test_kept_energy_is_what_truncation_leaves() -> None:
    strategy = build("ties", density=0.2)
    state, updates, merged = warm_round(strategy)
    (before,), (after,) = strategy.serve(state), strategy.serve(merged.state)
    whole = {
        module: G + ties_by_entry(increments_of(updates, module), shares_of(updates), 0.2)
        for module, G in deltas(before).items()
    }
    kept = sum(float(delta.square().sum()) for delta in deltas(after).values())
    total = sum(float(delta.square().sum()) for delta in whole.values())
    assert kept < 0.99 * total
    assert merged.diagnostics["kept_energy"] == pytest.approx(kept / total, rel=1e-5)


# --- TIES by hand ---------------------------------------------------------------------------------


def test_disjoint_mean_by_hand() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    increments = torch.tensor(
        [
            # agree; two against one; outvoted by weight x size; cancelled; absent; all zero
            [2.0, 2.0, 1.0, 3.0, 0.0, 0.0],
            [4.0, -1.0, -4.0, -5.0, 6.0, 0.0],
            [6.0, 3.0, 1.0, 0.0, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )[:, None, :]
    found = disjoint_mean(increments, weights)[0]
    expected = torch.tensor([3.4, 1.6 / 0.7, -4.0, 0.0, 6.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_trimming_keeps_the_largest_magnitudes_of_the_tensor() -> None:
    increment = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 0.5, 4.0]], dtype=torch.float64)
    for density, kept in [(0.5, {-5.0, 4.0, -3.0}), (1 / 6, {-5.0}), (0.17, {-5.0, 4.0})]:
        found = trimmed(increment, density)
        assert set(found[found != 0].tolist()) == kept
        assert torch.equal(found[found != 0], increment[found != 0])
    assert torch.equal(trimmed(increment, 1.0), increment)


def test_trimming_counts_entries_without_rounding_up_an_error_of_rounding() -> None:
    assert 0.07 * 100 > 7
    values = torch.arange(1, 101, dtype=torch.float64).reshape(10, 10)
    assert int((trimmed(values, 0.07) != 0).sum()) == 7


def test_idle_clients_do_not_dilute_a_disjoint_mean() -> None:
    """An increment of zero has no sign and so agrees with nobody; a mean would halve the rest."""
    strategy = build("ties")
    state = play(strategy, [cohort(*FULL)])
    first, second = updates_of(strategy, state, cohort(0, 2), drift(5))
    idle = replace(second, tensors=second.sent)
    (with_idle,) = strategy.serve(strategy.merge(state, [first, idle], None).state)
    (alone,) = strategy.serve(strategy.merge(state, [first], None).state)
    assert_close(deltas(with_idle), deltas(alone))


def test_ties_is_peft_s_where_that_is_right() -> None:
    """At weights K·p_k, all equal, PEFT's sum over the count of those who agree is the mean."""
    stream = torch.Generator().manual_seed(1)
    increments = torch.randn(5, 12, 10, generator=stream, dtype=torch.float64)
    theirs = merge_utils.ties(list(increments), torch.ones(5), density=0.25)
    kept = torch.stack([trimmed(increment, 0.25) for increment in increments])
    ours = disjoint_mean(kept, torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs)
    assert float(ours.norm()) > 1


# --- DARE -----------------------------------------------------------------------------------------


def dare_increment(**options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what one DARE merge of one client adds, at a rank that loses nothing, and its τ."""
    strategy = build("dare", 14, **options)
    state = strategy.start(common_start(14))
    updates = updates_of(strategy, state, [client(0, 14)], drift(0))
    (served,) = strategy.serve(strategy.merge(state, updates, None).state)
    return deltas(served), mean_deltas(updates)


@pytest.mark.parametrize("then", ["mean", "ties"])
def test_dare_drops_entries_and_rescales_the_rest(then: str) -> None:
    added, increments = dare_increment(density=0.6, then=then)
    kept = total = 0
    for module, tau in increments.items():
        ratio = added[module] / tau
        stays = ratio > 0.5
        torch.testing.assert_close(
            added[module], torch.where(stays, tau / 0.6, 0.0), rtol=0, atol=1e-4
        )
        kept, total = kept + int(stays.sum()), total + stays.numel()
    assert kept / total == pytest.approx(0.6, abs=0.1)


def test_dare_masks_differ_between_modules_clients_and_rounds() -> None:
    square = {"a": (10, 10), "b": (10, 10)}
    strategy = build("dare", 10, density=0.5)
    state = strategy.start(common_start(10, modules=square))

    def kept(state: Tensors, who: int) -> tuple[dict[str, Tensor], Tensors]:
        """Return which entries of an increment of ones are added."""
        (before,) = strategy.serve(state)
        sent = strategy.send(state, client(who, 10))
        returned = dict(sent)
        scale = client(who, 10).scale
        for module, G in deltas(before).items():
            returned[f"{module}.lora_B.weight"] = ((G + 1) / scale).float()
            returned[f"{module}.lora_A.weight"] = torch.eye(10)
        merged = strategy.merge(state, [Update(client(who, 10), 5, returned, sent)], None).state
        (after,) = strategy.serve(merged)
        return {m: delta - deltas(before)[m] > 1 for m, delta in deltas(after).items()}, merged

    first, later = kept(state, 0)
    again, _ = kept(state, 0)
    other_client, _ = kept(state, 1)
    next_round, _ = kept(later, 0)
    for module in square:
        assert torch.equal(first[module], again[module])
        assert not torch.equal(first[module], other_client[module])
        assert not torch.equal(first[module], next_round[module])
    assert not torch.equal(first["a"], first["b"])


def test_dare_is_unbiased() -> None:
    """The mean over many masks is the increment: here one client's, over many seeds."""
    count = 200
    sums: dict[str, Tensor] = {}
    strategy = build("dare", 14, clients=1, density=0.3)
    state = strategy.start(common_start(14))
    (update,) = updates_of(strategy, state, [client(0, 14)], drift(0))
    for number in range(count):
        # A client's number is part of the seed of its mask.
        renamed = replace(update, client=replace(update.client, client=number))
        (served,) = strategy.serve(strategy.merge(state, [renamed], None).state)
        for module, delta in deltas(served).items():
            sums[module] = sums.get(module, torch.zeros(())) + delta / count
    for module, tau in mean_deltas([update]).items():
        error = float((sums[module] - tau).norm() / tau.norm())
        assert error == pytest.approx(((1 - 0.3) / 0.3 / count) ** 0.5, rel=0.25)


@pytest.mark.parametrize("then", ["mean", "ties"])
def test_dare_goes_on_from_a_saved_state_and_knows_clients_not_their_order(then: str) -> None:
    options = {"density": 0.5, "then": then}
    rounds = [cohort(*FULL), cohort(0, 2), cohort(1, 3)]
    through = play(build("dare", **options), rounds)
    saved = {n: t.clone() for n, t in play(build("dare", **options), rounds[:2]).items()}
    resumed = play(build("dare", **options), rounds[2:], train=lambda _: drift(2), state=saved)
    assert digest(resumed) == digest(through)
    strategy = build("dare", **options)
    state, updates, merged = warm_round(strategy)
    turned = strategy.merge(state, updates[::-1], None).state
    assert_same_models(strategy.serve(turned), strategy.serve(merged.state))


def test_dare_then_ties_elects_signs_among_what_is_left() -> None:
    """With two clients that disagree everywhere, the larger share wins wherever it was kept."""
    strategy = build("dare", 14, density=0.5, then="ties")
    state = strategy.start(common_start(14))
    (update,) = updates_of(strategy, state, [client(2, 14)], drift(0))
    against = {n: -t if n.endswith("lora_B.weight") else t for n, t in update.tensors.items()}
    other = replace(update, client=client(1, 14), num_examples=10, tensors=against)
    (served,) = strategy.serve(strategy.merge(state, [update, other], None).state)
    added = deltas(served)
    ratios = torch.cat(
        [
            (added[module] / tau)[tau.abs() > 0.1]  # where float32 leaves two digits
            for module, tau in mean_deltas([update]).items()
        ]
    )
    # Kept of the first; only of the second; of neither.
    assert set(ratios.round(decimals=2).tolist()) == {2.0, -2.0, 0.0}
    for value, share in [(2.0, 0.5), (-2.0, 0.25), (0.0, 0.25)]:
        found = float((ratios.round(decimals=2) == value).double().mean())
        assert found == pytest.approx(share, abs=0.1)
