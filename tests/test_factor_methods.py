"""Methods that train, turn, correct, pad or sketch the factors: against dense float64 sums."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy_federation import (
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
    model_after,
    play,
    scale,
    truncated,
    updates_of,
)

from common.lowrank import Term, factor_names, is_factor
from common.sketches import basis_name, projection_name
from common.tensors import Tensors, digest, part_of
from strategies import STRATEGIES
from strategies.base import Client, Strategy, Update, merges_so_far, model_of
from strategies.cost import Sizes
from strategies.fedrot_lora import rotation
from strategies.hetlora import delta_norm

FULL = (0, 1, 2, 3)
PARTIAL = [FULL, (0, 3), (1,), (1, 2, 3), FULL]
RANKS = (2, 4, 8)


def rs_scale(rank: int) -> float:
    return 6.0 / math.sqrt(rank)


SCALES = [scale, rs_scale]


def served(strategy: Strategy, state: Tensors, scale: Scale = scale) -> dict[str, Tensor]:
    (model,) = strategy.serve(state)
    return deltas(model, scale)


def merged(strategy: Strategy, state: Tensors, updates: Sequence[Update]) -> Tensors:
    return strategy.merge(state, updates, None).state


def shares(updates: Sequence[Update]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def factor_mean(updates: Sequence[Update], name: str) -> Tensor:
    return sum(p * u.tensors[name].double() for p, u in zip(shares(updates), updates, strict=True))


def far(one: Tensors, other: Tensors) -> float:
    """Return the distance, relative to the second, over all modules together."""
    apart = sum(float((one[m] - other[m]).double().square().sum()) for m in other)
    return math.sqrt(apart / sum(float(t.double().square().sum()) for t in other.values()))


def in_another_gauge(tensors: Tensors, Q: Tensor) -> dict[str, Tensor]:
    """Return the same products in other factors, `(B·Q)(Q⁻¹·A)`."""
    turned = dict(tensors)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        turned[name_B] = (tensors[name_B].double() @ Q).float()
        turned[name_A] = (torch.linalg.inv(Q) @ tensors[name_A].double()).float()
    return turned


def some_rotation(rank: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64))
    Q[:, 0] *= torch.linalg.det(Q).sign()
    return Q


# --- rolora ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALES)
def test_rolora_is_exact_in_every_round_whoever_takes_part(rule: Scale) -> None:
    strategy = build("rolora", scale=rule)
    state = strategy.start(common_start())
    for number, who in enumerate(PARTIAL):
        updates = updates_of(strategy, state, cohort(*who, scale=rule), drift(number))
        state = merged(strategy, state, updates)
        assert_close(served(strategy, state, rule), mean_deltas(updates))
        assert merges_so_far(state) == number + 1


def test_rolora_trains_b_first_and_takes_turns() -> None:
    strategy = build("rolora")
    state = strategy.start(common_start())
    for number in range(4):
        moves, rests = ("lora_B", "lora_A") if number % 2 == 0 else ("lora_A", "lora_B")
        assert strategy.trains(state) == (moves, "head")
        after = play(strategy, [cohort(*FULL)], state=state, first=number)
        for module in MODULES:
            moving, resting = f"{module}.{moves}.weight", f"{module}.{rests}.weight"
            assert torch.equal(after[resting], state[resting])
            assert float((after[moving] - state[moving]).norm()) > 0.1
        state = after


def test_rolora_never_sends_the_count_of_its_rounds() -> None:
    strategy = build("rolora")
    state = play(strategy, [cohort(*FULL)])
    assert any("/" in name for name in state)
    assert not any("/" in name for name in strategy.send(state, client(0)))


SIZES = Sizes(A=1000, B=100, H=10, P=0, D=10**6, m=30, n=20, q=4, S=5000, K=3)


@pytest.mark.parametrize(
    ("name", "rounds", "expected"),
    [
        # Up what is trained; down, from round 2 on, what was merged the round before.
        ("rolora", (2, 3, 4), [(1010, 110), (110, 1010), (1010, 110)]),
        ("fedsvd", (2, 3), [(110, 1110), (110, 1110)]),
        ("fedask", (2, 3), [(4 * 50 + 10, 4 * 30 + 1110)] * 2),
    ],
)
def test_what_travels(name: str, rounds: Sequence[int], expected: list[tuple[int, int]]) -> None:
    assert [STRATEGIES[name].cost.numbers(SIZES, number) for number in rounds] == expected


# --- fedsvd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALES)
def test_fedsvd_is_exact_and_gives_a_orthonormal_rows(rule: Scale) -> None:
    strategy = build("fedsvd", scale=rule)
    state = strategy.start(common_start())
    for number, who in enumerate(PARTIAL):
        updates = updates_of(strategy, state, cohort(*who, scale=rule), drift(number))
        state = merged(strategy, state, updates)
        assert_close(served(strategy, state, rule), mean_deltas(updates))
        for module in MODULES:
            term = Term.of(state, module)
            torch.testing.assert_close(term.A @ term.A.T, torch.eye(4), rtol=0, atol=1e-6)
            gram = term.B.double().T @ term.B.double()
            values = gram.diagonal()
            assert_close({"gram": gram}, {"gram": torch.diag(values)}, 1e-5)
            assert bool((values[:-1] >= values[1:]).all())


def test_fedsvd_trains_and_sends_b_alone_and_keeps_the_row_space_of_a() -> None:
    strategy = build("fedsvd")
    state = strategy.start(common_start())
    assert strategy.trains(state) == ("lora_B", "head")
    assert not strategy.rules.steady
    after = play(strategy, [cohort(*FULL)] * 3)
    for module in MODULES:
        _, name_A = factor_names(module)
        rows = torch.cat([common_start()[name_A], after[name_A]]).double()
        assert int(torch.linalg.matrix_rank(rows, rtol=1e-5)) == 4


def test_fedsvd_serves_the_same_from_any_factors_of_the_same_product() -> None:
    """Clients' B are relative to the A they were sent: turned together they stand for the same."""
    strategy = build("fedsvd")
    state = play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    Q = some_rotation(4, 0) + 0.3 * torch.ones(4, 4, dtype=torch.float64)
    turned = [replace(u, tensors=in_another_gauge(u.tensors, Q)) for u in updates]
    found = merged(strategy, in_another_gauge(state, Q), turned)
    expected = merged(strategy, state, updates)
    assert_same_models(strategy.serve(found), strategy.serve(expected), 1e-5)
    for module in MODULES:  # even the factors are the same: an SVD knows the product alone
        assert_close({"A": Term.of(found, module).A}, {"A": Term.of(expected, module).A}, 1e-4)


