"""Nemesis: norm terms, their schedule, and PAN's choice of positions.

Numbers are the oracles of the Nemesis specification, section 7, unless a comment says otherwise.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.nemesis import (
    NORMS,
    SCHEDULES,
    choose_positions,
    constant_weight,
    improving_positions,
    nemesis_term,
    norm_term,
    position_probability,
    position_weights,
    probe_positions,
    round_weight,
    schedule_weight,
    uniform_weights,
    vector_norms,
)

NAME = "prompt.text"
ROWS = [[3.0, 4.0, 0.0], [0.0, -5.0, 12.0]]
SECOND = torch.tensor([0.0, 1.0])


def prompt(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(ROWS, dtype=dtype, requires_grad=True)


def term(P: Tensor, weights: Tensor, norm: str = "two") -> Tensor:
    return norm_term({NAME: P}, {NAME: weights}, norm)


def pun(P: Tensor, strength: float = 1.0, norm: str = "two") -> Tensor:
    return norm_term({NAME: P}, uniform_weights({NAME: P}, strength), norm)


def blended(P: Tensor, blend: float, chosen: Tensor) -> Tensor:
    return nemesis_term({NAME: P}, 1.0, blend, lambda: {NAME: chosen})


def gradient(of: Tensor, by: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(of, by)
    return found


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed), dtype=torch.float64)


def close(found: Tensor, expected: object, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    wanted = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


# The term, oracles 1 to 8.


@pytest.mark.parametrize(
    ("norm", "norms", "value", "slope"),
    [
        ("two", [5, 13], 9, [[0.3, 0.4, 0], [0, -0.1923077, 0.4615385]]),
        ("one", [7, 17], 12, [[0.5, 0.5, 0], [0, -0.5, 0.5]]),
        ("inf", [4, 12], 8, [[0, 0.5, 0], [0, 0, 0.5]]),
    ],
)
def test_uniform_term_and_its_gradient(
    norm: str, norms: list[float], value: float, slope: list[list[float]]
) -> None:
    P = prompt()
    close(vector_norms(P, norm), norms)
    close(pun(P, norm=norm), value)
    close(pun(P, 10.0, norm), 10 * value)
    close(gradient(pun(P, norm=norm), P), slope)


def test_equal_largest_entries_share_the_gradient_of_the_largest_norm() -> None:
    P = torch.tensor([[2.0, -2.0, 1.0]], requires_grad=True)
    close(gradient(pun(P, norm="inf"), P), [[0.5, -0.5, 0]])


def test_chosen_positions_are_divided_by_how_many_they_are() -> None:
    P = prompt()
    close(term(P, SECOND), 13.0)
    found = gradient(term(P, SECOND), P)
    assert torch.equal(found[0], torch.zeros(3))
    close(found[1], [0, -0.3846154, 0.9230769])


@pytest.mark.parametrize("norm", NORMS)
def test_no_chosen_position_costs_nothing_and_pulls_nowhere(norm: str) -> None:
    P = prompt()
    value = term(P, torch.zeros(2), norm)
    assert value == 0
    assert torch.equal(gradient(value, P), torch.zeros(2, 3))


def test_unequal_weights_are_divided_by_their_number_not_their_sum() -> None:
    close(term(prompt(), torch.tensor([0.5, 2.0])), (0.5 * 5 + 2 * 13) / 2)


def test_blend_of_both_terms() -> None:
    P = prompt()
    close(blended(P, 0.25, SECOND), 12.0)
    close(gradient(blended(P, 0.25, SECOND), P), [[0.075, 0.1, 0], [0, -0.3365385, 0.8076923]])
    close(blended(P, 0.0, SECOND), 13.0)


def test_axes_in_front_of_the_positions_are_averaged_over() -> None:
    P = torch.tensor(ROWS)
    close(pun(torch.stack([P, 2 * P])), 13.5)  # the public code's sum is 27
    close(pun(torch.stack([P, 2 * P]).unsqueeze(1)), 13.5)
    close(term(torch.stack([P, 2 * P]), SECOND), 1.5 * 13)
    # As many classes or layers as you like: the same strength means the same term.
    close(pun(P.expand(7, 2, 3)), pun(P))


def test_terms_of_several_prompts_add_up() -> None:
    text, image = torch.tensor(ROWS), torch.ones(4, 3, 4)
    prompts = {NAME: text, "prompt.image": image}
    close(norm_term(prompts, uniform_weights(prompts, 1.0)), 9.0 + 2.0)


def test_a_step_shortens_each_vector_by_rate_times_strength_over_positions() -> None:
    P = prompt()
    optimiser = torch.optim.SGD([P], lr=0.1)
    pun(P).backward()
    optimiser.step()
    close(vector_norms(P.detach()), [4.95, 12.95])
    close(functional.cosine_similarity(P.detach(), torch.tensor(ROWS)), [1.0, 1.0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_gradient_agrees_with_finite_differences(norm: str, shape: tuple[int, ...]) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.3, 0.0])
    P = random_prompt(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(x, weights, norm), P)
    assert torch.autograd.gradcheck(
        lambda x: nemesis_term({NAME: x}, 3.0, 0.25, lambda: {NAME: weights}, norm), P
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(NORMS)), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_term_scales_with_the_prompt_and_its_gradient_does_not(
    norm: str, factor: float, seed: int
) -> None:
    P = random_prompt(4, 3, seed=seed).requires_grad_()
    larger = (factor * P.detach()).requires_grad_()
    close(pun(larger, norm=norm), factor * pun(P, norm=norm).item(), rtol=1e-12)
    close(gradient(pun(larger, norm=norm), larger), gradient(pun(P, norm=norm), P), rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99))
def test_euclidean_term_does_not_feel_a_rotation(seed: int) -> None:
    P = random_prompt(4, 6, seed=seed)
    turn, _ = torch.linalg.qr(random_prompt(6, 6, seed=seed + 1))
    close(pun(P @ turn), pun(P), rtol=1e-12)
    assert abs(pun(P @ turn, norm="one") - pun(P, norm="one")) > 1e-6


# Zero norm.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weights", [torch.ones(2), SECOND])
def test_a_zero_vector_has_no_gradient(norm: str, weights: Tensor) -> None:
    P = torch.tensor([[0.0, 0.0, 0.0], ROWS[1]], requires_grad=True)
    found = gradient(term(P, weights, norm), P)
    assert torch.equal(found[0], torch.zeros(3))
    assert found.isfinite().all()
    assert found[1].any()


def test_root_of_the_sum_of_squares_is_no_substitute() -> None:
    P = torch.tensor([[0.0, 0.0, 0.0], ROWS[1]], requires_grad=True)
    found = gradient((SECOND * P.square().sum(-1).sqrt()).sum(), P)
    assert found[0].isnan().all()  # even though its weight is 0


# What is refused.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prompt_that_diverged_is_refused_by_name(bad: float) -> None:
    P = torch.tensor([[bad, 0.0], [1.0, 0.0]])
    with pytest.raises(FloatingPointError, match=r"^1 vectors of prompt\.text hold NaN"):
        term(P, SECOND)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"prompt\.text have shape \(3,\).*\(2, 3\)"),
        (torch.ones(1), r"shape \(1,\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (torch.tensor([1.0, -1.0]), r"0 or more: \[1\.0, -1\.0\]"),
        (torch.tensor([1.0, math.nan]), "0 or more"),
        (torch.tensor([1.0, math.inf]), "0 or more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(torch.tensor(ROWS), weights)


def test_unknown_norm_blend_and_absent_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="norm = 'three' is not known; choose one of one, two"):
        pun(torch.tensor(ROWS), norm="three")
    with pytest.raises(ValueError, match=r"blend = 1\.5"):
        blended(torch.tensor(ROWS), 1.5, SECOND)
    with pytest.raises(ValueError, match="no prompt"):
        norm_term({}, {})


# Precision.


@pytest.mark.parametrize(
    ("width", "entry", "expected", "naive"),
    [(4, 300.0, 600.0, math.inf), (512, 20.0, 452.5, math.inf), (512, 1e-5, 2.263e-4, 0.0)],
)
def test_half_precision_neither_overflows_nor_underflows(
    width: int, entry: float, expected: float, naive: float
) -> None:
    P = torch.full((1, width), entry, dtype=torch.float16)
    assert P.square().sum(-1).sqrt().item() == naive
    found = vector_norms(P)
    assert found.dtype == torch.float32
    # 1e-5 is not a float16; its neighbour is 1e-5 within 0.2%.
    assert found.item() == pytest.approx(expected, rel=2e-3)
    assert found.item() == pytest.approx(P.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_norms_and_term_are_computed_in_float32_or_better(
    dtype: torch.dtype, computed: torch.dtype
) -> None:
    P = prompt(dtype)
    value = pun(P)
    assert vector_norms(P).dtype == value.dtype == computed
    close(value, 9.0)
    assert gradient(value, P).dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "rate", "momentum", "expected"),
    [
        (torch.float32, 0.002, 0.0, 0.44232),
        (torch.float16, 0.002, 0.0, 0.45169),
        (torch.bfloat16, 0.002, 0.0, 0.45481),
        (torch.float32, 0.0002, 0.9, 0.44344),
        (torch.float16, 0.0002, 0.9, 0.45223),
    ],
)
def test_updates_are_lost_without_a_word_unless_the_prompt_is_in_float32(
    dtype: torch.dtype, rate: float, momentum: float, expected: float
) -> None:
    P = 0.02 * torch.randn((16, 512), generator=stream(1))
    assert vector_norms(P).mean().item() == pytest.approx(0.45482, abs=1e-5)
    P = P.to(dtype).requires_grad_()
    optimiser = torch.optim.SGD([P], lr=rate, momentum=momentum)
    for _ in range(100):
        optimiser.zero_grad()
        pun(P).backward()
        optimiser.step()
    assert vector_norms(P.detach()).mean().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_term(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_norm, cast = torch.linalg.vector_norm, list[bool]()

    def watched_norm(*args: Any, **options: Any) -> Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return plain_norm(*args, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", watched_norm)
    P = random_prompt(3, 16, 512).float().requires_grad_()
    weights = torch.rand(16, generator=stream())

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        value = nemesis_term({NAME: P}, 2.0, 0.25, lambda: {NAME: weights})
        return value, gradient(value, P)

    plain = value_and_gradient()
    with torch.autocast("cpu", dtype=dtype):
        mixed = value_and_gradient()
        assert (P[0] @ P[0].T).dtype == dtype
    # Which operations autocast casts differs by device and version, so none must run under it.
    assert cast == [False] * 4
    assert mixed[0].dtype == torch.float32
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


def test_a_step_that_overflows_leaves_the_prompt_as_it_was() -> None:
    P = prompt()
    before = P.detach().clone()
    optimiser = torch.optim.SGD([P], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(features: Tensor) -> Tensor:
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = features @ P.T
            loss = functional.cross_entropy(logits.float(), torch.tensor([0])) + pun(P)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        return loss.detach()

    assert not step(torch.full((1, 3), 6e4)).isfinite()
    assert torch.equal(P, before)
    assert scaler.get_scale() == 512.0
    assert step(torch.ones(1, 3)).isfinite()
    assert not torch.equal(P, before)


def test_norms_at_the_start() -> None:
    P = 0.02 * torch.randn((4000, 512), generator=stream())
    norms = vector_norms(P)
    assert norms.mean().item() == pytest.approx(0.4523, abs=1e-3)
    assert norms.std().item() == pytest.approx(0.014, abs=1e-3)
    # Of all 16 vectors together: four times as much, not to be taken for the norm of one.
    frobenius = vector_norms(P.view(250, 16 * 512))
    assert frobenius.mean().item() == pytest.approx(1.81, abs=0.01)


# The schedule, oracle 9.


@pytest.mark.parametrize(
    ("at", "of", "expected"),
    [(0, 50, 0.993307), (25, 50, 0.5), (49, 50, 0.008163), (0, 100, 0.999955), (25, 100, 0.993307)],
)
def test_schedule_of_the_paper(at: int, of: int, expected: float) -> None:
    assert schedule_weight(at, of, 0.2) == pytest.approx(expected, abs=5e-7)


def test_schedule_by_round_spans_the_same_for_any_number_of_rounds() -> None:
    assert [round_weight(t, 50) for t in range(50)] == [
        schedule_weight(t, 50, 0.2) for t in range(50)
    ]
    for rounds in (2, 10, 1000):
        assert round_weight(0, rounds) == pytest.approx(0.993307, abs=5e-7)
        assert round_weight(rounds // 2, rounds) == 0.5
    # The paper's steepness would span next to nothing of ten rounds.
    assert schedule_weight(0, 10, 0.2) == pytest.approx(0.7311, abs=1e-4)
    assert schedule_weight(9, 10, 0.2) == pytest.approx(0.3100, abs=1e-4)


def test_constant_schedule_is_one_throughout() -> None:
    assert {constant_weight(t, 50) for t in range(50)} == {1.0}
    assert {"logistic": round_weight, "constant": constant_weight} == SCHEDULES


def test_schedule_far_from_the_middle_does_not_overflow() -> None:
    assert schedule_weight(0, 100_000, 0.2) == 1.0
    assert 0 <= schedule_weight(99_999, 100_000, 0.2) < 1e-300


@pytest.mark.parametrize("at", [-1, 10])
def test_a_round_that_does_not_exist_has_no_weight(at: int) -> None:
    with pytest.raises(ValueError, match=rf"{at} is not among 0\.\.9"):
        round_weight(at, 10)


# PAN's choice, oracles 10 to 12.

CONTEXT = torch.tensor([[1.5, 0.0], [0.2, 0.0]])
IMAGES = torch.tensor([[1.0, 0.2], [0.2, 1.0], [0.1, 1.0]])
LABELS = torch.tensor([0, 1, 1])


def toy_hits(
    images: Tensor = IMAGES, labels: Tensor = LABELS, calls: list[Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """Class k's text is its unit vector and the context of the other position."""

    def hits_of(prompts: Tensor) -> Tensor:
        if calls is not None:
            calls.append(prompts.clone())
        texts = torch.eye(2) + prompts.flip(-2)
        return ((images @ texts.mT).argmax(-1) == labels).sum(-1)

    return hits_of


