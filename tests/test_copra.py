"""The CopRA schedule, its switches, and what skipping a branch does to a real model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clients import training
from clients.training import LocalRun, train_locally
from common.adapters import AdaptedBackbone
from common.backbones import load_backbone
from common.config import Adapter, Backbone, Copra, Train
from common.copra import draw_switches, group_by_block, keep_probability, switched
from common.features import Batch, Features
from common.seeds import torch_generator
from common.tasks import LabelledTask
from common.tensors import digest

MakeTask = Callable[..., LabelledTask]


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("ramp", [0.25, 0.75, 1.0])
def test_the_keep_probability_rises_linearly_and_is_one_from_the_end_of_the_ramp(
    initial: float, ramp: float
) -> None:
    copra, total = Copra(enabled=True, initial=initial, ramp=ramp), 40
    end = math.ceil(ramp * total)
    for step in range(total):
        expected = min(1.0, initial + (1 - initial) * step / end)
        assert keep_probability(step, total, copra) == pytest.approx(expected, abs=1e-12)
    assert keep_probability(0, total, copra) == initial
    assert keep_probability(end, total, copra) == 1.0
    assert initial == 1.0 or keep_probability(end - 1, total, copra) < 1.0


def test_the_ramp_ends_at_the_step_rounded_up() -> None:
    copra = Copra(enabled=True, initial=0.0, ramp=0.75)
    assert keep_probability(7, 10, copra) == pytest.approx(7 / 8)
    assert keep_probability(8, 10, copra) == 1.0


def test_no_ramp_means_no_dropping() -> None:
    copra = Copra(enabled=True, initial=0.0, ramp=0.0)
    assert all(keep_probability(step, 10, copra) == 1.0 for step in range(10))


@given(
    step=st.integers(0, 500),
    total=st.integers(1, 400),
    initial=st.floats(0, 1),
    ramp=st.floats(0, 1),
)
def test_the_keep_probability_is_one_and_never_falls(
    step: int, total: int, initial: float, ramp: float
) -> None:
    copra = Copra(enabled=True, initial=initial, ramp=ramp)
    now, later = keep_probability(step, total, copra), keep_probability(step + 1, total, copra)
    assert 0.0 <= now <= later <= 1.0


def test_the_schedule_is_off_unless_asked_for_and_then_that_of_coto() -> None:
    """p from 0.1 over the first three quarters of the run (specification 1.1, 7.9)."""
    copra = Copra()
    assert not copra.enabled
    assert (copra.initial, copra.ramp, copra.over, copra.whole) == (0.1, 0.75, "run", 0.0)


@pytest.mark.parametrize(("initial", "skipped"), [(0.1, 0.3375), (0.0, 0.375)])
def test_a_run_skips_as_many_branches_as_the_schedule_promises(
    initial: float, skipped: float
) -> None:
    """The mean of 1 - p over all steps is ρ(1 - p0)/2."""
    copra = Copra(enabled=True, initial=initial)
    off = sum(1 - keep_probability(step, 8000, copra) for step in range(8000)) / 8000
    assert off == pytest.approx(skipped, abs=1e-4)


# --- the switches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 1e-9, 0.1, 0.5])
@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_some_block_is_always_on(blocks: int, probability: float) -> None:
    stream = torch_generator(0, "test")
    for _ in range(300):
        switches = draw_switches(blocks, probability, stream)
        assert len(switches) == blocks
        assert any(switches)


def test_at_probability_zero_exactly_one_block_is_on_each_as_often() -> None:
    stream = torch_generator(0, "test")
    drawn = torch.tensor([draw_switches(4, 0.0, stream) for _ in range(2000)]).double()
    assert bool((drawn.sum(dim=1) == 1).all())
    # Four standard errors of a share of 1/4 in 2,000 draws.
    assert bool(((drawn.mean(dim=0) - 0.25).abs() < 0.039).all())


def test_blocks_are_kept_independently_at_the_probability_asked_for() -> None:
    stream = torch_generator(0, "test")
    drawn = torch.tensor([draw_switches(6, 0.6, stream) for _ in range(3000)]).double()
    # The rescue adds 0.4^6 / 6 = 0.0007: less than the noise.
    assert bool(((drawn.mean(dim=0) - 0.6).abs() < 0.036).all())
    together = (drawn[:, 0] * drawn[:, 1]).mean()
    assert abs(float(together) - 0.36) < 0.036


def test_a_rescue_adds_as_much_as_it_should_and_less_than_drawing_again() -> None:
    """Specification 1.2.2: p + (1-p)^L/L = 0.1235 at p = 0.1 and L = 12; redrawing has 0.139."""
    stream = torch_generator(0, "test")
    drawn = torch.tensor([draw_switches(12, 0.1, stream) for _ in range(6000)]).double()
    # Four standard errors of a share of 0.1235 in 72,000 draws, which hardly depend on each other.
    assert float(drawn.mean()) == pytest.approx(0.1 + 0.9**12 / 12, abs=0.005)


def test_at_probability_one_all_blocks_are_on() -> None:
    stream = torch_generator(0, "test")
    assert all(all(draw_switches(8, 1.0, stream)) for _ in range(50))


def test_switches_follow_from_their_stream_alone() -> None:
    first = [
        draw_switches(6, 0.4, stream) for stream in [torch_generator(1, "a")] for _ in range(9)
    ]
    torch.rand(5)
    again = [
        draw_switches(6, 0.4, stream) for stream in [torch_generator(1, "a")] for _ in range(9)
    ]
    other = [
        draw_switches(6, 0.4, stream) for stream in [torch_generator(2, "a")] for _ in range(9)
    ]
    assert first == again
    assert first != other


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "kinds", "blocks"),
    [
        ("vit.layers.{}.attention.{}", ("q_proj", "v_proj"), 12),
        ("bert.encoder.layer.{}.attention.self.{}", ("query", "key", "value"), 12),
        ("roberta.encoder.layer.{}.attention.self.{}", ("query", "value"), 24),
        ("distilbert.transformer.layer.{}.attention.{}", ("q_lin", "v_lin"), 6),
        ("transformer.h.{}.attn.{}", ("c_attn",), 12),
        ("layers.{}.{}", ("q", "v"), 3),
    ],
)
def test_modules_are_grouped_by_their_block(
    pattern: str, kinds: tuple[str, ...], blocks: int
) -> None:
    """Blocks 1, 10 and 11 begin alike, and modules may come in any order."""
    names = [pattern.format(block, kind) for kind in kinds for block in reversed(range(blocks))]
    groups = group_by_block({name: name for name in names})
    expected = {frozenset(pattern.format(block, kind) for kind in kinds) for block in range(blocks)}
    assert {frozenset(group) for group in groups} == expected
    assert len(groups) == blocks


@pytest.mark.parametrize(
    ("patterns", "blocks"),
    [
        (
            (
                "clip.text_model.encoder.layers.{}.self_attn.q_proj",
                "clip.vision_model.encoder.layers.{}.self_attn.q_proj",
            ),
            12,
        ),
        (
            (
                "t5.encoder.block.{}.layer.0.SelfAttention.q",
                "t5.decoder.block.{}.layer.0.SelfAttention.q",
            ),
            6,
        ),
        (("bart.encoder.layers.{}.self_attn.q_proj", "bart.decoder.layers.{}.fc1"), 6),
    ],
)
def test_two_stacks_have_blocks_of_their_own(patterns: tuple[str, ...], blocks: int) -> None:
    names = [pattern.format(block) for pattern in patterns for block in range(blocks)]
    assert len(group_by_block({name: name for name in names})) == 2 * blocks


def test_self_and_cross_attention_of_a_decoder_block_share_a_switch() -> None:
    names = ["t5.decoder.block.3.layer.0.SelfAttention.q", "t5.decoder.block.3.layer.1.EncDec.q"]
    assert len(group_by_block({name: name for name in names})) == 1


def test_a_module_outside_all_blocks_is_a_block_of_its_own() -> None:
    groups = group_by_block({"vit.projection": 1, "vit.layers.0.q": 2, "vit.pooler": 3})
    assert sorted(groups) == [[1], [2], [3]]


# --- a real model ---------------------------------------------------------------------------------


def awake_state(model: AdaptedBackbone, task: LabelledTask) -> dict[str, Tensor]:
    """A state whose every factor is at work."""
    state = model.initial((task,), seed=0)
    stream = torch.Generator().manual_seed(2)
    return {name: t + 0.3 * torch.randn(t.shape, generator=stream) for name, t in state.items()}


@pytest.fixture(scope="module", params=["image", "text"])
def loaded(
    request: pytest.FixtureRequest,
    vit_folder: Path,
    bert_folder: Path,
    picture_rows: Features,
    empty_task: MakeTask,
) -> tuple[AdaptedBackbone, Batch]:
    """An adapted ViT and an adapted BERT of 4 blocks, each with a batch."""
    folder = vit_folder if request.param == "image" else bert_folder
    backbone = load_backbone(Backbone(path=str(folder)), request.param, "cpu")
    model = AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0))
    task = empty_task(request.param)
    model.load(awake_state(model, task), 2, task)
    if request.param == "image":
        batch = picture_rows.batch(torch.arange(8), torch.device("cpu"))
    else:
        tokens = backbone.preprocessor.tool(
            ["the film was good", "this book is very dull"], padding=True, return_tensors="pt"
        )
        batch = Batch(dict(tokens), torch.tensor([0, 2]))
    model.module.eval()
    return model, batch


def loss_of(model: AdaptedBackbone, batch: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(model.logits(batch), batch.labels)


def factors_by_block(model: AdaptedBackbone) -> list[dict[str, torch.nn.Parameter]]:
    """The factors of blocks 0 to 3, found by name, apart from the code under test."""
    factors: list[dict[str, torch.nn.Parameter]] = [{}, {}, {}, {}]
    for name, parameter in model.parameters().items():
        if not name.startswith("head."):
            block = int(next(part for part in name.split(".") if part.isdigit()))
            factors[block][name] = parameter
    return factors


def graph_nodes(loss: Tensor) -> list[Any]:
    """Every node of the autograd graph."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return list(seen)