def test_fedsvd_keeps_a_as_drawn_while_nothing_is_learned() -> None:
    strategy = build("fedsvd")
    state = play(strategy, [cohort(*FULL)] * 2, train=lambda _: idle)
    assert_close(model_of(state), common_start(), tolerance=0)


def test_fedsvd_leaves_dead_directions_trainable() -> None:
    strategy = build("fedsvd")

    def along_one(who: Client, sent: Tensors) -> Tensors:
        moved = drift(0)(who, sent)
        return {n: t * (torch.arange(4) < 1) if "lora_B" in n else t for n, t in moved.items()}

    state = strategy.start(common_start())
    updates = updates_of(strategy, state, cohort(*FULL), along_one)
    state = merged(strategy, state, updates)
    assert_close(served(strategy, state), mean_deltas(updates))
    for module in MODULES:
        term = Term.of(state, module)
        assert float(term.B[:, 1:].abs().max()) < 1e-6 < 0.1 < float(term.B[:, 0].norm())
        torch.testing.assert_close(term.A @ term.A.T, torch.eye(4), rtol=0, atol=1e-6)


# --- fedrot-lora ----------------------------------------------------------------------------------


def best_rotation(turning: Tensor, fixed: Tensor) -> Tensor:
    """Return the rotation R for which `turning·R` is nearest to `fixed` (Kabsch)."""
    U, _, Vh = torch.linalg.svd(turning.T @ fixed)
    mirror = torch.eye(len(Vh), dtype=torch.float64)
    mirror[-1, -1] = torch.linalg.det(U @ Vh).sign()
    return U @ mirror @ Vh


