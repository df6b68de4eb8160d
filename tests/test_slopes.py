"""Slopes of losses along directions: against the gradient of full matrices, row by row."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.adapters import AdaptedBackbone
from common.backbones import load_backbone
from common.config import Adapter, Backbone
from common.errors import ConfigError
from common.features import Features, extract_features
from common.lowrank import Directions, Term, adapted_modules, factor_names
from common.residuals import residual_name
from common.scoring import losses_and_hits
from common.slopes import slopes
from common.tasks import Kind, LabelledTask, Split

MakeTask = Callable[..., LabelledTask]
CPU = torch.device("cpu")
K = 3


@pytest.fixture(params=["image", "text"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
def rows(kind: Kind, bert_folder: Path, picture_rows: Features) -> Features:
    if kind == "image":
        return picture_rows.select(torch.arange(7))
    texts = [("good film",), ("this book is very very dull",), ("bad",), ("very good book",)]
    backbone = load_backbone(Backbone(path=str(bert_folder)), "text", "cpu")
    labels = np.array([0, 1, 2, 0])
    return extract_features(backbone.preprocessor, Split(texts, labels))


def adapted(
    kind: Kind, vit_folder: Path, bert_folder: Path, task: LabelledTask, blocks: int
) -> tuple[AdaptedBackbone, dict[str, Tensor]]:
    folder = {"image": vit_folder, "text": bert_folder}[kind]
    backbone = load_backbone(Backbone(path=str(folder)), kind, "cpu")
    model = AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0, dropout=0.2, blocks=blocks))
    draw = torch.Generator().manual_seed(3)
    state = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.initial((task,), seed=0).items()
    }
    return model, state


def some_directions(state: dict[str, Tensor]) -> Directions:
    draw = torch.Generator().manual_seed(4)
    stacks = {}
    for module in adapted_modules(state):
        name_B, name_A = factor_names(module)
        m, n = state[name_B].shape[0], state[name_A].shape[1]
        stacks[module] = Term(torch.randn(m, 5, generator=draw), torch.randn(5, n, generator=draw))
    heads = {n: torch.randn(K, *t.shape, generator=draw) for n, t in state.items() if "head" in n}
    mixing = torch.randn(5, K, generator=draw, dtype=torch.float64)
    # Heads of other tasks are not this model's.
    return Directions(stacks, mixing, heads | {"head.other.classifier.bias": torch.ones(K, 9)})


def dense_slopes(
    model: AdaptedBackbone,
    state: dict[str, Tensor],
    task: LabelledTask,
    rows: Features,
    directions: Directions,
) -> Tensor:
    """Gradients by full matrices, which residuals of zero stand for, and by heads."""
    residuals = {
        residual_name(m): torch.zeros(t.B.shape[0], t.A.shape[1])
        for m, t in directions.stacks.items()
    }
    for residual in residuals.values():
        residual.requires_grad_(True)
    model.load({**state, **residuals}, 2, task)
    model.module.eval()
    moving = {n: p for n, p in model.parameters().items() if n in directions.entries}
    for parameter in moving.values():
        parameter.requires_grad_(True)
    found = []
    for row in range(len(rows)):
        batch = rows.batch(torch.tensor([row]), CPU)
        loss = functional.cross_entropy(model.logits(batch), batch.labels)
        names = [*residuals, *moving]
        gradients = torch.autograd.grad(loss, [*residuals.values(), *moving.values()])
        by_name = dict(zip(names, gradients, strict=True))
        slope = torch.zeros(K, dtype=torch.float64)
        for k in range(K):
            for module, stack in directions.stacks.items():
                change = (stack.B.double() * directions.mixing[:, k]) @ stack.A.double()
                slope[k] += (by_name[residual_name(module)].double() * change).sum()
            for name in moving:
                slope[k] += (by_name[name] * directions.entries[name][k]).double().sum()
        found.append(slope)
    return torch.stack(found)


@pytest.mark.parametrize("blocks", [0, 2])
def test_slopes_are_the_gradient_of_full_matrices_row_by_row(
    kind: Kind,
    blocks: int,
    rows: Features,
    vit_folder: Path,
    bert_folder: Path,
    empty_task: MakeTask,
) -> None:
    task = empty_task(kind)
    model, state = adapted(kind, vit_folder, bert_folder, task, blocks)
    rows = model.past_stem(rows)
    directions = some_directions(state)
    exact = dense_slopes(model, state, task, rows, directions)
    model.load(state, 2, task)
    # As training with frozen factors leaves it.
    for parameter in model.parameters().values():
        parameter.requires_grad_(False)
    hooks = {name: len(layer._forward_hooks) for name, layer in model.layers.items()}
    losses, found = slopes(model, rows, directions)
    assert found.shape == (len(rows), K)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4)
    plain, _ = losses_and_hits(model, rows, "float32")
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-5)
    assert float(exact.std(dim=0).min()) > 1e-2  # rows differ
    assert {name: len(layer._forward_hooks) for name, layer in model.layers.items()} == hooks


def test_rows_come_back_in_order_over_several_batches(
    vit_folder: Path, bert_folder: Path, empty_task: MakeTask, picture_rows: Features
) -> None:
    task = empty_task("image")
    model, state = adapted("image", vit_folder, bert_folder, task, 0)
    directions = some_directions(state)
    model.load(state, 2, task)
    many = picture_rows.select(torch.arange(100) % 48)
    losses, found = slopes(model, many, directions)
    torch.testing.assert_close(losses[:48], losses[48:96], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:48], found[48:96], rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_linear_is_refused(
    vit_folder: Path, bert_folder: Path, empty_task: MakeTask, picture_rows: Features
) -> None:
    task = empty_task("image")
    model, state = adapted("image", vit_folder, bert_folder, task, 0)
    model.load(state, 2, task)

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias)

    module = model.module
    plain = module.classifier
    module.classifier = Scaled(plain)
    try:
        with pytest.raises(ConfigError, match=r"head\.toy\.classifier is a Scaled"):
            slopes(model, picture_rows, some_directions(state))
    finally:
        module.classifier = plain


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_number_of_cores_changes_no_bit(
    kind: Kind,
    rows: Features,
    vit_folder: Path,
    bert_folder: Path,
    empty_task: MakeTask,
    blocks: int,
) -> None:
    """Pieces run at the same time share one model, its hooks and its stem."""
    task = empty_task(kind)
    model, state = adapted(kind, vit_folder, bert_folder, task, blocks)
    model.load(state, 2, task)
    many = model.past_stem(rows.select(torch.arange(300) % len(rows)))
    directions = some_directions(state)
    losses, found = slopes(model, many, directions, cores=4)
    scored, hits = losses_and_hits(model, many, "float32", cores=4)
    for _ in range(5):
        alone = slopes(model, many, directions, cores=1)
        assert torch.equal(alone[0], losses)
        assert torch.equal(alone[1], found)
        assert torch.equal(losses_and_hits(model, many, "float32", cores=1)[0], scored)
        assert torch.equal(losses_and_hits(model, many, "float32", cores=4)[1], hits)
