"""Soft prompts of a ViT: composed blocks equal the stock ones; transfers fold; only they train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.training import LocalRun, train_locally
from common.backbones import load_backbone
from common.config import Adapter, Backbone, Copra, Experiment, Prompt, Train, Transfer
from common.errors import ConfigError, UpdateRefusedError
from common.features import Features
from common.models import load_model
from common.prompt_bank import BankEntry, save_entry
from common.prompt_transfer import BIAS, KEY_BIAS, TARGET, WEIGHT
from common.prompted_vit import VISUAL, PromptedVit, activated_neurons, class_state
from common.tasks import LabelledTask
from server.record import build_record
from server.reporting.report import FACTS
from server.simulation import simulate
from strategies.base import EVERYTHING

WIDTH, PATCHES = 16, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return empty_task("image")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of three source prompts: of the ViT's width, narrower, and one with a lost row 0."""
    folder = tmp_path_factory.mktemp("bank")
    stream = torch.Generator().manual_seed(0)

    def put(name: str, width: int, **said: Any) -> str:
        prompt = torch.randn(6, width, generator=stream)
        entry = BankEntry(name, prompt, backbone="toy", task=name, licence="CC0-1.0", **said)
        return str(save_entry(entry, folder))

    return {
        "same": put("same", WIDTH),
        "narrow": put("narrow", 12),
        "drifted": put("drifted", WIDTH, first_row="meaningless"),
    }


def prompted(folder: Path, visual: int = 0, visual_blocks: int = 1, **transfer: Any) -> PromptedVit:
    prompt = Prompt(length=0, visual=visual, visual_blocks=visual_blocks)
    adapter = Adapter(kind="prompt", prompt=prompt, transfer=Transfer(**transfer))
    model = load_model(Backbone(path=str(folder)), "image", adapter, "cpu")
    assert isinstance(model, PromptedVit)
    return model


def vit_of(folder: Path) -> Any:
    return load_backbone(Backbone(path=str(folder)), "image", "cpu").encoder.eval()


def pixels_of(rows: Features, count: int = 5) -> Tensor:
    return rows.batch(torch.arange(count), torch.device("cpu")).inputs["pixel_values"]