@pytest.mark.parametrize("rule", SCALES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_fedrot_lora_averages_turned_factors(rule: Scale, strength: float) -> None:
    """Round 0 plain, odd rounds turned towards A, even ones towards B, as they were sent."""
    strategy = build("fedrot-lora", scale=rule, strength=strength)
    state = strategy.start(common_start())
    for number, who in enumerate(PARTIAL):
        updates = updates_of(strategy, state, cohort(*who, scale=rule), drift(number))
        state = merged(strategy, state, updates)
        expected = {}
        for module in MODULES:
            mean_B, mean_A = 0.0, 0.0
            for p, u in zip(shares(updates), updates, strict=True):
                sent, back = (Term.of(t, module) for t in (u.sent, u.tensors))
                R = torch.eye(4).double()
                if number % 2 == 1:
                    R = best_rotation(back.A.double().T, sent.A.double().T)
                elif number:
                    R = best_rotation(back.B.double(), sent.B.double())
                U, _, Vh = torch.linalg.svd((1 - strength) * torch.eye(4).double() + strength * R)
                R = U @ Vh  # no reflection is nearest to a mean of rotations less than π apart
                mean_B = mean_B + p * back.B.double() @ R
                mean_A = mean_A + p * R.T @ back.A.double()
            expected[module] = rule(4) * mean_B @ mean_A
        assert_close(served(strategy, state, rule), expected)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_a_rotation_is_one_and_the_identity_where_nothing_turned(strength: float) -> None:
    draw = torch.Generator().manual_seed(0)
    eye = torch.eye(4, dtype=torch.float64)
    for number in range(20):
        M = torch.randn(4, 4, generator=draw, dtype=torch.float64)
        R = rotation(M * 10.0 ** (3 * number - 30), strength)
        torch.testing.assert_close(R.T @ R, eye, rtol=0, atol=1e-12)
        assert float(torch.linalg.det(R)) == pytest.approx(1.0)
        for rank in range(5):
            half = torch.randn(9, 4, generator=draw, dtype=torch.float64)
            half[:, rank:] = half[:, :rank] @ torch.ones(rank, 4 - rank, dtype=torch.float64)
            torch.testing.assert_close(rotation(half.T @ half, strength), eye, rtol=0, atol=1e-7)


def test_fedrot_lora_of_no_strength_is_fedavg() -> None:
    rounds = [cohort(*who) for who in PARTIAL]
    found = model_of(play(build("fedrot-lora", strength=0.0), rounds))
    assert_close(found, play(build("fedavg"), rounds))
    assert (
        far(
            served(build("fedrot-lora"), play(build("fedrot-lora"), rounds)),
            served(build("fedavg"), play(build("fedavg"), rounds)),
        )
        > 1e-2
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_fedrot_lora_undoes_rotations_of_clients_at_full_strength(rounds: int) -> None:
    """Round 1 aligns A, round 2 aligns B; at half strength, and in FedAvg, rotations do harm."""

    def harm(name: str, **options: float) -> float:
        strategy = build(name, **options)
        state = play(strategy, [cohort(*FULL)] * rounds)
        updates = updates_of(strategy, state, cohort(*FULL), drift(5))
        turned = [
            replace(u, tensors=in_another_gauge(u.tensors, some_rotation(4, u.client.client)))
            for u in updates
        ]
        found, expected = merged(strategy, state, turned), merged(strategy, state, updates)
        return far(served(strategy, found), served(strategy, expected))

    assert harm("fedrot-lora", strength=1.0) < 1e-6
    assert harm("fedavg") > 0.1
    assert 0.01 < harm("fedrot-lora", strength=0.5) < harm("fedavg")


def test_fedrot_lora_keeps_the_product_of_one_client() -> None:
    strategy = build("fedrot-lora", strength=0.7)
    state = play(strategy, [cohort(*FULL)] * 2)
    updates = updates_of(strategy, state, cohort(2), drift(5))
    after = merged(strategy, state, updates)
    assert_close(served(strategy, after), mean_deltas(updates))
    name_B, _ = factor_names("enc.0.query")
    assert float((after[name_B] - updates[0].tensors[name_B]).norm()) > 0.1  # and yet it turned


def test_fedrot_lora_leaves_the_factors_of_idle_clients_alone() -> None:
    """Even with B still zero, or without some directions, whose null space an SVD would mix."""
    strategy = build("fedrot-lora", strength=1.0)
    start = common_start()
    thin = {
        n: t * (torch.arange(4) < 2) if "lora_B" in n else t
        for n, t in drift(0)(client(0), start).items()
    }
    for state in (start, thin):
        after = play(
            strategy, [cohort(*FULL)] * 4, train=lambda _: idle, state=strategy.start(state)
        )
        assert_close(model_of(after), state, 1e-7)


# --- lora-fair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALES)
@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0])
def test_lora_fair_is_the_dense_ridge_regression(rule: Scale, regularisation: float) -> None:
    """ΔB as the specification writes it, with a dense (m, n) error."""
    strategy = build("lora-fair", scale=rule, regularisation=regularisation)
    state = strategy.start(common_start())
    for number, who in enumerate(PARTIAL):
        updates = updates_of(strategy, state, cohort(*who, scale=rule), drift(number))
        state = merged(strategy, state, updates)
        exact, expected = mean_deltas(updates), {}
        for module in MODULES:
            name_B, name_A = factor_names(module)
            B, A = factor_mean(updates, name_B), factor_mean(updates, name_A)
            error = exact[module] / rule(4) - B @ A
            ridge = regularisation * float((A @ A.T).diagonal().mean()) * torch.eye(4).double()
            correction = error @ A.T @ torch.linalg.inv(A @ A.T + ridge)
            expected[module] = rule(4) * (B + correction) @ A
            torch.testing.assert_close(state[name_A].double(), A, rtol=0, atol=1e-6)
        assert_close(served(strategy, state, rule), expected)