def test_a_block_has_one_switch_for_all_its_modules(loaded: tuple[AdaptedBackbone, Batch]) -> None:
    model, _ = loaded
    assert [len(block) for block in model.blocks] == [2, 2, 2, 2]
    for block, factors in zip(model.blocks, factors_by_block(model), strict=True):
        slots = {id(layer.lora_A["rank2"].weight) for layer in block}
        assert slots == {id(p) for name, p in factors.items() if ".lora_A." in name}


@pytest.mark.parametrize("switches", [[True, False, True, False], [False, False, False, True]])
def test_grads_of_blocks_that_are_off_are_none(
    loaded: tuple[AdaptedBackbone, Batch], switches: list[bool]
) -> None:
    model, batch = loaded
    model.module.zero_grad(set_to_none=True)
    with switched(model.blocks, switches):
        loss_of(model, batch).backward()
    for on, factors in zip(switches, factors_by_block(model), strict=True):
        for name, parameter in factors.items():
            if on:
                assert parameter.grad is not None, name
                assert bool(parameter.grad.any()), name
            else:
                assert parameter.grad is None, name
    model.module.zero_grad(set_to_none=True)


def test_a_skipped_branch_is_as_if_its_b_were_zero(loaded: tuple[AdaptedBackbone, Batch]) -> None:
    """The frozen layer runs on, and there is no inverse scaling of the blocks that stay."""
    model, batch = loaded
    switches = [True, False, True, False]
    with torch.no_grad(), switched(model.blocks, switches):
        skipped = model.logits(batch)
    state = model.state()
    for on, factors in zip(switches, factors_by_block(model), strict=True):
        for name, parameter in factors.items():
            if not on and ".lora_B." in name:
                with torch.no_grad():
                    parameter.zero_()
    with torch.no_grad():
        zeroed = model.logits(batch)
        for name, parameter in model.parameters().items():
            parameter.copy_(state[name])
        whole = model.logits(batch)
    torch.testing.assert_close(skipped, zeroed, rtol=0, atol=1e-6)
    assert float((skipped - whole).abs().max()) > 1e-3


