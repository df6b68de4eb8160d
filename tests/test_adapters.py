"""Adapters on tiny real models: their start, loading, isolation, and export to PEFT."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.training import LocalRun, train_locally
from common.adapters import (
    AdaptedBackbone,
    at_rank,
    export_peft,
    is_residual,
    part_of,
    residual_name,
)
from common.backbones import load_backbone
from common.config import Adapter, Backbone, Copra, Train
from common.errors import ConfigError, UpdateRefusedError
from common.features import Batch, Features, extract_features
from common.lowrank import adapted_modules, factor_names, is_factor
from common.tasks import LabelledTask, Split
from common.tensors import Tensors, digest
from strategies.base import for_task

MakeTask = Callable[..., LabelledTask]
CPU = torch.device("cpu")
KINDS = ["image", "text"]
TEXTS = [
    ("the film was good",),
    ("this book is very dull",),
    ("the film was not good",),
    ("slow",),
    ("very good very good film",),
    ("the book is bad",),
]


class Workshop:
    """Makes adapted models of one kind, and rows for them."""

    def __init__(self, kind: Any, folder: Path, rows: Features | None) -> None:
        self.kind = kind
        self.config = Backbone(path=str(folder))
        self._rows = rows

    def model(self, adapter: Adapter | None = None) -> AdaptedBackbone:
        """A model as a fresh process would load it."""
        backbone = load_backbone(self.config, self.kind, "cpu")
        return AdaptedBackbone(backbone, adapter or Adapter(rank=4, alpha=6.0))

    def rows(self, model: AdaptedBackbone) -> Features:
        if self._rows is not None:
            return self._rows
        labels = np.array([0, 1, 2, 1, 0, 2])
        return extract_features(model.backbone.preprocessor, Split(TEXTS, labels))

    def batch(self, model: AdaptedBackbone) -> Batch:
        return self.rows(model).batch(torch.arange(6), CPU)

    def logits(self, model: AdaptedBackbone) -> Tensor:
        model.module.eval()
        with torch.no_grad():
            return model.logits(self.batch(model))

    def base(self, num_labels: int = 3) -> Any:
        """The plain pretrained classifier, by transformers alone."""
        from transformers import (
            AutoModelForImageClassification,
            AutoModelForSequenceClassification,
        )

        auto = {
            "image": AutoModelForImageClassification,
            "text": AutoModelForSequenceClassification,
        }[self.kind]
        return auto.from_pretrained(self.config.path, num_labels=num_labels).eval()


@pytest.fixture(scope="module", params=KINDS)
def workshop(
    request: pytest.FixtureRequest, vit_folder: Path, bert_folder: Path, picture_rows: Features
) -> Workshop:
    if request.param == "image":
        return Workshop("image", vit_folder, picture_rows)
    return Workshop("text", bert_folder, None)


@pytest.fixture
def task(workshop: Workshop, empty_task: MakeTask) -> LabelledTask:
    return empty_task(workshop.kind)


def awake(state: Tensors, seed: int = 2) -> dict[str, Tensor]:
    """A state whose every tensor is at work."""
    stream = torch.Generator().manual_seed(seed)
    return {name: t + 0.3 * torch.randn(t.shape, generator=stream) for name, t in state.items()}


def with_residuals(state: Tensors, model: AdaptedBackbone, task: LabelledTask) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(9)
    residuals = {}
    for module in adapted_modules(state):
        name_B, name_A = factor_names(module)
        size = (state[name_B].shape[0], state[name_A].shape[1])
        residuals[residual_name(module)] = torch.randn(size, generator=stream, dtype=torch.float64)
    return {**state, **residuals}


RUN = LocalRun(seed=4, first_step=0, steps=4, total_steps=8, trains=("lora_A", "lora_B", "head"))
TRAIN = Train(learning_rate=0.02, batch_size=4)
COPRA = Copra(enabled=True, initial=0.3, ramp=1.0)


def train(model: AdaptedBackbone, rows: Features, **changes: Any) -> float:
    run = LocalRun(**{**RUN.__dict__, **changes})
    return train_locally(model, rows, run, TRAIN, COPRA).loss


# --- the common start -----------------------------------------------------------------------------


def test_the_start_has_b_zero_a_as_peft_draws_it_and_a_small_head(
    workshop: Workshop, task: LabelledTask
) -> None:
    state = workshop.model().initial((task,), seed=0)
    of_part = {part: [] for part in ("lora_A", "lora_B", "head")}  # type: ignore[var-annotated]
    for name, tensor in state.items():
        of_part[part_of(name)].append(tensor)
    assert not any(B.any() for B in of_part["lora_B"])
    A, bound = torch.cat(of_part["lora_A"]), 16**-0.5  # Kaiming-uniform with a = √5
    assert float(A.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert abs(float(A.mean())) < 0.1 * bound
    weight, bias = sorted(of_part["head"], key=lambda tensor: -tensor.ndim)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.5)  # the encoder's initializer_range
    assert not bias.any()


def test_the_start_is_what_can_be_trained_with_its_shapes(
    workshop: Workshop, task: LabelledTask
) -> None:
    model = workshop.model()
    state = model.initial((task,), seed=0)
    assert {name: t.shape for name, t in state.items()} == model.shapes(4, task)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert len(adapted_modules(state)) == 8  # query and value of 4 blocks
    assert {part_of(name) for name in state} == {"lora_A", "lora_B", "head"}
    assert state["head.toy.classifier.weight"].shape == (3, 16)


def test_the_start_follows_from_the_seed_alone(workshop: Workshop, task: LabelledTask) -> None:
    first = workshop.model().initial((task,), seed=0)
    torch.manual_seed(99)
    second = workshop.model().initial((task,), seed=0)
    assert digest(first) == digest(second)
    other = workshop.model().initial((task,), seed=1)
    for name, tensor in first.items():
        if tensor.any():
            assert not torch.equal(tensor, other[name]), name


def test_no_two_tensors_of_the_start_are_drawn_alike(
    workshop: Workshop, task: LabelledTask
) -> None:
    state = workshop.model().initial((task,), seed=0)
    drawn = [t for name, t in state.items() if part_of(name) == "lora_A"]
    for index, tensor in enumerate(drawn):
        assert not any(torch.equal(tensor, other) for other in drawn[index + 1 :])


def test_the_start_of_one_task_does_not_depend_on_the_others(
    workshop: Workshop, task: LabelledTask, empty_task: MakeTask
) -> None:
    """Clients know their own task only; the server knows all."""
    other = empty_task(workshop.kind, "other", labels=5)
    model = workshop.model()
    alone, together = model.initial((task,), seed=0), model.initial((other, task), seed=0)
    assert digest(for_task(together, "toy")) == digest(alone)
    assert together["head.other.classifier.weight"].shape == (5, 16)


def test_a_lower_rank_starts_from_the_first_directions(
    workshop: Workshop, task: LabelledTask
) -> None:
    model = workshop.model(Adapter(ranks=(2, 8, 4), alpha=6.0))
    state = model.initial((task,), seed=0)
    for rank in (2, 4, 8):
        cut = at_rank(state, rank)
        assert {name: t.shape for name, t in cut.items()} == model.shapes(rank, task)
        for name, tensor in cut.items():
            assert tensor.is_contiguous()
            if part_of(name) == "lora_A":
                assert torch.equal(tensor, state[name][:rank])
            elif part_of(name) == "lora_B":
                assert torch.equal(tensor, state[name][:, :rank])
            else:
                assert torch.equal(tensor, state[name])
        model.load(cut, rank, task)
        assert digest(model.state()) == digest(cut)


def test_the_start_is_the_pretrained_model(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    state = model.initial((task,), seed=0)
    model.load(state, 4, task)
    base = workshop.base()
    set_head(base, state, task)
    with torch.no_grad():
        expected = base(**workshop.batch(model).inputs).logits
    torch.testing.assert_close(workshop.logits(model), expected, rtol=0, atol=1e-6)


def set_head(base: Any, state: Tensors, task: LabelledTask) -> None:
    parameters = dict(base.named_parameters())
    prefix = f"head.{task.name}."
    with torch.no_grad():
        for name, tensor in state.items():
            if name.startswith(prefix):
                parameters[name.removeprefix(prefix)].copy_(tensor)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_adds_s_times_b_times_a(
    workshop: Workshop, task: LabelledTask, rslora: bool
) -> None:
    """s = alpha/r, or alpha/√r: the same model with the product added to its weights."""
    model = workshop.model(Adapter(rank=4, alpha=6.0, rslora=rslora))
    state = awake(model.initial((task,), seed=0))
    model.load(state, 4, task)
    base = workshop.base()
    set_head(base, state, task)
    for module in adapted_modules(state):
        name_B, name_A = factor_names(module)
        s = 6.0 / (4**0.5 if rslora else 4)
        with torch.no_grad():
            base.get_submodule(module).weight += s * state[name_B] @ state[name_A]
    with torch.no_grad():
        expected = base(**workshop.batch(model).inputs).logits
    torch.testing.assert_close(workshop.logits(model), expected, rtol=0, atol=1e-5)


# --- global streams -------------------------------------------------------------------------------


def test_the_global_random_streams_are_left_alone(workshop: Workshop, task: LabelledTask) -> None:
    def streams() -> list[Any]:
        return [torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2]]

    torch.manual_seed(5)
    before = streams()
    model = workshop.model(Adapter(ranks=(2, 4), alpha=6.0, dropout=0.2))
    assert streams() == before, "loading a backbone"
    state = model.initial((task,), seed=0)
    model.load(state, 4, task)
    assert streams() == before, "injecting an adapter"
    rows = workshop.rows(model)
    assert streams() == before, "extracting features"
    train(model, rows)
    assert streams() == before, "training"


def test_training_does_not_depend_on_the_global_stream(
    workshop: Workshop, task: LabelledTask
) -> None:
    trained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = workshop.model(Adapter(rank=4, alpha=6.0, dropout=0.2))
        model.load(model.initial((task,), seed=0), 4, task)
        train(model, workshop.rows(model))
        trained.append(digest(model.state()))
    assert trained[0] == trained[1]


def test_dropout_is_at_work_and_differs_between_clients(
    workshop: Workshop, task: LabelledTask
) -> None:
    def trained(dropout: float, seed: int) -> str:
        model = workshop.model(Adapter(rank=4, alpha=6.0, dropout=dropout))
        model.load(awake(model.initial((task,), seed=0)), 4, task)
        # A batch as large as the shard, so that only dropout can make a difference.
        run = LocalRun(**{**RUN.__dict__, "seed": seed})
        whole = Train(learning_rate=0.02, batch_size=1000)
        train_locally(model, workshop.rows(model), run, whole, Copra())
        return digest(model.state())

    assert trained(0.5, 1) == trained(0.5, 1)
    assert trained(0.5, 1) != trained(0.5, 2)
    assert trained(0.5, 1) != trained(0.0, 1)


# --- load and state -------------------------------------------------------------------------------


def test_what_is_loaded_is_what_is_read_to_the_bit(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    state = awake(model.initial((task,), seed=0))
    model.load(state, 4, task)
    assert digest(model.state()) == digest(state)


def test_what_is_read_is_a_copy(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    state = awake(model.initial((task,), seed=0))
    given = {name: tensor.clone() for name, tensor in state.items()}
    model.load(given, 4, task)
    for tensor in [*model.state().values(), *given.values()]:
        tensor.zero_()
    assert digest(model.state()) == digest(state)


def broken(state: Tensors, how: str) -> tuple[dict[str, Tensor], str]:
    """Return a state with one fault, and what the refusal has to name."""
    bad = dict(state)
    name = next(n for n in sorted(state) if part_of(n) == "lora_B")
    if how == "missing":
        del bad[name]
    elif how == "unknown":
        name = "vit.layers.0.surprise.lora_A.weight"
        bad[name] = torch.zeros(4, 16)
    elif how == "transposed":
        bad[name] = bad[name].T.contiguous()
    elif how == "of a lower rank":
        bad[name] = bad[name][:, :2]
    elif how == "NaN":
        bad[name] = bad[name].clone()
        bad[name][3, 1] = float("nan")
    elif how == "infinite":
        bad[name] = torch.full_like(bad[name], float("inf"))
    elif how == "without a head":
        name = next(n for n in sorted(state) if part_of(n) == "head")
        del bad[name]
    elif how == "with another task's head":
        name = "head.other.classifier.weight"
        bad[name] = torch.zeros(3, 16)
    return bad, name


FAULTS = [
    "missing",
    "unknown",
    "transposed",
    "of a lower rank",
    "NaN",
    "infinite",
    "without a head",
    "with another task's head",
]


@pytest.mark.parametrize("how", FAULTS)
def test_a_faulty_state_is_refused_by_name_and_leaves_the_model_alone(
    workshop: Workshop, task: LabelledTask, how: str
) -> None:
    model = workshop.model()
    good = awake(model.initial((task,), seed=0))
    model.load(good, 4, task)
    bad, name = broken(good, how)
    with pytest.raises(UpdateRefusedError) as refusal:
        model.load(bad, 4, task)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert digest(model.state()) == digest(good)


@pytest.mark.parametrize("how", ["NaN", "of another shape", "of an unknown module"])
def test_a_faulty_residual_is_refused_by_name(
    workshop: Workshop, task: LabelledTask, how: str
) -> None:
    model = workshop.model()
    state = with_residuals(model.initial((task,), seed=0), model, task)
    name = next(name for name in state if is_residual(name))
    if how == "NaN":
        state[name][0, 0] = float("nan")
    elif how == "of another shape":
        state[name] = state[name][:, :7]
    else:
        name = residual_name("vit.layers.9.attention.q_proj")
        state[name] = torch.zeros(16, 16)
    with pytest.raises(UpdateRefusedError) as refusal:
        model.load(state, 4, task)
    assert name in str(refusal.value)


def test_nothing_can_be_read_before_a_state_is_loaded(workshop: Workshop) -> None:
    with pytest.raises(RuntimeError, match="no state"):
        workshop.model().state()


# --- residuals ------------------------------------------------------------------------------------


def test_a_residual_adds_exactly_its_product_with_the_input(
    workshop: Workshop, task: LabelledTask
) -> None:
    """With integers in float32 the sum is exact, so it can be demanded to the bit."""
    model = workshop.model()
    state = with_residuals(model.initial((task,), seed=0), model, task)
    for name in state:
        if is_residual(name):
            state[name] = (4 * state[name]).round()
    model.load(state, 4, task)
    module = adapted_modules(state)[0]
    layer = model.backbone.encoder.get_submodule(module.split(".", 1)[1])
    x = torch.arange(32.0).reshape(2, 16).remainder(7)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        assert torch.equal(layer(x), x @ state[residual_name(module)].float().T)


def test_residuals_are_as_good_as_changed_weights(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    state = with_residuals(awake(model.initial((task,), seed=0)), model, task)
    model.load(state, 4, task)
    base = workshop.base()
    set_head(base, state, task)
    for module in adapted_modules(state):
        name_B, name_A = factor_names(module)
        with torch.no_grad():
            weight = base.get_submodule(module).weight
            weight += 1.5 * state[name_B] @ state[name_A] + state[residual_name(module)].float()
    with torch.no_grad():
        expected = base(**workshop.batch(model).inputs).logits
    torch.testing.assert_close(workshop.logits(model), expected, rtol=0, atol=2e-5)


def test_residuals_go_with_the_state_that_brought_them(
    workshop: Workshop, task: LabelledTask
) -> None:
    model = workshop.model()
    state = awake(model.initial((task,), seed=0))
    model.load(state, 4, task)
    before = workshop.logits(model)
    model.load(with_residuals(state, model, task), 4, task)
    assert float((workshop.logits(model) - before).abs().max()) > 1e-2
    assert not any(is_residual(name) for name in model.state())
    model.load(state, 4, task)
    assert torch.equal(workshop.logits(model), before)


def test_residuals_are_not_trained(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    state = with_residuals(model.initial((task,), seed=0), model, task)
    before = digest({name: t for name, t in state.items() if is_residual(name)})
    model.load(state, 4, task)
    train(model, workshop.rows(model))
    assert digest({name: t for name, t in state.items() if is_residual(name)}) == before


# --- training and isolation -----------------------------------------------------------------------


@pytest.mark.parametrize("trains", [("lora_A", "lora_B", "head"), ("lora_B", "head"), ("lora_B",)])
def test_training_changes_what_it_is_told_to_and_nothing_else(
    workshop: Workshop, task: LabelledTask, trains: tuple[str, ...]
) -> None:
    model = workshop.model()
    start = awake(model.initial((task,), seed=0))
    model.load(start, 4, task)
    encoder = {n: p for n, p in model.backbone.encoder.named_parameters() if "lora_" not in n}
    before = digest(encoder)
    train(model, workshop.rows(model), trains=trains)
    for name, tensor in model.state().items():
        # BERT's key bias aside, every trained tensor gets a gradient here.
        assert torch.equal(tensor, start[name]) == (part_of(name) not in trains), name
    assert digest(encoder) == before
    assert not any(p.requires_grad for p in encoder.values())
    # What is not trained costs no gradient either.
    assert {n for n, p in model.parameters().items() if p.requires_grad} == {
        n for n in start if part_of(n) in trains
    }
    assert all(p.grad is None for p in model.parameters().values())


def test_what_one_run_freezes_the_next_can_train(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    start = awake(model.initial((task,), seed=0))
    model.load(start, 4, task)
    train(model, workshop.rows(model), trains=("lora_B",))
    model.load(start, 4, task)
    train(model, workshop.rows(model))
    fresh = workshop.model()
    fresh.load(start, 4, task)
    train(fresh, workshop.rows(fresh))
    assert digest(model.state()) == digest(fresh.state())


def test_training_lowers_the_loss(workshop: Workshop, task: LabelledTask) -> None:
    model = workshop.model()
    model.load(model.initial((task,), seed=0), 4, task)
    rows = workshop.rows(model)
    first = train_locally(model, rows, RUN, TRAIN, Copra()).loss
    for _ in range(20):
        last = train_locally(model, rows, RUN, TRAIN, Copra()).loss
    assert last < first


@pytest.mark.parametrize(
    "before",
    [
        pytest.param({"rank": 4}, id="same rank"),
        pytest.param({"rank": 8}, id="higher rank"),
        pytest.param({"rank": 2, "residuals": True}, id="lower rank with residuals"),
        pytest.param({"rank": 4, "trains": ("lora_B",)}, id="frozen A and head"),
        pytest.param({"rank": 8, "task": "other"}, id="another task"),
        pytest.param({"rank": 4, "fails": True}, id="a step that raised"),
    ],
)
def test_nothing_leaks_from_one_client_to_the_next(
    workshop: Workshop,
    task: LabelledTask,
    empty_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    before: dict[str, Any],
) -> None:
    """Client B after client A in one process equals client B in a process of its own."""
    adapter = Adapter(ranks=(2, 4, 8), alpha=6.0, dropout=0.1)

    def client_b(model: AdaptedBackbone) -> tuple[str, Tensor]:
        model.load(at_rank(awake(model.initial((task,), seed=0)), 4), 4, task)
        train(model, workshop.rows(model), seed=7)
        return digest(model.state()), workshop.logits(model)

    expected, answers = client_b(workshop.model(adapter))
    shared, rank = workshop.model(adapter), before["rank"]
    # Other than a task with as many labels, which would share the very parameters of the head.
    first_task = empty_task(workshop.kind, "other", labels=3) if "task" in before else task
    state = at_rank(awake(shared.initial((first_task,), seed=3), seed=5), rank)
    if "residuals" in before:
        state = with_residuals(state, shared, first_task)
    shared.load(state, rank, first_task)
    if "fails" in before:
        rows = workshop.rows(shared)
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", raise_full_disk)
            with pytest.raises(RuntimeError, match="full disk"):
                train(shared, rows)
    else:
        train(shared, workshop.rows(shared), trains=before.get("trains", RUN.trains))
    found, logits = client_b(shared)
    assert found == expected
    assert torch.equal(logits, answers)


def raise_full_disk(*_: Any) -> None:
    raise RuntimeError("full disk")


def test_tasks_of_unlike_label_counts_share_the_encoder_and_keep_their_heads_apart(
    workshop: Workshop, task: LabelledTask, empty_task: MakeTask
) -> None:
    other = empty_task(workshop.kind, "other", labels=5)
    model = workshop.model()
    states = {t.name: awake(model.initial((t,), seed=0)) for t in (task, other)}
    alone = {}
    for t in (task, other):
        fresh = workshop.model()
        fresh.load(states[t.name], 4, t)
        alone[t.name] = workshop.logits(fresh)
    for t in (task, other, task):
        model.load(states[t.name], 4, t)
        assert torch.equal(workshop.logits(model), alone[t.name])
        assert alone[t.name].shape == (6, len(t.labels))


def test_a_task_is_not_mistaken_for_another_whose_name_it_begins(
    workshop: Workshop, empty_task: MakeTask
) -> None:
    """Folders are called `v1` and `v1.0`, too."""
    from common.config import TaskSource

    names = [TaskSource(path=f"data/{name}").label for name in ("v1", "v1.0")]
    tasks = tuple(empty_task(workshop.kind, name) for name in names)
    model = workshop.model()
    state = model.initial(tasks, seed=0)
    for t in tasks:
        assert for_task(state, t.name).keys() == model.shapes(4, t).keys()
        model.load(for_task(state, t.name), 4, t)


# --- choices --------------------------------------------------------------------------------------


def test_a_rank_above_the_size_of_a_layer_is_refused(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank = 17.*16x16.*at most 16"):
        workshop.model(Adapter(rank=17))
    with pytest.raises(ConfigError, match=r"20.*16x16"):
        workshop.model(Adapter(ranks=(4, 20)))
    workshop.model(Adapter(rank=16))


def test_unknown_targets_are_refused_with_the_choices(workshop: Workshop) -> None:
    there = {"image": "q_proj", "text": "query"}[workshop.kind]
    with pytest.raises(ConfigError, match=r"adapter\.targets.*nonsense") as refusal:
        workshop.model(Adapter(targets=("nonsense",)))
    assert there in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="nonsense"):
        workshop.model(Adapter(targets=(there, "nonsense")))


def test_chosen_targets_are_adapted_and_no_others(workshop: Workshop, task: LabelledTask) -> None:
    chosen = {"image": ("o_proj", "fc1"), "text": ("key", "query")}[workshop.kind]
    model = workshop.model(Adapter(rank=4, alpha=6.0, targets=chosen))
    state = awake(model.initial((task,), seed=0))
    modules = adapted_modules(state)
    assert len(modules) == 8
    assert {module.rsplit(".", 1)[-1] for module in modules} == set(chosen)
    model.load(state, 4, task)
    assert digest(model.state()) == digest(state)


# --- weights as they come -------------------------------------------------------------------------


def test_a_backbone_saved_in_bfloat16_is_adapted_in_float32(
    workshop: Workshop, task: LabelledTask, tmp_path: Path
) -> None:
    """As most models on the hub are, nowadays."""
    import shutil

    from transformers import AutoModel

    folder = tmp_path / "half"
    shutil.copytree(str(workshop.config.path), folder)
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    half = Workshop(workshop.kind, folder, workshop._rows)
    model = half.model()
    state = model.initial((task,), seed=0)
    model.load(state, 4, task)
    assert {t.dtype for t in model.state().values()} == {torch.float32}
    train(model, half.rows(model))
    assert bool(torch.isfinite(half.logits(model)).all())


def test_weights_that_a_checkpoint_lacks_are_the_same_in_every_process(
    bert_folder: Path, tmp_path: Path
) -> None:
    """A BERT saved from masked-language training has no pooler; it is drawn, and never sent."""
    import shutil

    from transformers import BertForMaskedLM

    folder = tmp_path / "no-pooler"
    shutil.copytree(bert_folder, folder)
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoder = load_backbone(Backbone(path=str(folder)), "text", "cpu").encoder
        digests.add(digest(encoder.state_dict()))
    assert len(digests) == 1


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [2, 4])
def test_peft_gives_the_same_logits_from_the_exported_folder(
    workshop: Workshop, task: LabelledTask, tmp_path: Path, rslora: bool, rank: int
) -> None:
    from peft import PeftModel

    adapter = Adapter(ranks=(2, 4), alpha=6.0, rslora=rslora)
    model = workshop.model(adapter)
    state = at_rank(awake(model.initial((task,), seed=0)), rank)
    model.load(state, rank, task)
    folder = tmp_path / "adapter"
    stream = torch.random.get_rng_state()
    export_peft(state, workshop.config, adapter, task, folder)
    assert torch.equal(torch.random.get_rng_state(), stream)

    theirs = PeftModel.from_pretrained(workshop.base(), str(folder)).eval()
    with torch.no_grad():
        logits = theirs(**workshop.batch(model).inputs).logits
    torch.testing.assert_close(logits, workshop.logits(model), rtol=0, atol=1e-5)


def test_an_exported_folder_holds_the_adapter_and_no_copy_of_the_base(
    workshop: Workshop, task: LabelledTask, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = workshop.model()
    state = awake(model.initial((task,), seed=0))
    export_peft(state, workshop.config, Adapter(rank=4, alpha=6.0), task, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(state)
    assert sorted(t.numel() for t in saved.values()) == sorted(t.numel() for t in state.values())
    assert sum(".lora_A." in name for name in saved) == sum(
        is_factor(name) and ".lora_A." in name for name in state
    )


@pytest.mark.parametrize("how", ["missing", "without a head", "with another task's head"])
def test_a_state_that_is_not_whole_is_not_exported(
    workshop: Workshop, task: LabelledTask, tmp_path: Path, how: str
) -> None:
    """As its docstring says; PEFT's own loader takes anything."""
    state, name = broken(awake(workshop.model().initial((task,), seed=0)), how)
    with pytest.raises(UpdateRefusedError, match=name):
        export_peft(state, workshop.config, Adapter(rank=4, alpha=6.0), task, tmp_path / "adapter")