def test_lora_fair_misses_less_than_fedavg_and_no_b_would_miss_less() -> None:
    """Without regularisation what remains of the error is orthogonal to the rows of Ā."""
    strategy, plain = build("lora-fair", regularisation=0.0), build("fedavg")
    state = play(plain, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    exact = mean_deltas(updates)
    found = served(strategy, merged(strategy, state, updates))
    before = served(plain, merged(plain, state, updates))
    assert far(found, exact) < 0.98 * far(before, exact)
    for module in MODULES:
        A = factor_mean(updates, factor_names(module)[1])
        missed = (exact[module] - found[module]) @ A.T
        assert float(missed.norm()) < 1e-5 * float(exact[module].norm()) * float(A.norm())
        assert float((exact[module] - found[module]).norm()) > 0.1  # it is not exact


def test_lora_fair_of_heavy_regularisation_is_fedavg() -> None:
    rounds = [cohort(*who) for who in PARTIAL]
    found = play(build("lora-fair", regularisation=1e9), rounds)
    assert_close(found, play(build("fedavg"), rounds))


def test_lora_fair_does_not_depend_on_how_large_a_is_against_b() -> None:
    """With an absolute λ this would fail: `10B·A/10` is the same adapter."""
    strategy = build("lora-fair", regularisation=0.5)
    state = play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5))
    scaled = 10 * torch.eye(4, dtype=torch.float64)
    turned = [replace(u, tensors=in_another_gauge(u.tensors, scaled)) for u in updates]
    assert_close(
        served(strategy, merged(strategy, state, turned)),
        served(strategy, merged(strategy, state, updates)),
    )


def test_lora_fair_without_a_direction_of_a_stays_finite() -> None:
    strategy = build("lora-fair", regularisation=0.0)
    state = strategy.start(common_start())

    def without(who: Client, sent: Tensors) -> Tensors:
        moved = drift(0)(who, sent)
        return {
            n: t * (torch.arange(4) < 3)[:, None] if "lora_A" in n else t for n, t in moved.items()
        }

    updates = updates_of(strategy, state, cohort(*FULL), without)
    after = merged(strategy, state, updates)
    for module in MODULES:
        name_B, _ = factor_names(module)
        mean = factor_mean(updates, name_B)
        torch.testing.assert_close(after[name_B][:, 3].double(), mean[:, 3], rtol=0, atol=1e-6)
        assert float((after[name_B][:, :3].double() - mean[:, :3]).norm()) > 0.01


# --- hetlora --------------------------------------------------------------------------------------


def dense_norm(update: Update) -> float:
    products = (delta_of(update.tensors, module, 1.0) for module in MODULES)
    return math.sqrt(sum(float(product.square().sum()) for product in products))