ORIGINAL = toy_hits()(CONTEXT[None])[0]


@pytest.mark.parametrize(
    ("factor", "chosen"), [(0.5, [True, False]), (0.1, [True, False]), (2.0, [False, False])]
)
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_adaptive_term_end_to_end(factor: float, chosen: list[bool], at_once: int) -> None:
    halved = torch.stack([CONTEXT * torch.tensor(w)[:, None] for w in ([0.5, 1.0], [1.0, 0.5])])
    assert int(ORIGINAL) == 2
    assert toy_hits()(halved).tolist() == [3, 2]
    probed = probe_positions(2, 2, stream())
    found = choose_positions(CONTEXT, probed, factor, ORIGINAL, toy_hits(), at_once)
    assert found.tolist() == chosen
    close(term(CONTEXT, 1.0 * found), 1.5 if any(chosen) else 0.0)
    close(pun(CONTEXT), 0.85)


def test_positions_that_were_not_probed_are_not_chosen() -> None:
    probed = torch.tensor([1])
    found = choose_positions(CONTEXT, probed, 0.5, ORIGINAL, toy_hits(), 1)
    assert found.tolist() == [False, False]


def test_a_tie_is_no_improvement() -> None:
    assert improving_positions(torch.tensor([1, 2, 3]), 2).tolist() == [False, False, True]


