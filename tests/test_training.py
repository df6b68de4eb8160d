"""The local loop: batches, learning rates, clipping, precision, and how rows become tensors."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.training import LocalRun, train_locally
from common.adapters import AdaptedBackbone
from common.backbones import load_backbone
from common.config import Adapter, Backbone, Copra, Train
from common.features import Batch, Features, extract_features
from common.lowrank import adapted_modules, factor_names
from common.rules import LocalRules
from common.tasks import LabelledTask, Split
from common.tensors import digest

CPU = torch.device("cpu")
PARTS = ("lora_A", "lora_B", "head")


@pytest.fixture(scope="module")
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return empty_task("image")


@pytest.fixture(scope="module")
def vit(vit_folder: Path) -> AdaptedBackbone:
    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    return AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0))


@pytest.fixture
def train(
    vit: AdaptedBackbone, task: LabelledTask, picture_rows: Features
) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """A function of the settings: the loss and the state after training from the start."""

    def go(run: dict[str, Any] | None = None, **settings: Any) -> tuple[float, dict[str, Tensor]]:
        vit.load(vit.initial((task,), seed=0), 2, task)
        local = {"seed": 1, "first_step": 0, "steps": 4, "total_steps": 8, "trains": PARTS}
        trained = train_locally(
            vit, picture_rows, LocalRun(**{**local, **(run or {})}), Train(**settings), Copra()
        )
        return trained.loss, vit.state()

    return go


def noting(monkeypatch: pytest.MonkeyPatch, note: Callable[[torch.optim.AdamW], None]) -> None:
    """Call `note` before every optimiser step."""
    plain = torch.optim.AdamW.step

    def step(optimiser: torch.optim.AdamW) -> None:
        note(optimiser)
        plain(optimiser)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def rates(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, first: int, **settings: Any
) -> list[float]:
    seen: list[float] = []
    with monkeypatch.context() as patch:
        noting(patch, lambda optimiser: seen.append(optimiser.param_groups[0]["lr"]))
        train({"first_step": first, "steps": 4, "total_steps": 8}, learning_rate=0.01, **settings)
    return seen


def test_the_learning_rate_is_constant_unless_told_otherwise(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rates(train, monkeypatch, 4) == [0.01] * 4


def test_warm_up_is_within_the_round_and_never_starts_at_zero(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in (0, 4):
        assert rates(train, monkeypatch, first, warmup=0.5) == pytest.approx(
            [0.005, 0.01, 0.01, 0.01]
        )


def test_decay_runs_over_the_whole_run_and_goes_on_where_the_last_round_ended(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = [r for first in (0, 4) for r in rates(train, monkeypatch, first, decay="linear")]
    assert linear == pytest.approx([0.01 * (1 - step / 8) for step in range(8)])
    cosine = [r for first in (0, 4) for r in rates(train, monkeypatch, first, decay="cosine")]
    expected = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert cosine == pytest.approx(expected)


def test_gradients_are_clipped_over_all_that_is_trained(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def note(optimiser: torch.optim.AdamW) -> None:
        grads = [p.grad.norm() for p in optimiser.param_groups[0]["params"] if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))

    noting(monkeypatch, note)
    train(max_grad_norm=0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_the_first_step_is_adamws(
    train: Callable[..., Any], vit: AdaptedBackbone, task: LabelledTask
) -> None:
    """A fresh AdamW moves every number that has a gradient by the learning rate."""
    start = vit.initial((task,), seed=0)
    _, after = train({"steps": 1}, learning_rate=0.01, max_grad_norm=1e9)
    for name, tensor in after.items():
        moved = (tensor - start[name]).abs()
        if ".lora_A." in name:  # no gradient while B is zero
            assert not moved.any(), name
        else:
            assert float(moved.median()) == pytest.approx(0.01, rel=0.01), name


def test_the_loss_is_the_mean_over_the_steps(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    plain = torch.nn.functional.cross_entropy

    def note(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(float(plain(*args, **kwargs)))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", note)
    loss, _ = train()
    assert len(losses) == 4
    assert loss == pytest.approx(sum(losses) / 4)


# --- what the rules of a method add --------------------------------------------------------------

GENTLE = {"optimiser": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9}


def test_the_rates_of_a_round_are_summed(vit: AdaptedBackbone, task: LabelledTask) -> None:
    """SCAFFOLD divides by their sum: `J·η` only where the rate is constant."""
    rows = _rows_of(3)
    vit.load(vit.initial((task,), seed=0), 2, task)
    run = LocalRun(seed=1, first_step=4, steps=4, total_steps=8, trains=PARTS)
    settings = Train(learning_rate=0.01, warmup=0.5, decay="linear")
    expected = 0.01 * (0.5 * 0.5 + 1.0 * 0.375 + 0.25 + 0.125)
    trained = train_locally(vit, rows, run, settings, Copra())
    assert trained.total_rate == pytest.approx(expected)


def test_an_sgd_step_is_the_rate_times_the_gradient_and_the_correction(
    vit: AdaptedBackbone, task: LabelledTask
) -> None:
    """Corrections are added after clipping, also where a branch was dropped and has no gradient."""
    rows = _rows_of(8)
    start = vit.initial((task,), seed=0)
    run = LocalRun(seed=1, first_step=0, steps=1, total_steps=8, trains=PARTS)
    stream = torch.Generator().manual_seed(3)
    correction = {n: torch.randn(t.shape, generator=stream) for n, t in sorted(start.items())}
    for copra in (Copra(), Copra(enabled=True, initial=0.0)):
        after = []
        for added in (None, correction):
            vit.load(start, 2, task)
            train_locally(vit, rows, run, Train(**GENTLE), copra, added)
            after.append(vit.state())
        for name, tensor in correction.items():
            difference = after[1][name] - after[0][name]
            torch.testing.assert_close(difference, -0.1 * tensor, rtol=0, atol=1e-6)
        moved = [name for name in start if not torch.equal(after[0][name], start[name])]
        assert len(moved) == (10 if not copra.enabled else 4)  # a head, and 8 or 2 factors B


def test_the_proximal_term_pulls_back_to_what_was_sent(
    train: Callable[..., Any], vit: AdaptedBackbone, task: LabelledTask
) -> None:
    """The first step is as without it: at x_t its gradient is zero; then μ·(x - x_t) is added."""
    start = vit.initial((task,), seed=0)
    mu = 0.7
    rules = {"rules": LocalRules(proximal=mu)}
    _, one = train({"steps": 1}, batch_size=48, **GENTLE)
    _, one_proximal = train({"steps": 1, **rules}, batch_size=48, **GENTLE)
    assert digest(one) == digest(one_proximal)
    _, two = train({"steps": 2}, batch_size=48, **GENTLE)
    _, two_proximal = train({"steps": 2, **rules}, batch_size=48, **GENTLE)
    for name in start:
        pulled = -0.1 * mu * (one[name] - start[name])
        torch.testing.assert_close(two_proximal[name] - two[name], pulled, rtol=0, atol=1e-6)


def test_the_loss_that_is_told_is_without_penalties(train: Callable[..., Any]) -> None:
    """Clients of different methods must report the same quantity."""
    rules = {"rules": LocalRules(tail_share=0.5, tail_penalty=100.0), "rank": 2, "steps": 1}
    assert train(rules, **GENTLE)[0] == train({"steps": 1}, **GENTLE)[0]


def test_the_tail_penalty_pushes_the_trailing_directions_together(
    vit: AdaptedBackbone, task: LabelledTask
) -> None:
    """`λ·‖B[:, t:]‖·‖A[t:]‖`: its gradient in B is `λ·‖A[t:]‖·B[:, t:]/‖B[:, t:]‖`, by hand."""
    stream = torch.Generator().manual_seed(4)
    start = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in sorted(vit.initial((task,), seed=0).items())
    }
    after = []
    for rules in (LocalRules(), LocalRules(tail_share=0.5, tail_penalty=0.2)):
        run = LocalRun(1, 0, 1, 8, PARTS, rules, rank=2)
        vit.load(start, 2, task)
        train_locally(vit, _rows_of(8), run, Train(**GENTLE), Copra())
        after.append(vit.state())
    for module in adapted_modules(start):
        name_B, name_A = factor_names(module)
        B, A = start[name_B][:, 1:], start[name_A][1:]
        pushed = torch.zeros_like(start[name_B])
        pushed[:, 1:] = -0.1 * 0.2 * A.norm() * B / B.norm()
        torch.testing.assert_close(after[1][name_B] - after[0][name_B], pushed, rtol=0, atol=1e-6)
        pushed = torch.zeros_like(start[name_A])
        pushed[1:] = -0.1 * 0.2 * B.norm() * A / A.norm()
        torch.testing.assert_close(after[1][name_A] - after[0][name_A], pushed, rtol=0, atol=1e-6)


def _rows_of(count: int) -> Features:
    stream = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=stream, dtype=torch.uint8)
    half = torch.full((1, 1, 1, 1), 0.5)
    return Features({"pixel_values": pixels}, torch.arange(count) % 3, half, half)


# --- batches and precision ------------------------------------------------------------------------


def test_every_epoch_takes_each_row_once_in_a_new_order(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = Features.batch

    def note(self: Features, rows: Tensor, device: torch.device) -> Batch:
        assert len(rows) == 20
        seen.extend(rows.tolist())
        return plain(self, rows, device)

    monkeypatch.setattr(Features, "batch", note)
    train({"steps": 12}, batch_size=20)  # 240 rows: five epochs of 48
    epochs = [seen[start : start + 48] for start in range(0, 240, 48)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_batch_is_never_larger_than_the_shard(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = Features.batch

    def note(self: Features, rows: Tensor, device: torch.device) -> Batch:
        sizes.append(len(rows))
        return plain(self, rows, device)

    monkeypatch.setattr(Features, "batch", note)
    train(batch_size=1000)
    assert sizes == [48] * 4


def test_bfloat16_is_for_the_forward_pass_alone(train: Callable[..., Any]) -> None:
    _, plain = train()
    _, half = train(precision="bfloat16")
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert digest(half) != digest(plain)
    for name, tensor in half.items():
        assert bool(torch.isfinite(tensor).all())
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=0.02)


# --- rows as tensors ------------------------------------------------------------------------------


def test_padding_and_cropping_of_texts_do_not_change_the_answer(
    bert_folder: Path, empty_task: Callable[..., LabelledTask]
) -> None:
    backbone = load_backbone(Backbone(path=str(bert_folder), max_length=12), "text", "cpu")
    model = AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0))
    kind = empty_task("text")
    model.load(model.initial((kind,), seed=0), 2, kind)
    model.module.eval()
    texts = [("good film",), ("this book is very very very dull",), ("bad " * 50,)]
    rows = extract_features(backbone.preprocessor, Split(texts, np.zeros(3, dtype=np.int64)))
    assert rows.inputs["input_ids"].shape == (3, 12)
    with torch.no_grad():
        together = model.logits(rows.batch(torch.arange(3), CPU))
        for row in range(3):
            batch = rows.batch(torch.tensor([row]), CPU)
            assert bool(batch.inputs["attention_mask"].all())
            torch.testing.assert_close(model.logits(batch)[0], together[row], rtol=0, atol=1e-5)


def test_pairs_are_told_apart_by_token_types(bert_folder: Path) -> None:
    backbone = load_backbone(Backbone(path=str(bert_folder)), "text", "cpu")
    split = Split([("good film", "bad book")], np.zeros(1, dtype=np.int64))
    rows = extract_features(backbone.preprocessor, split)
    assert rows.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_pictures_of_any_mode_and_size_are_fitted_to_the_backbone(
    vit_folder: Path, mode: str
) -> None:
    from PIL import Image

    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    split = Split([Image.new(mode, (50, 31), 1)], np.zeros(1, dtype=np.int64))
    rows = extract_features(backbone.preprocessor, split)
    assert rows.inputs["pixel_values"].shape == (1, 1, 28, 28)
    assert rows.inputs["pixel_values"].dtype == torch.uint8


def test_pixels_are_scaled_and_normalised_as_the_processor_says(vit_folder: Path) -> None:
    from PIL import Image

    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    pattern = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    split = Split([Image.fromarray(pattern)], np.zeros(1, dtype=np.int64))
    batch = extract_features(backbone.preprocessor, split).batch(torch.tensor([0]), CPU)
    expected = (torch.from_numpy(pattern).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch.inputs["pixel_values"][0, 0], expected)