def padded_mean(updates: Sequence[Update], name: str, *, slices: bool) -> Tensor:
    """Return `Σ p_k` of padded factors, `p_k = S_k/ΣS`; with slices over those that hold each."""
    axis = 0 if "lora_A" in name else 1
    total, held = 0.0, torch.zeros(8).double()
    for update in updates:
        factor, norm = update.tensors[name], dense_norm(update)
        full = torch.zeros((8, factor.shape[1]) if axis == 0 else (factor.shape[0], 8)).double()
        full.narrow(axis, 0, factor.shape[axis]).copy_(factor)
        total = total + norm * full
        held[: factor.shape[axis]] += norm
    if not slices:
        held[:] = sum(dense_norm(update) for update in updates)
    return total / (held[:, None] if axis == 0 else held)


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("rule", SCALES)
def test_hetlora_averages_padded_factors_by_norms(rule: Scale, slices: bool) -> None:
    strategy = build("hetlora", rank=8, scale=rule, ranks=RANKS, slices=slices)
    state = strategy.start(common_start(8))
    for number, who in enumerate([FULL, (1, 2), (2,), (0, 1, 2), FULL]):
        clients = cohort(*who, ranks=RANKS, scale=rule)
        updates = updates_of(strategy, state, clients, drift(number))
        outcome = strategy.merge(state, updates, None)
        norms = [dense_norm(update) for update in updates]
        weights = outcome.diagnostics["weights"]
        assert list(weights) == [str(k) for k in who]
        assert list(weights.values()) == pytest.approx([norm / sum(norms) for norm in norms])
        state = outcome.state
        for name in filter(is_factor, state):
            expected = padded_mean(updates, name, slices=slices)
            torch.testing.assert_close(state[name].double(), expected, rtol=0, atol=1e-6)
        heads_by_examples = {n: factor_mean(updates, n) for n in heads(state)}
        assert_close(heads(state), heads_by_examples)


def test_hetlora_sends_raw_prefixes() -> None:
    """As published: at alpha/r every rank reads the same factors at a scale of its own."""
    strategy = build("hetlora", rank=8, ranks=RANKS)
    state = play(strategy, [cohort(*FULL, ranks=RANKS)], state=strategy.start(common_start(8)))
    for who in cohort(0, 1, 2, ranks=RANKS):
        sent = strategy.send(state, who)
        for module in MODULES:
            name_B, name_A = factor_names(module)
            assert torch.equal(sent[name_B], state[name_B][:, : who.rank])
            assert torch.equal(sent[name_A], state[name_A][: who.rank])


def test_a_norm_is_that_of_the_product_over_all_layers() -> None:
    update = updates_of(build("hetlora"), common_start(), cohort(0), drift(0))[0]
    terms = [Term.of(update.tensors, module) for module in MODULES]
    assert delta_norm(terms) == pytest.approx(dense_norm(update), rel=1e-6)
    assert delta_norm([Term(torch.zeros(5, 2), torch.ones(2, 4))]) == 0


def test_hetlora_counts_by_examples_while_nobody_has_a_delta() -> None:
    """A moves, B is still zero: all norms are, and weights by norms would be 0/0."""
    strategy = build("hetlora")
    state = strategy.start(common_start())

    def only_a(who: Client, sent: Tensors) -> Tensors:
        return {n: t for n, t in drift(0)(who, sent).items() if "lora_B" not in n}

    updates = updates_of(strategy, state, cohort(*FULL), only_a)
    outcome = strategy.merge(state, updates, None)
    assert outcome.diagnostics["weights"] is None
    expected = {name: factor_mean(updates, name) for name in model_of(outcome.state)}
    assert_close(model_of(outcome.state), expected)


def test_zero_padding_dilutes_what_few_clients_hold_and_slices_do_not() -> None:
    """Idle clients of unequal ranks: the published rule shrinks the global delta all the same."""
    whole = drift(3)(client(0, 8), common_start(8))

    def kept(*, slices: bool) -> float:
        strategy = build("hetlora", rank=8, ranks=RANKS, slices=slices)
        everyone = cohort(0, 1, 2, ranks=RANKS)
        after = play(strategy, [everyone] * 3, train=lambda _: idle, state=strategy.start(whole))
        return far(served(strategy, after), served(strategy, whole))

    assert kept(slices=True) < 1e-6
    assert kept(slices=False) > 0.3