def test_skipped_branches_add_no_autograd_nodes(loaded: tuple[AdaptedBackbone, Batch]) -> None:
    model, batch = loaded
    whole = len(graph_nodes(loss_of(model, batch)))
    sizes = []
    for on in range(1, 4):
        with switched(model.blocks, [False] * (4 - on) + [True] * on):
            sizes.append(len(graph_nodes(loss_of(model, batch))))
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < whole


@pytest.mark.parametrize("lowest", [0, 1, 2, 3])
def test_backward_ends_at_the_lowest_block_that_is_on(
    loaded: tuple[AdaptedBackbone, Batch], lowest: int
) -> None:
    model, batch = loaded
    entering: dict[int, bool] = {}

    def note(block: int, inputs: tuple[Tensor, ...]) -> None:
        entering[block] = inputs[0].requires_grad

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, block=block: note(block, inputs))
        for block, layers in enumerate(model.blocks)
        for layer in layers
    ]
    switches = [block in (lowest, 3) for block in range(4)]
    try:
        with switched(model.blocks, switches):
            loss = loss_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert entering == {block: block > lowest for block in range(4)}
    reached = {getattr(node, "variable", None) for node in graph_nodes(loss)}
    for block, factors in enumerate(factors_by_block(model)):
        assert (set(factors.values()) <= reached) == switches[block]


