"""The three transfers: known answers, counts of what is trained, folding, starts, controls."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.control_prompts import CONTROLS, unrelated
from common.errors import ConfigError
from common.prompt_transfer import (
    BIAS,
    GAIN,
    KEY_BIAS,
    KEY_WEIGHT,
    PROJECTOR_STARTS,
    QUERIES,
    TARGET,
    VALUE_BIAS,
    VALUE_WEIGHT,
    WEIGHT,
    Attention,
    Frozen,
    Projection,
    Transfer,
    decay_groups,
    fold,
    vpt_bound,
    warmed_cosine,
)
from common.tensors import is_prompt, part_of

S = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()


def random_source(n: int = 100, d: int = 768) -> Tensor:
    return 3 * torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def identity_attention(queries: Tensor) -> dict[str, Tensor]:
    eye, zero = torch.eye(2).double(), torch.zeros(2).double()
    return {
        QUERIES: queries.double(),
        KEY_WEIGHT: eye,
        KEY_BIAS: zero,
        VALUE_WEIGHT: eye,
        VALUE_BIAS: zero,
    }


@pytest.mark.parametrize(
    ("scaled", "weights", "output"),
    [
        (False, [0.4223188, 0.1553624, 0.4223188], [0.8446376, 0.5776812]),
        (True, [0.4011121, 0.1977758, 0.4011121], [0.8022242, 0.5988879]),
    ],
)
def test_attention_by_hand(scaled: bool, weights: list[float], output: list[float]) -> None:
    transfer = Attention(S, 2, 0.1, length=1, concentrated=1, scaled=scaled, unit_rows=False)
    tensors = identity_attention(torch.tensor([[1.0, 0.0]]))
    assert transfer.weights(tensors)[0].tolist() == pytest.approx(weights, abs=1e-6)
    assert transfer.prompt(tensors)[0].tolist() == pytest.approx(output, abs=1e-6)


def test_keys_that_say_nothing_give_the_mean_of_values() -> None:
    transfer = Attention(S, 2, 0.1, length=3, concentrated=3, unit_rows=False)
    tensors = identity_attention(torch.randn(3, 2)) | {KEY_WEIGHT: torch.zeros(2, 2).double()}
    torch.testing.assert_close(transfer.weights(tensors), torch.full((3, 3), 1 / 3).double())
    torch.testing.assert_close(transfer.prompt(tensors), S.mean(dim=0).expand(3, 2))


def test_normalised_rows_share_one_gain() -> None:
    transfer = Attention(7 * S, 2, 0.1, length=1, concentrated=1, scaled=False)
    unit = S / torch.tensor([[1.0], [1.0], [2**0.5]]).double()
    plain = Attention(1.5 * unit, 2, 0.1, length=1, concentrated=1, scaled=False, unit_rows=False)
    tensors = identity_attention(torch.tensor([[0.3, -1.0]]))
    found = transfer.prompt(tensors | {GAIN: torch.tensor([1.5]).double()})
    torch.testing.assert_close(found, plain.prompt(tensors))


def test_a_query_may_attend_to_its_best_sources_alone() -> None:
    transfer = Attention(S, 2, 0.1, length=1, concentrated=1, scaled=False, unit_rows=False, top=1)
    weights = transfer.weights(identity_attention(torch.tensor([[1.0, 0.5]])))
    assert weights.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("concentrated", range(10, 101, 10))
def test_attention_trains_the_same_number_whatever_is_concentrated(concentrated: int) -> None:
    transfer = Attention(
        random_source(), 768, 0.0625, concentrated=concentrated, scaled=False, unit_rows=False
    )
    state = transfer.start(0)
    assert {name: tensor.shape for name, tensor in state.items()} == transfer.shapes()
    assert sum(tensor.numel() for tensor in state.values()) == 1_257_984
    assert transfer.prompt(state).shape == (100, 768)
    assert (TARGET in state) == (concentrated < 100)
    torch.testing.assert_close(transfer.weights(state).sum(dim=1), torch.ones(concentrated))
    if concentrated < 100:
        assert torch.equal(transfer.prompt(state)[concentrated:], state[TARGET][0])
        assert float(state[TARGET].abs().max()) <= 0.0625


def test_what_is_published_starts_nearly_one_hot_and_the_repaired_does_not() -> None:
    source = 10 * random_source()
    start = Attention(source, 768, 0.0625).start(0)
    published = Attention(source, 768, 0.0625, scaled=False, unit_rows=False)
    highest = published.weights(start).amax(dim=1).mean()
    repaired = Attention(source, 768, 0.0625).weights(start).amax(dim=1).mean()
    assert highest > 0.9
    assert repaired < 0.02


def test_projection_counts_and_starts() -> None:
    source = random_source()
    for begin in PROJECTOR_STARTS:
        transfer = Projection(source, 768, begin)
        state = transfer.start(1)
        assert {name: tensor.shape for name, tensor in state.items()} == transfer.shapes()
        assert sum(tensor.numel() for tensor in state.values()) == 590_592
    identity = Projection(source, 768, "identity")
    assert torch.equal(fold(identity, identity.start(0)), source)
    before = torch.linalg.vector_norm(source, dim=1)
    rotated, drawn = (
        torch.linalg.vector_norm(fold(Projection(source, 768, begin), state), dim=1)
        for begin in ("orthogonal", "uniform")
        for state in [Projection(source, 768, begin).start(0)]
    )
    torch.testing.assert_close(rotated, before, rtol=1e-4, atol=1e-4)
    assert float((drawn / before).mean()) == pytest.approx(3**-0.5, abs=0.02)
    assert float(Projection(source, 768, "uniform").start(0)[WEIGHT].abs().max()) <= 768**-0.5


@pytest.mark.parametrize("width", [5, 40])
def test_widths_are_bridged(width: int) -> None:
    source = random_source(9, 12)
    for begin in PROJECTOR_STARTS:
        projection = Projection(source, width, begin)
        assert fold(projection, projection.start(0)).shape == (9, width)
    attention = Attention(source, width, 0.1, length=6, concentrated=4)
    assert fold(attention, attention.start(0)).shape == (6, width)
    with pytest.raises(ConfigError, match=f"width 12 and the target {width}.*projection"):
        Frozen(source, width)


def test_the_mean_of_projectors_is_the_projector_of_the_mean() -> None:
    stream = torch.Generator().manual_seed(4)
    source, shares = torch.randn(100, 64, generator=stream).double(), (0.5, 0.3, 0.2)
    transfer = Projection(source, 64)
    clients: list[dict[str, Tensor]] = [
        {
            name: torch.randn(shape, generator=stream).double()
            for name, shape in transfer.shapes().items()
        }
        for _ in shares
    ]
    of_prompts = sum(w * transfer.prompt(c) for w, c in zip(shares, clients, strict=True))
    mean = {
        name: sum(w * client[name] for w, client in zip(shares, clients, strict=True))
        for name in (WEIGHT, BIAS)
    }
    assert float((of_prompts - transfer.prompt(mean)).abs().max()) < 1e-12


TRANSFERS: dict[str, Transfer] = {
    "frozen": Frozen(random_source(8, 6), 6),
    "projection": Projection(random_source(8, 6), 6),
    "attention": Attention(random_source(8, 6), 6, 0.1, length=7, concentrated=4),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_only_what_is_trained_gets_a_gradient_and_folding_leaves_none(name: str) -> None:
    transfer = TRANSFERS[name]
    source = transfer.source.clone()
    trained = {n: nn.Parameter(t) for n, t in transfer.start(0).items()}
    prompt = transfer.prompt(trained)
    assert prompt.shape == (transfer.length, 6)
    if trained:
        prompt.square().sum().backward()
        assert all(p.grad is not None for p in trained.values())
        # A bias of all keys adds the same to all scores of a query: softmax does not see it.
        seen = {n: p for n, p in trained.items() if n != KEY_BIAS}
        assert all(p.grad.abs().max() > 1e-4 for p in seen.values())
    assert transfer.source.grad is None
    assert torch.equal(transfer.source, source)
    folded = fold(transfer, trained)
    assert not folded.requires_grad
    assert torch.equal(folded, prompt)


def test_starts_are_functions_of_the_seed() -> None:
    for transfer in TRANSFERS.values():
        one, again, other = (transfer.start(seed) for seed in (3, 3, 4))
        assert all(torch.equal(one[name], again[name]) for name in one)
        drawn = [n for n in one if n in (QUERIES, KEY_WEIGHT, VALUE_WEIGHT, TARGET)]
        assert not any(torch.equal(one[name], other[name]) for name in drawn)
    # Two maps of one shape are drawn apart.
    state = TRANSFERS["attention"].start(0)
    assert not torch.equal(state[KEY_WEIGHT], state[VALUE_WEIGHT])


def test_queries_and_own_vectors_are_a_part_by_themselves() -> None:
    names = {name for transfer in TRANSFERS.values() for name in transfer.shapes()}
    assert {part_of(name) for name in names} == {"prompt", "own"}
    assert {name for name in names if part_of(name) == "own"} == {QUERIES, TARGET}
    # None is a prompt by itself, whose norms a rule could keep.
    assert not any(is_prompt(name) for name in names)


@pytest.mark.parametrize(
    ("from_zero", "factors"),
    [
        (False, [0.1, 0.5, 1.0, 1.0, 0.5, 0.000305]),
        (True, [0.0, 0.4, 0.9, 1.0, 0.5, 0.000305]),
    ],
    ids=["transfer", "vpt"],
)
def test_learning_rates(from_zero: bool, factors: list[float]) -> None:
    found = [warmed_cosine(e, 100, from_zero=from_zero) for e in (0, 4, 9, 10, 55, 99)]
    assert found == pytest.approx(factors, abs=1e-6)
    with pytest.raises(ValueError, match="epoch 100 of 100"):
        warmed_cosine(100, 100)


def test_biases_are_not_decayed() -> None:
    trained = {n: nn.Parameter(t) for n, t in TRANSFERS["projection"].start(0).items()}
    [decayed, kept] = decay_groups(trained, 0.01)
    assert [p is trained[WEIGHT] for p in decayed["params"]] == [True]
    assert [p is trained[BIAS] for p in kept["params"]] == [True]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    groups: Any = decay_groups(trained, 0.01)
    torch.optim.AdamW(groups, lr=0.1).step()
    assert torch.equal(trained[BIAS], before[BIAS])
    torch.testing.assert_close(trained[WEIGHT].detach(), 0.999 * before[WEIGHT])


def test_bounds_of_starts() -> None:
    assert vpt_bound(16, 768) == 0.0625
    assert vpt_bound(16, 128) == pytest.approx(0.0818317, abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"concentrated": 0}, "0 concentrated"),
        ({"concentrated": 8}, "8 concentrated.*7 of the prompt"),
        ({"top": 9}, "top = 9 of 8"),
    ],
)
def test_attention_out_of_range_is_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(random_source(8, 6), 6, 0.1, **{"length": 7, "concentrated": 4} | settings)
    with pytest.raises(ConfigError, match=r"'zeros'.*identity, orthogonal, uniform"):
        Projection(S, 2, "zeros")


def test_controls_keep_norms_and_nothing_else() -> None:
    source = random_source(20, 64)
    norms = torch.linalg.vector_norm(source, dim=1)
    for name, control in CONTROLS.items():
        made = control(source, torch.Generator().manual_seed(5))
        assert made.shape == source.shape
        assert torch.equal(made, control(source, torch.Generator().manual_seed(5)))
        cosines = nn.functional.cosine_similarity(source, made, dim=1)
        assert abs(float(cosines.mean())) < 0.15, name
        if name not in ("unrelated", "untrained"):
            torch.testing.assert_close(torch.linalg.vector_norm(made, dim=1), norms)
    shuffled = CONTROLS["coordinates-shuffled"](source, torch.Generator().manual_seed(5))
    torch.testing.assert_close(shuffled @ shuffled.T, source @ source.T, rtol=1e-4, atol=1e-3)
    assert float(CONTROLS["untrained"](source, torch.Generator()).std()) == pytest.approx(
        0.02, 0.05
    )
    start = unrelated(torch.empty(100, 768), torch.Generator().manual_seed(6))
    assert float(start.abs().max()) <= 0.0625
    assert float(torch.linalg.vector_norm(start, dim=1).mean()) == pytest.approx(1.0, abs=0.01)