def test_directions_that_none_of_the_cohort_holds_stay() -> None:
    strategy = build("hetlora", rank=8, ranks=RANKS)
    state = play(strategy, [cohort(2, ranks=RANKS)], state=strategy.start(common_start(8)))
    after = play(strategy, [cohort(0, 1, ranks=RANKS)] * 2, state=state)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        assert torch.equal(after[name_B][:, 4:], state[name_B][:, 4:])
        assert torch.equal(after[name_A][4:], state[name_A][4:])
        assert float((after[name_B][:, :4] - state[name_B][:, :4]).norm()) > 0.1
        assert float(state[name_B][:, 4:].norm()) > 0.1


def shrinking(*clients: int) -> Train:
    """Train nothing but the tail of these clients, which shrinks; the tails of others grow."""

    def train(who: Client, sent: Tensors) -> Tensors:
        factor = 0.5 if who.client in clients else 2.0
        return {
            n: torch.cat([t[:-1], factor * t[-1:]]) if "lora_A" in n else t.clone()
            for n, t in sent.items()
        }

    return train


@pytest.mark.parametrize("slices", [False, True])
def test_a_client_that_pruned_is_sent_only_what_it_kept(slices: bool) -> None:
    strategy = build("hetlora", tail_share=0.75, slices=slices)
    state = play(strategy, [cohort(*FULL)])
    assert not any("rank." in name for name in state)  # B was zero: there was no tail to shrink
    updates = updates_of(strategy, state, cohort(*FULL), shrinking(1, 2))
    assert [Term.of(u.tensors, "enc.0.query").rank for u in updates] == [4, 3, 3, 4]
    after = merged(strategy, state, updates)
    assert {n: int(t) for n, t in after.items() if "/" in n} == {
        "server/rank.1": 3,
        "server/rank.2": 3,
    }
    for who, rank in zip(cohort(*FULL), (4, 3, 3, 4), strict=True):
        sent = strategy.send(after, who)
        for module in MODULES:
            name_B, name_A = factor_names(module)
            assert torch.equal(sent[name_B], after[name_B][:, :rank])
            assert torch.equal(sent[name_A], after[name_A][:rank])
    # By hand: the last row of A was doubled by clients 0 and 3; the others count it as zero.
    norms = [dense_norm(update) for update in updates]
    holders = norms[0] + norms[3]
    last = 2 * holders / (holders if slices else sum(norms))
    for module in MODULES:
        _, name_A = factor_names(module)
        torch.testing.assert_close(after[name_A][3], last * state[name_A][3], rtol=1e-5, atol=1e-6)
    # It holds in later rounds, for absent clients too, and may be pruned further: floor(.75·3).
    later = play(strategy, [cohort(0, 2)], train=lambda _: shrinking(2), state=after)
    assert {n: int(t) for n, t in later.items() if "/" in n} == {
        "server/rank.1": 3,
        "server/rank.2": 2,
    }
    assert Term.of(strategy.send(later, client(2)), "enc.1.query").rank == 2


def test_a_direction_that_everybody_has_pruned_is_gone() -> None:
    """Nobody would ever train it again: left as it was it would be served for good."""
    strategy = build("hetlora", tail_share=0.75)
    state = play(strategy, [cohort(*FULL)])
    some = play(strategy, [cohort(0, 1)], train=lambda _: shrinking(0, 1), state=state)
    everybody = play(strategy, [cohort(2, 3)], train=lambda _: shrinking(2, 3), state=some)
    for module in MODULES:
        name_B, name_A = factor_names(module)
        assert torch.equal(some[name_A][3], state[name_A][3])  # clients 2 and 3 still hold it
        assert torch.equal(some[name_B][:, 3], state[name_B][:, 3])
        assert not everybody[name_A][3].any()
        assert not everybody[name_B][:, 3].any()


def test_clients_are_told_how_to_treat_their_tails() -> None:
    rules = build("hetlora", tail_share=0.9, tail_penalty=0.2).rules
    assert (rules.tail_share, rules.tail_penalty) == (0.9, 0.2)
    defaults = STRATEGIES["hetlora"].options()
    assert defaults.model_dump() == {"slices": False, "tail_share": 0.99, "tail_penalty": 0.01}


# --- fedask ---------------------------------------------------------------------------------------


def exact_means(
    strategy: Strategy, state: Tensors, updates: Sequence[Update], train: Train
) -> Tensors:
    """Return `Σ w_k ΔW_k` of what clients trained, which the server never sees."""
    ends = [replace(u, tensors=model_after(strategy, state, u, train)) for u in updates]
    return mean_deltas(ends)