def moved(state: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {n: t + 0.3 * torch.randn(t.shape, generator=stream) for n, t in state.items()}


def all_logits(model: PromptedVit, rows: Features) -> Tensor:
    with torch.no_grad():
        return model.logits(rows.batch(torch.arange(len(rows)), model.device))


def stock_states(vit: Any, pixels: Tensor, inserted: Tensor, at: int) -> Tensor:
    """All last states of the stock model, vectors slipped in before its first block."""

    def slip_in(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        vectors = inserted.expand(len(hidden), -1, -1)
        return (torch.cat([hidden[:, :at], vectors, hidden[:, at:]], dim=1), *rest)

    hook = vit.layers[0].register_forward_pre_hook(slip_in)
    with torch.no_grad():
        states: Tensor = vit(pixel_values=pixels).last_hidden_state
    hook.remove()
    return states


def test_both_orders_are_the_stock_model_with_vectors_slipped_in(
    vit_folder: Path, picture_rows: Features
) -> None:
    vit, pixels = vit_of(vit_folder), pixels_of(picture_rows)
    prompt = 2 * torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    reference = stock_states(vit, pixels, prompt, at=0)[:, 7]
    with torch.no_grad():
        behind = class_state(vit, pixels, prompt[None])
        front = class_state(vit, pixels, prompt[None], "front")
        none = class_state(vit, pixels, None)
        turned = class_state(vit, pixels, prompt[None].flip(1))
        position = vit.embeddings.position_embeddings[:, :1]
        placed = class_state(vit, pixels, prompt[None] + position)
        stock = vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(front, reference, **TOLERANCE)
    torch.testing.assert_close(behind, reference, **TOLERANCE)
    torch.testing.assert_close(turned, reference, **TOLERANCE)
    assert torch.equal(none, stock)
    assert float((none - reference).abs().max()) > 0.01
    assert float((placed - reference).abs().max()) > 0.01


def test_deep_prompts_take_the_place_of_those_before(
    vit_folder: Path, picture_rows: Features
) -> None:
    vit, pixels = vit_of(vit_folder), pixels_of(picture_rows)
    prompts = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = vit.embeddings(pixels)
        for number, block in enumerate(vit.layers):
            # [P ; CLS ; patches], written out.
            if number == 0:
                hidden = torch.cat([prompts[:1].expand(5, -1, -1), hidden], dim=1)
            elif number < 3:
                hidden = torch.cat([prompts[number].expand(5, -1, -1), hidden[:, 2:]], dim=1)
            hidden = block(hidden, None)
        reference = vit.layernorm(hidden)[:, 2]
        for place in ("behind", "front"):
            found = class_state(vit, pixels, prompts, place)
            torch.testing.assert_close(found, reference, **TOLERANCE)


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "shallow": {"visual": 3},
    "deep": {"visual": 2, "visual_blocks": 4},
    "frozen": {"kind": "frozen", "sources": "same"},
    "projection": {"kind": "projection", "sources": "same"},
    "projection of a narrow source": {"kind": "projection", "sources": "narrow"},
    "attention": {"kind": "attention", "sources": "same", "length": 5, "concentrated": 3},
    "attention alone": {"kind": "attention", "sources": "narrow", "length": 4, "concentrated": 4},
    "as published": {
        "kind": "attention", "sources": "drifted", "length": 5, "concentrated": 3,
        "paper_exact": True,
    },
}  # fmt: skip


def made(folder: Path, bank: dict[str, str], name: str) -> PromptedVit:
    settings = dict(SETTINGS[name])
    if "sources" in settings:
        settings["sources"] = (bank[settings["sources"]],)
    return prompted(folder, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_step_trains_what_it_should_and_nothing_else(
    vit_folder: Path, bank: dict[str, str], picture_rows: Features, task: LabelledTask, name: str
) -> None:
    model = made(vit_folder, bank, name)
    start = model.initial((task,), 0)
    assert {n: t.shape for n, t in start.items()} == model.shapes(0, task)
    model.load(start, 0, task)
    frozen = {n: p.detach().clone() for n, p in model._vit.named_parameters()}
    source = model._transfer.source.clone() if model._transfer else None
    run = LocalRun(seed=0, first_step=0, steps=1, total_steps=1, trains=EVERYTHING)
    rows = model.past_stem(picture_rows)
    assert rows.past_stem == (name in ("linear", "frozen"))
    train_locally(model, rows, run, Train(optimiser="sgd", learning_rate=0.5), Copra())
    trained = model.state()
    for trained_name, before in start.items():
        # A bias of all keys adds the same to all scores of a query: softmax does not see it.
        if trained_name != KEY_BIAS:
            assert not torch.equal(trained[trained_name], before), trained_name
    for parameter_name, parameter in model._vit.named_parameters():
        assert torch.equal(parameter, frozen[parameter_name])
        assert parameter.grad is None
    if source is not None:
        assert torch.equal(model._transfer.source, source)
        assert model._transfer.source.grad is None
    assert not model._vit.training


@pytest.mark.parametrize("name", SETTINGS)
def test_a_transfer_folds_into_a_plain_prompt(
    vit_folder: Path, bank: dict[str, str], picture_rows: Features, task: LabelledTask, name: str
) -> None:
    model = made(vit_folder, bank, name)
    model.load(moved(model.initial((task,), 0)), 0, task)
    expected = all_logits(model, picture_rows)
    assert expected.shape == (len(picture_rows), 3)
    folded = model.folded()
    if VISUAL not in folded:
        assert name == "linear"
        return
    blocks, length, _ = folded[VISUAL].shape
    plain = prompted(vit_folder, visual=length, visual_blocks=blocks)
    plain.load(folded, 0, task)
    assert torch.equal(all_logits(plain, picture_rows), expected)


def test_the_identity_projection_is_the_frozen_transfer(
    vit_folder: Path, bank: dict[str, str], picture_rows: Features, task: LabelledTask
) -> None:
    frozen = prompted(vit_folder, kind="frozen", sources=(bank["same"],))
    projection = prompted(vit_folder, kind="projection", sources=(bank["same"],))
    head = frozen.initial((task,), 0)
    start = projection.initial((task,), 0)
    assert torch.equal(start[WEIGHT], torch.eye(WIDTH))
    frozen.load(head, 0, task)
    projection.load(start | head, 0, task)
    expected = all_logits(frozen, picture_rows)
    torch.testing.assert_close(all_logits(projection, picture_rows), expected, **TOLERANCE)
    embedded = frozen.past_stem(picture_rows)
    torch.testing.assert_close(all_logits(frozen, embedded), expected, **TOLERANCE)
    projection.load(start | head | {BIAS: torch.arange(WIDTH) / 4}, 0, task)
    assert float((all_logits(projection, picture_rows) - expected).abs().max()) > 1e-3


def test_a_row_that_means_nothing_stays_only_as_published(
    vit_folder: Path, bank: dict[str, str]
) -> None:
    sources = (bank["drifted"],)
    for kind in ("frozen", "projection"):
        assert prompted(vit_folder, kind=kind, sources=sources)._transfer.length == 5
        exact = prompted(vit_folder, kind=kind, sources=sources, paper_exact=True)
        assert exact._transfer.length == 6
    several = prompted(
        vit_folder, kind="attention", sources=(*sources, bank["same"]), length=4, concentrated=2
    )
    assert several._transfer.source.shape == (11, WIDTH)


def test_starts(vit_folder: Path, bank: dict[str, str], task: LabelledTask) -> None:
    model = prompted(vit_folder, visual=50)
    start = model.initial((task,), 0)
    bound = (6 / (14 * 14 + WIDTH)) ** 0.5
    assert 0.95 * bound < float(start[VISUAL].abs().max()) <= bound
    assert float(start["head.toy.classifier.weight"].abs().max()) <= WIDTH**-0.5
    assert torch.equal(model.initial((task,), 0)[VISUAL], start[VISUAL])
    assert not torch.equal(model.initial((task,), 1)[VISUAL], start[VISUAL])
    assert not torch.equal(model.initial((task,), 0, 1)[VISUAL], start[VISUAL])
    own = made(vit_folder, bank, "attention").initial((task,), 0)[TARGET]
    assert own.shape == (1, 2, WIDTH)
    assert float(own.abs().max()) <= bound


def test_patch_embeddings_are_what_the_first_block_gets(
    vit_folder: Path, picture_rows: Features
) -> None:
    model, vit = prompted(vit_folder), vit_of(vit_folder)
    found = model.patch_embeddings(picture_rows)
    assert found.shape == (len(picture_rows), PATCHES, WIDTH)
    weight = vit.embeddings.patch_embeddings.projection.weight.flatten(1)
    bias = vit.embeddings.patch_embeddings.projection.bias
    pixels = pixels_of(picture_rows, 1)[0]
    corner = pixels[:, :14, 14:].flatten()  # the second patch
    expected = weight @ corner + bias + vit.embeddings.position_embeddings[0, 2]
    torch.testing.assert_close(found[0, 1], expected.detach(), **TOLERANCE)


def test_neurons_that_a_prompt_activates(vit_folder: Path) -> None:
    vit = vit_of(vit_folder)
    prompt = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    found = activated_neurons(vit, prompt, blocks=2)
    assert (found.shape, found.dtype) == ((2 * 24,), torch.bool)
    assert 0 < int(found.sum()) < 48
    with torch.no_grad():
        hidden = torch.cat([prompt[None], vit.embeddings.cls_token], dim=1)
        for block in vit.layers[:2]:
            hidden = block(hidden, None)
        # The third block, written out up to its feed-forward layer.
        block = vit.layers[2]
        attended = block.attention(block.layernorm_before(hidden), None)[0] + hidden
        expected = block.mlp.fc1(block.layernorm_after(attended))[0, -1] > 0
    assert torch.equal(found[:24], expected)
    assert torch.equal(activated_neurons(vit, prompt.flip(0), blocks=2), found)
    assert not torch.equal(activated_neurons(vit, -prompt, blocks=2), found)
    with pytest.raises(ConfigError, match="5 blocks do not fit"):
        activated_neurons(vit, prompt, blocks=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "frozen"}, "needs sources"),
        ({"sources": ("x",)}, "no use for sources"),
        ({"kind": "projection", "sources": ("x", "y")}, "takes one of the 2"),
        ({"kind": "attention", "sources": ("x",), "length": 3, "concentrated": 4}, "more than"),
        ({"kind": "frozen", "sources": ("no such file",)}, "there is no file no such file"),
    ],
)
def test_transfers_that_cannot_be_meant(
    vit_folder: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        prompted(vit_folder, **settings)


def test_what_does_not_fit_the_model_is_refused(
    vit_folder: Path, clip_folder: Path, bert_folder: Path, bank: dict[str, str],
    task: LabelledTask,
) -> None:  # fmt: skip
    def load(folder: Path, adapter: Adapter) -> None:
        load_model(Backbone(path=str(folder)), "image", adapter, "cpu")

    with pytest.raises(ConfigError, match=r"prompt.length = 16 is for captions.*set it to 0"):
        load(vit_folder, Adapter(kind="prompt"))
    with pytest.raises(ConfigError, match=r"visual_blocks = 5: the ViT has 4"):
        prompted(vit_folder, visual=1, visual_blocks=5)
    with pytest.raises(ConfigError, match=r"width 12 has no place among vectors of width 16"):
        prompted(vit_folder, kind="frozen", sources=(bank["narrow"],))
    with pytest.raises(ConfigError, match=r"widths must be one, not narrow 12, same 16"):
        prompted(vit_folder, kind="attention", sources=(bank["narrow"], bank["same"]))
    transfer = Transfer(kind="frozen", sources=(bank["same"],))
    with pytest.raises(ConfigError, match="is a CLIP"):
        load(clip_folder, Adapter(kind="prompt", prompt=Prompt(length=0), transfer=transfer))
    with pytest.raises(ConfigError, match="of a CLIP nothing would be trained"):
        load(clip_folder, Adapter(kind="prompt", prompt=Prompt(length=0)))
    with pytest.raises(ValueError, match="makes the only prompt"):
        Adapter(kind="prompt", transfer=Transfer(kind="frozen", sources=("x",)))
    model = prompted(vit_folder, visual=2)
    with pytest.raises(UpdateRefusedError, match=VISUAL):
        model.load(model.initial((task,), 0) | {VISUAL: torch.zeros(1, 3, WIDTH)}, 0, task)


# --- federations ----------------------------------------------------------------------------------


def experiment_of(
    build: Callable[..., Experiment], bank: dict[str, str], name: str, **values: Any
) -> Experiment:
    settings = dict(SETTINGS[name])
    transfer = {k: v for k, v in settings.items() if not k.startswith("visual")}
    if transfer:
        transfer["sources"] = [bank[transfer["sources"]]]
    return build(
        adapter={
            "kind": "prompt",
            "prompt": {"length": 0, "visual": settings.get("visual", 0)},
            "transfer": transfer,
        },
        strategy__name="promptfl",
        **values,
    )


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("linear", "prompt, linear head alone"),
        ("shallow", "prompt, 3 a picture in 1 block"),
        ("frozen", "prompt, frozen transfer of same"),
        ("projection", "prompt, projection transfer of same"),
        ("attention", "prompt, attention transfer of same"),
    ],
)
def test_it_trains_in_a_federation(
    digits_experiment: Callable[..., Experiment], bank: dict[str, str], name: str, called: str
) -> None:
    experiment = experiment_of(digits_experiment, bank, name)
    [finished] = simulate([experiment], lambda *_: None)
    [model] = finished.outcomes.served
    last = finished.outcomes.rounds[-1]
    assert all(client["status"] == "ok" for client in last["clients"])
    sizes = {n: t.numel() for n, t in model.tensors.items()}
    head = sum(size for n, size in sizes.items() if n.startswith("head."))
    assert head == 10 * WIDTH + 10
    for client in last["clients"]:
        up = client["bytes"]["up"]
        assert up["head"] == 4 * head
        assert up.get("prompt", 0) + up.get("own", 0) == 4 * (sum(sizes.values()) - head)
    assert FACTS["Adapter"](build_record(finished, name)) == called


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("linear", {"nemesis__kind": "pun"}, "needs a prompt"),
        ("attention", {"nemesis__kind": "pun"}, "no use for nemesis.kind"),
        ("frozen", {"task__shifts": [{"name": "digits", "classes": "new"}]}, "use for task.shifts"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    digits_experiment: Callable[..., Experiment],
    bank: dict[str, str],
    name: str,
    values: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        experiment_of(digits_experiment, bank, name, **values)