def test_probing_leaves_prompt_gradient_and_random_streams_alone() -> None:
    P = CONTEXT.clone().requires_grad_()
    P.grad = torch.ones(2, 2)
    generator, twin = stream(5), stream(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen: list[bool] = []

    def hits_of(prompts: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled() or prompts.requires_grad)
        return toy_hits()(prompts)

    choose_positions(P, probe_positions(2, 2, generator), 0.5, ORIGINAL, hits_of, 1)
    assert seen == [False, False]
    assert torch.equal(P.view(torch.int32), CONTEXT.view(torch.int32))
    assert torch.equal(P.grad, torch.ones(2, 2))
    assert P.requires_grad
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.randperm(2, generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_probing_all_positions_probes_each_once_and_one_at_a_time() -> None:
    P = random_prompt(7, 3).float()
    calls: list[Tensor] = []

    def hits_of(prompts: Tensor) -> Tensor:
        calls.append(prompts.clone())
        return torch.zeros(len(prompts))

    choose_positions(P, probe_positions(7, 7, stream()), 0.5, 0, hits_of, at_once=3)
    assert [len(call) for call in calls] == [3, 3, 1]
    changed = (torch.cat(calls) != P).any(-1)
    assert changed.sum(0).tolist() == [1] * 7
    assert changed.sum(1).tolist() == [1] * 7
    for copy, at in zip(torch.cat(calls), changed.int().argmax(1), strict=True):
        assert torch.equal(copy[at], 0.5 * P[at])


def test_several_prompts_are_probed_at_one_position_together() -> None:
    P = random_prompt(4, 3, 2).float()  # PLOT: four prompts of three positions
    calls: list[Tensor] = []

    def hits_of(prompts: Tensor) -> Tensor:
        calls.append(prompts.clone())
        return torch.tensor([5, 1])

    found = choose_positions(P, torch.tensor([2, 0]), 0.5, 3, hits_of, at_once=2)
    assert found.tolist() == [False, False, True]
    (copies,) = calls
    assert torch.equal(copies[0, :, 2], 0.5 * P[:, 2])
    assert torch.equal(copies[0, :, :2], P[:, :2])
    assert torch.equal(copies[1, :, 0], 0.5 * P[:, 0])


def test_a_batch_of_one_row_works() -> None:
    hits_of = toy_hits(IMAGES[:1], LABELS[:1])
    original = hits_of(CONTEXT[None])[0]
    assert int(original) == 0
    found = choose_positions(CONTEXT, torch.tensor([1, 0]), 0.5, original, hits_of, 2)
    assert found.tolist() == [True, False]


def test_hits_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 copies gave hits of shape \(2, 3\)"):
        choose_positions(
            CONTEXT, torch.tensor([0, 1]), 0.5, 2, lambda _: torch.ones(2, 3), at_once=2
        )


@pytest.mark.parametrize("probed", [0, 17])
def test_more_positions_than_there_are_cannot_be_probed(probed: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{probed} positions .* 1 to 16$"):
        probe_positions(16, probed, stream())


def test_probed_positions_are_distinct_and_uniform() -> None:
    generator = stream()
    draws = [probe_positions(8, 3, generator).tolist() for _ in range(4000)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = np.bincount([i for draw in draws for i in draw], minlength=8)
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("blend", "probes"), [(1.0, 0), (0.5, 2), (0.0, 2)])
def test_nothing_is_probed_where_only_the_uniform_term_counts(blend: float, probes: int) -> None:
    calls: list[Tensor] = []

    def adaptive() -> Mapping[str, Tensor]:
        probed = probe_positions(2, 2, stream())
        hits_of = toy_hits(calls=calls)
        return {NAME: 1.0 * choose_positions(CONTEXT, probed, 0.5, ORIGINAL, hits_of, 1)}

    value = nemesis_term({NAME: CONTEXT}, 1.0, blend, adaptive)
    close(value, blend * 0.85 + (1 - blend) * 1.5)
    assert len(calls) == probes


# Federated PAN.


def test_probability_that_a_position_does_better_when_lowered() -> None:
    found = position_probability(torch.tensor([0, 0, 3, 4]), torch.tensor([0, 4, 4, 4]))
    close(found, [1 / 2, 1 / 6, 4 / 6, 5 / 6])
    close(position_weights(6.0, found), [3, 1, 4, 5])


def test_probability_adds_up_the_same_from_one_client_or_many() -> None:
    hits, trials = torch.tensor([[1, 0], [2, 1]]), torch.tensor([[2, 2], [3, 1]])
    close(position_probability(hits.sum(0), trials.sum(0)), [4 / 7, 2 / 5])


@pytest.mark.parametrize(("hits", "trials"), [([2], [1]), ([-1], [1]), ([math.nan], [1])])
def test_impossible_counts_are_refused(hits: list[float], trials: list[float]) -> None:
    with pytest.raises(ValueError, match="do not fit trials"):
        position_probability(torch.tensor(hits), torch.tensor(trials))