@pytest.mark.parametrize("rule", SCALES)
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_fedask_is_the_best_rank_r_where_the_sketch_holds_all(
    rule: Scale, ranks: tuple[int, ...]
) -> None:
    """q = K·r, above the rows of every module, so that the basis is padded too."""
    rank = max(ranks)
    strategy = build("fedask", rank=rank, scale=rule, ranks=ranks, sketch=4 * rank)
    state = strategy.start(common_start(rank))
    for number, who in enumerate(PARTIAL):
        clients, train = cohort(*who, ranks=ranks, scale=rule), drift(number)
        updates = updates_of(strategy, state, clients, train, number=number)
        exact = exact_means(strategy, state, updates, train)
        state = merged(strategy, state, updates)
        expected = {module: truncated(delta, rank) for module, delta in exact.items()}
        assert_close(served(strategy, state, rule), expected, 2e-6)
        assert_close(heads(state), {n: factor_mean(updates, n) for n in heads(state)})


def of_rank_one(seed: int) -> Train:
    """Clients whose deltas have one direction each, so that the mean of four has rank 4."""

    def train(who: Client, sent: Tensors) -> Tensors:
        moved = drift(seed)(who, sent)
        return {n: t * (torch.arange(4) < 1) if "lora_B" in n else t for n, t in moved.items()}

    return train


def test_fedask_is_exact_if_and_only_if_the_sketch_is_as_wide_as_the_rank() -> None:
    errors = {}
    for width in (1, 2, 3, 4, 5, 8):
        strategy = build("fedask", sketch=width)
        state = strategy.start(common_start())
        updates = updates_of(strategy, state, cohort(*FULL), of_rank_one(0))
        exact = exact_means(strategy, state, updates, of_rank_one(0))
        errors[width] = far(served(strategy, merged(strategy, state, updates)), exact)
    assert all(errors[width] < 1e-5 for width in (4, 5, 8)), errors
    assert all(errors[width] > 0.1 for width in (1, 2, 3)), errors


def test_the_papers_width_loses_most_of_independent_clients() -> None:
    """ΔW* has rank 9 to 12 here and the sketch 4: far behind the best rank 4."""
    strategy = build("fedask")
    assert strategy.rules.sketch == 4
    state = play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5), number=1)
    exact = exact_means(strategy, state, updates, drift(5))
    found = far(served(strategy, merged(strategy, state, updates)), exact)
    best = far({module: truncated(delta, 4) for module, delta in exact.items()}, exact)
    assert found > 1.3 * best
    assert found > 0.4


def test_fedask_needs_only_sums() -> None:
    """Masks that cancel in the weighted sum hide every client, and change nothing."""
    strategy = build("fedask")
    state = play(strategy, [cohort(*FULL)])
    first = updates_of(strategy, state, cohort(*FULL), drift(5), number=1)
    draw = torch.Generator().manual_seed(0)

    def masked(updates: Sequence[Update]) -> list[Update]:
        *others, last = updates
        left = {
            n: torch.zeros_like(t)
            for n, t in last.tensors.items()
            if part_of(n) in ("sketch", "projection")
        }
        hidden = []
        for update in others:
            mask = {n: torch.randn(t.shape, generator=draw) for n, t in left.items()}
            left = {n: t - update.num_examples * mask[n] for n, t in left.items()}
            tensors = {n: t + mask[n] if n in mask else t for n, t in update.tensors.items()}
            # Nor is any factor looked at.
            hidden.append(
                replace(update, tensors={n: t for n, t in tensors.items() if not is_factor(n)})
            )
        tensors = {
            n: t + left[n] / last.num_examples if n in left else t for n, t in last.tensors.items()
        }
        return [*hidden, replace(last, tensors=tensors)]

    assert strategy.follow_up is not None
    bases, again = (strategy.follow_up.ask(state, updates) for updates in (first, masked(first)))
    for (
        name,
        Q,
    ) in bases.items():  # the same space; its basis is as good as the sketch is far from flat
        assert_close({name: again[name] @ again[name].T}, {name: Q @ Q.T}, 1e-4)
    found, expected = (merged(strategy, state, updates) for updates in (masked(first), first))
    assert_same_models(strategy.serve(found), strategy.serve(expected), 1e-5)
    assert far(served(strategy, expected), served(strategy, state)) > 0.1