def logits_now(model: AdaptedBackbone, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.logits(batch)


def test_every_branch_is_on_again_afterwards(loaded: tuple[AdaptedBackbone, Batch]) -> None:
    model, batch = loaded
    before = logits_now(model, batch)
    with switched(model.blocks, [False, True, False, False]):
        assert not torch.equal(logits_now(model, batch), before)
    assert torch.equal(logits_now(model, batch), before)


def test_every_branch_is_on_again_after_an_exception(
    loaded: tuple[AdaptedBackbone, Batch],
) -> None:
    model, batch = loaded
    before = logits_now(model, batch)
    with pytest.raises(RuntimeError, match="the step failed"), switched(model.blocks, [False] * 4):
        raise RuntimeError("the step failed")
    assert torch.equal(logits_now(model, batch), before)


def test_factors_stay_trainable_after_having_been_off(
    loaded: tuple[AdaptedBackbone, Batch],
) -> None:
    model, _ = loaded
    with switched(model.blocks, [False, True, False, True]):
        assert all(parameter.requires_grad for parameter in model.parameters().values())
    assert all(parameter.requires_grad for parameter in model.parameters().values())


def test_a_switch_too_few_is_refused(loaded: tuple[AdaptedBackbone, Batch]) -> None:
    model, _ = loaded
    with pytest.raises(ValueError, match="shorter"), switched(model.blocks, [True] * 3):
        pass


# --- training with and without --------------------------------------------------------------------

RUN = LocalRun(seed=4, first_step=0, steps=6, total_steps=12, trains=("lora_A", "lora_B", "head"))
TRAIN = Train(learning_rate=0.02, batch_size=8)
OFF = Copra(enabled=False)
ON = Copra(enabled=True, initial=0.0, ramp=1.0)


@dataclass(frozen=True)
class Trainee:
    """A tiny ViT with rows of its own, trained always from the same start."""

    model: AdaptedBackbone
    task: LabelledTask
    rows: Features

    @property
    def start(self) -> dict[str, Tensor]:
        return awake_state(self.model, self.task)

    def trained(self, copra: Copra, run: LocalRun = RUN, train: Train = TRAIN) -> dict[str, Tensor]:
        """Return the state that training leaves."""
        self.model.load(self.start, 2, self.task)
        train_locally(self.model, self.rows, run, train, copra)
        return self.model.state()


@pytest.fixture(scope="module")
def vit(vit_folder: Path, picture_rows: Features, empty_task: MakeTask) -> Trainee:
    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    model = AdaptedBackbone(backbone, Adapter(rank=2, alpha=3.0))
    return Trainee(model, empty_task("image"), picture_rows)


@pytest.fixture
def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every training batch, in order."""
    seen: list[list[int]] = []
    plain = Features.batch

    def note(self: Features, rows: Tensor, device: torch.device) -> Batch:
        seen.append(rows.tolist())
        return plain(self, rows, device)

    monkeypatch.setattr(Features, "batch", note)
    return seen


def test_copra_changes_training_but_neither_batches_nor_start(
    vit: Trainee, seen_batches: list[list[int]]
) -> None:
    start = digest(vit.start)
    without = vit.trained(OFF)
    batches_without = list(seen_batches)
    seen_batches.clear()
    dropped = vit.trained(ON)
    assert len(batches_without) == RUN.steps
    assert seen_batches == batches_without
    assert digest(without) != digest(dropped)
    assert digest(vit.start) == start


def test_a_schedule_that_is_over_changes_nothing(vit: Trainee) -> None:
    """The global step counts: late rounds are ordinary training, to the bit."""
    late = LocalRun(RUN.seed, first_step=9, steps=3, total_steps=12, trains=RUN.trains)
    copra = Copra(enabled=True, initial=0.0, ramp=0.75)
    plain = vit.trained(OFF, late)
    assert digest(vit.trained(copra, late)) == digest(plain)


def test_a_ramp_over_the_round_starts_anew_in_every_round(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        "clients.training.draw_switches",
        lambda blocks, probability, _: asked.append(probability) or [True] * blocks,
    )
    late = LocalRun(RUN.seed, first_step=20, steps=4, total_steps=24, trains=RUN.trains)
    schedule = {"enabled": True, "initial": 0.2, "ramp": 1.0}
    vit.trained(Copra(**schedule, over="round"), late)
    assert asked == pytest.approx([0.2, 0.4, 0.6, 0.8])
    asked.clear()
    vit.trained(Copra(**schedule), late)
    assert asked == pytest.approx([0.2 + 0.8 * step / 24 for step in (20, 21, 22, 23)])


def test_switches_differ_between_clients_and_rounds_and_repeat_for_one(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[bool]] = []

    def note(blocks: int, probability: float, stream: torch.Generator) -> list[bool]:
        drawn.append(draw_switches(blocks, probability, stream))
        return drawn[-1]

    monkeypatch.setattr("clients.training.draw_switches", note)

    def of_seed(seed: int) -> list[list[bool]]:
        drawn.clear()
        run = LocalRun(seed, first_step=0, steps=12, total_steps=24, trains=RUN.trains)
        vit.trained(ON, run)
        return list(drawn)

    first = of_seed(4)
    assert len(first) == 12
    assert of_seed(4) == first
    assert of_seed(5) != first


def test_an_adapter_that_is_off_takes_no_optimiser_step(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither momentum nor weight decay moves it, and its own step count stands still."""
    pattern = iter([[True, True, True, True], *[[True, False, True, False]] * 5])
    monkeypatch.setattr("clients.training.draw_switches", lambda *_: next(pattern))
    optimisers: list[torch.optim.AdamW] = []
    plain: Callable[..., torch.optim.AdamW] = torch.optim.AdamW

    def note(*args: Any, **kwargs: Any) -> torch.optim.AdamW:
        optimisers.append(plain(*args, **kwargs))
        return optimisers[-1]

    monkeypatch.setitem(training._OPTIMISERS, "adamw", note)
    decaying = Train(learning_rate=0.02, batch_size=8, weight_decay=0.5)
    six = vit.trained(ON, train=decaying)
    (optimiser,) = optimisers
    state = optimiser.state
    steps = [
        {int(state[p]["step"]) for p in factors.values()} for factors in factors_by_block(vit.model)
    ]
    assert steps == [{6}, {1}, {6}, {1}]

    one_step = LocalRun(RUN.seed, first_step=0, steps=1, total_steps=12, trains=RUN.trains)
    monkeypatch.setattr("clients.training.draw_switches", lambda *_: [True] * 4)
    one = vit.trained(ON, one_step, decaying)
    for block, factors in enumerate(factors_by_block(vit.model)):
        for name in factors:
            assert torch.equal(six[name], one[name]) == (block in (1, 3)), name


def test_evaluation_sees_every_block_in_the_midst_of_training(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps whose blocks are mostly off, the model answers as a whole."""
    batch = vit.rows.batch(torch.arange(8), torch.device("cpu"))
    midway: list[tuple[dict[str, Tensor], Tensor]] = []
    plain_step = torch.optim.AdamW.step

    def step_and_evaluate(optimiser: torch.optim.AdamW) -> None:
        plain_step(optimiser)
        midway.append((vit.model.state(), logits_now(vit.model, batch)))

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_evaluate)
    monkeypatch.setattr("clients.training.draw_switches", lambda *_: [False, False, True, False])
    vit.trained(ON)
    assert len(midway) == RUN.steps
    for state, answer in midway:
        vit.model.load(state, 2, vit.task)
        assert torch.equal(answer, logits_now(vit.model, batch))


@pytest.mark.parametrize("head", [("head",), ()])
def test_a_step_goes_down_the_loss_of_the_blocks_that_are_on(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch, head: tuple[str, ...]
) -> None:
    """One step of SGD, against the gradient of the model whose other B are zero.

    So nothing is added to the loss, no branch is scaled for the others, and the rate is the usual.
    """
    switches = [True, False, False, True]
    monkeypatch.setattr("clients.training.draw_switches", lambda *_: switches)
    vit.model.load(vit.start, 2, vit.task)
    blocks = factors_by_block(vit.model)
    off = [n for on, fs in zip(switches, blocks, strict=True) if not on for n in fs]
    zeroed = {n: 0 * t if n in off and "lora_B" in n else t for n, t in vit.start.items()}
    vit.model.load(zeroed, 2, vit.task)
    loss_of(vit.model, vit.rows.batch(torch.arange(len(vit.rows)), torch.device("cpu"))).backward()
    gradients = {n: p.grad for n, p in vit.model.parameters().items()}

    trains = ("lora_A", "lora_B", *head)
    plain = Train(learning_rate=0.5, batch_size=len(vit.rows), optimiser="sgd", max_grad_norm=1e9)
    run = LocalRun(RUN.seed, first_step=0, steps=1, total_steps=12, trains=trains)
    vit.model.load(vit.start, 2, vit.task)
    trained = train_locally(vit.model, vit.rows, run, plain, ON)
    assert trained.total_rate == 0.5
    for name, tensor in vit.model.state().items():
        gradient = gradients[name]
        assert gradient is not None
        moves = name not in off and (name.split(".")[0] != "head" or bool(head))
        expected = vit.start[name] - 0.5 * gradient * moves
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
        assert moves == (not torch.equal(tensor, vit.start[name]))


def test_without_a_head_there_is_something_to_train_at_every_step(vit: Trainee) -> None:
    """A trained head would hide a step whose blocks are all off; backward fails without one."""
    run = LocalRun(RUN.seed, first_step=0, steps=6, total_steps=10**6, trains=("lora_A", "lora_B"))
    trained = vit.trained(ON, run)
    assert digest(trained) != digest(vit.start)
    for name, tensor in trained.items():
        assert name.split(".")[0] != "head" or torch.equal(tensor, vit.start[name])


def test_switches_hold_until_the_backward_pass_is_over(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing runs forward again there, and must find the same blocks."""
    drawn: list[list[bool]] = []
    during: list[list[bool]] = []

    def note(blocks: int, probability: float, stream: torch.Generator) -> list[bool]:
        drawn.append(draw_switches(blocks, 0.5, stream))
        return drawn[-1]

    def look(_: Tensor) -> None:
        blocks = vit.model.blocks
        during.append([not any(m.disable_adapters for m in block) for block in blocks])

    monkeypatch.setattr("clients.training.draw_switches", note)
    vit.model.load(vit.start, 2, vit.task)
    bias = next(p for n, p in vit.model.parameters().items() if n.startswith("head."))
    bias.requires_grad_(True)
    hook = bias.register_hook(look)
    try:
        vit.trained(ON)
    finally:
        hook.remove()
    assert len(during) == RUN.steps
    assert during == drawn
    assert any(not all(switches) for switches in drawn)


@pytest.mark.parametrize(("whole", "steps"), [(0.0, 0), (0.25, 2), (0.3, 3), (1.0, 8)])
def test_the_last_steps_of_a_round_can_be_taken_with_every_block_on(
    vit: Trainee, monkeypatch: pytest.MonkeyPatch, whole: float, steps: int
) -> None:
    """So that what is sent has run together, however low p still is (specification 7.9)."""
    off: list[int] = []
    monkeypatch.setattr("clients.training.draw_switches", lambda *_: [True, False, False, False])
    optimiser_step = torch.optim.AdamW.step

    def note(optimiser: torch.optim.AdamW) -> None:
        off.append(sum(p.grad is None for p in optimiser.param_groups[0]["params"]))
        optimiser_step(optimiser)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    run = LocalRun(RUN.seed, first_step=8, steps=8, total_steps=800, trains=RUN.trains)
    vit.trained(Copra(enabled=True, initial=0.0, whole=whole), run)
    # Three blocks of two modules with two factors each.
    assert off == [12] * (8 - steps) + [0] * steps