def test_fedask_does_not_depend_on_the_factors_of_a_delta() -> None:
    strategy = build("fedask")
    state = play(strategy, [cohort(*FULL)])
    Q = some_rotation(4, 0) + 0.3 * torch.ones(4, 4, dtype=torch.float64)

    def turned(who: Client, sent: Tensors) -> Tensors:
        return in_another_gauge(drift(5)(who, sent), Q)

    found, expected = (
        play(strategy, [cohort(*FULL)], train=lambda _, train=train: train, state=state, first=1)
        for train in (turned, drift(5))
    )
    assert_same_models(strategy.serve(found), strategy.serve(expected), 1e-5)


def test_a_client_lost_between_the_exchanges_leaves_the_projection_of_the_others() -> None:
    """The basis is that of all who were asked: one made anew of those who answered is another."""
    strategy = build("fedask", sketch=3)
    state = play(strategy, [cohort(*FULL)])
    updates = updates_of(strategy, state, cohort(*FULL), drift(5), number=1)
    answered = [updates[0], updates[3]]
    exact = exact_means(strategy, state, answered, drift(5))
    expected = {}
    for module, delta in exact.items():
        Q = updates[0].tensors[basis_name(module)].double()
        expected[module] = Q @ Q.T @ delta
    assert_close(served(strategy, merged(strategy, state, answered)), expected)


@pytest.mark.parametrize("width", [6, 11])
def test_every_round_is_sketched_anew_and_the_basis_is_orthonormal(width: int) -> None:
    """Where a module has fewer rows than the sketch has columns, zeros make up the shape."""
    strategy = build("fedask", sketch=width)
    state = strategy.start(common_start())
    first, second = (
        updates_of(strategy, state, cohort(*FULL), drift(0), number=number) for number in (0, 1)
    )
    for module, (m, n) in MODULES.items():
        Q = first[0].tensors[basis_name(module)]
        assert Q.shape == (m, width)
        assert first[0].tensors[projection_name(module)].shape == (n, width)
        unit = torch.diag((torch.arange(width) < m).float())
        torch.testing.assert_close(Q.T @ Q, unit, rtol=0, atol=1e-6)
        assert not torch.allclose(Q, second[0].tensors[basis_name(module)], atol=1e-2)


def test_fedask_keeps_a_as_drawn_while_nothing_is_learned() -> None:
    state = play(build("fedask"), [cohort(*FULL)] * 2, train=lambda _: idle)
    assert_close(model_of(state), common_start(), tolerance=0)


def test_fedask_forgets_a_delta_that_all_clients_have_undone() -> None:
    def undo(_: Client, sent: Tensors) -> Tensors:
        return {n: torch.zeros_like(t) if "lora_B" in n else t.clone() for n, t in sent.items()}

    strategy = build("fedask")
    state = play(strategy, [cohort(*FULL)])
    after = play(strategy, [cohort(*FULL)], train=lambda _: undo, state=state, first=1)
    for module in MODULES:
        term = Term.of(after, module)
        assert not term.B.any()
        assert torch.equal(term.A, Term.of(state, module).A)


def test_fedask_serves_balanced_factors_with_spare_directions_alive() -> None:
    strategy = build("fedask", sketch=6)
    state = play(strategy, [cohort(1)], train=lambda _: of_rank_one(0))
    assert digest(state) == digest(play(strategy, [cohort(1)], train=lambda _: of_rank_one(0)))
    for module in MODULES:
        term = Term.of(state, module)
        assert float(term.B[:, 0].norm()) == pytest.approx(float(term.A[0].norm()), rel=1e-5)
        assert not term.B[:, 1:].any()
        assert bool((term.A[1:].abs().amax(dim=1) > 0.05).all())


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("fedrot-lora", "strength", 1.1),
        ("fedrot-lora", "strength", -0.1),
        ("lora-fair", "regularisation", -0.01),
        ("hetlora", "tail_share", 0.0),
        ("hetlora", "tail_share", 1.01),
        ("hetlora", "tail_penalty", -1.0),
        ("fedask", "sketch", -1),
        ("rolora", "strength", 0.5),
        ("fedsvd", "sketch", 4),
    ],
)
def test_impossible_options_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ValidationError, match=option):
        build(name, **{option: value})
