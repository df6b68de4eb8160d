"""Soft prompts of a CLIP: composed towers equal the stock ones; prompts stand where they should."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.captions import Captions, caption_ids, no_past, past_of, shared_tokens
from common.config import Adapter, Backbone, Prompt
from common.errors import ConfigError, UpdateRefusedError
from common.features import Features
from common.models import load_model
from common.prompted_clip import PromptedClip, load_clip, picture_state
from common.tasks import LabelledTask

NAMES = ("cat", "big dog", "seven")


@pytest.fixture
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return replace(empty_task("image"), class_names=NAMES)


def prompted(folder: Path, **settings: Any) -> PromptedClip:
    adapter = Adapter(kind="prompt", prompt=Prompt(**settings))
    model = load_model(Backbone(path=str(folder)), "image", adapter, "cpu")
    assert isinstance(model, PromptedClip)
    return model


def moved(state: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {n: t + 0.5 * torch.randn(t.shape, generator=stream) for n, t in state.items()}


def all_rows(model: PromptedClip, rows: Features) -> Any:
    return rows.batch(torch.arange(len(rows)), model.device)


def test_the_picture_tower_without_a_prompt_is_the_stock_one(
    clip_folder: Path, picture_rows: Features
) -> None:
    towers = load_clip(Backbone(path=str(clip_folder)), "image", "cpu").towers
    pixels = picture_rows.batch(torch.arange(4), torch.device("cpu")).inputs["pixel_values"]
    with torch.no_grad():
        stock = towers.get_image_features(pixel_values=pixels).pooler_output
        mine = towers.visual_projection(picture_state(towers.vision_model, pixels, None))
    assert torch.equal(mine, stock)


# Three captions that begin with the same four tokens; the last has its end sixth, not eighth.
IDS = torch.tensor(
    [[0, 14, 15, 16, 17, 20, 21, 1], [0, 14, 15, 16, 5, 6, 7, 1], [0, 14, 15, 16, 19, 1, 2, 2]]
)
ENDS = torch.tensor([7, 7, 5])


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_the_text_tower_without_a_prompt_is_the_stock_one(clip_folder: Path, shared: int) -> None:
    # In float64: what is left out or done once must not be an approximation.
    towers = load_clip(Backbone(path=str(clip_folder)), "image", "cpu").towers.double()
    words = towers.text_model.embeddings.token_embedding(IDS)
    captions = Captions(words, torch.zeros(3, 0, dtype=torch.int64), ENDS, shared)
    nothing, empty = no_past(towers.text_model, 1), words.new_zeros(1, 1, 0, 12)
    with torch.no_grad():
        stock = towers.text_model(input_ids=IDS).pooler_output
        [mine], past = captions.states(towers.text_model, empty, nothing)
        torch.testing.assert_close(mine, stock, rtol=1e-12, atol=1e-12)
        # The same from any shared token on.
        for start in range(shared + 1):
            before = [(keys[:, :, :start], values[:, :, :start]) for keys, values in past]
            [again], _ = captions.states(towers.text_model, empty, before, start)
            torch.testing.assert_close(again, stock, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_through_the_text_tower_are_those_of_the_stock_blocks(
    clip_folder: Path, own: bool
) -> None:
    towers = load_clip(Backbone(path=str(clip_folder)), "image", "cpu").towers.double()
    tower = towers.text_model
    stream = torch.Generator().manual_seed(0)
    context = torch.randn(2, 3 if own else 1, 2, 12, generator=stream, dtype=torch.float64)
    wanted = torch.randn(2, 3, 12, generator=stream, dtype=torch.float64)
    slots = torch.tensor([[2, 3]]).expand(3, -1)

    def stock(context: Tensor) -> Tensor:
        words = tower.embeddings.token_embedding(IDS).expand(2, -1, -1, -1).clone()
        words[:, :, 2:4] = context
        hidden = tower.embeddings(inputs_embeds=words.flatten(0, 1))
        states = tower.encoder(inputs_embeds=hidden, attention_mask=None, is_causal=True)
        normed = tower.final_layer_norm(states.last_hidden_state).unflatten(0, (2, 3))
        return normed[:, torch.arange(3), ENDS]

    words = tower.embeddings.token_embedding(IDS)
    captions = Captions(words, slots, ENDS, shared=1 if own else 4)

    def mine(context: Tensor) -> Tensor:
        return captions.states(tower, context, no_past(tower, 2))[0]

    slopes = []
    for states in (stock, mine):
        leaf = context.clone().requires_grad_()
        (states(leaf) * wanted).sum().backward()  # type: ignore[no-untyped-call]
        slopes.append(leaf.grad)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-10, atol=1e-12)


def test_every_token_attends_to_the_prefix_which_has_no_position(clip_folder: Path) -> None:
    tower = load_clip(Backbone(path=str(clip_folder)), "image", "cpu").towers.double().text_model
    heads = tower.config.num_attention_heads
    prefix = torch.randn(len(tower.encoder.layers), 2, 3, 12, dtype=torch.float64)

    def by_head(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (heads, -1)).transpose(-2, -3)

    # Caption by caption and token by token, from the formula.
    expected = []
    for ids, end in zip(IDS, ENDS, strict=True):
        hidden = tower.embeddings(input_ids=ids[None])[0]
        for block, (more_keys, more_values) in zip(tower.encoder.layers, prefix, strict=True):
            attention, normed = block.self_attn, block.layer_norm1(hidden)
            queries = by_head(attention.q_proj(normed))
            keys = by_head(torch.cat([more_keys, attention.k_proj(normed)]))
            values = by_head(torch.cat([more_values, attention.v_proj(normed)]))
            found = []
            for token in range(len(ids)):
                scores = queries[:, token, None] @ keys[:, : 3 + token + 1].mT
                weights = (scores / queries.shape[-1] ** 0.5).softmax(dim=-1)
                found.append((weights @ values[:, : 3 + token + 1])[:, 0].flatten())
            hidden = hidden + attention.out_proj(torch.stack(found))
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        expected.append(tower.final_layer_norm(hidden)[end])

    words = tower.embeddings.token_embedding(IDS)
    empty = words.new_zeros(2, 1, 0, 12)
    for shared in (0, 1, 4):
        captions = Captions(words, torch.zeros(3, 0, dtype=torch.int64), ENDS, shared)
        mine, _ = captions.states(tower, empty, past_of(tower, prefix, 2))
        for of_set in mine:
            torch.testing.assert_close(of_set, torch.stack(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "slots", "own", "expected"),
    [
        ([[0, 9, 9, 5, 1], [0, 9, 9, 6, 7, 1]], [[1, 2], [1, 2]], False, 3),
        ([[0, 9, 9, 5, 1], [0, 9, 9, 6, 7, 1]], [[1, 2], [1, 2]], True, 1),
        # A slot beside the same token in its own right.
        ([[0, 5, 1, 1], [0, 5, 1, 7, 1]], [[2], []], False, 2),
        # Captions that are alike throughout still have an end each.
        ([[0, 5, 6, 1], [0, 5, 6, 1]], [[], []], False, 3),
        ([[0, 5, 1], [0, 5, 6, 1]], [[], []], False, 2),
        ([[0, 9, 5, 1]], [[1]], True, 3),
    ],
)
def test_what_all_captions_begin_with(
    ids: list[list[int]], slots: list[list[int]], own: bool, expected: int
) -> None:
    assert shared_tokens(ids, slots, own) == expected


@pytest.mark.parametrize("ending", ["", "."])
def test_a_prompt_of_words_gives_the_logits_of_the_written_caption(
    clip_folder: Path, picture_rows: Features, task: LabelledTask, ending: str
) -> None:
    model = prompted(clip_folder, length=4, words="a photo of the", ending=ending)
    model.load(model.initial((task,), 0), 0, task)
    clip = load_clip(Backbone(path=str(clip_folder)), "image", "cpu")
    captions = [f"<start> a photo of the {name} {ending} <end>" for name in NAMES]
    words = clip.tokenizer.get_vocab()
    rows = [[words[word] for word in caption.split()] for caption in captions]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    batch = all_rows(model, picture_rows)
    with torch.no_grad():
        expected = clip.towers(input_ids=ids, pixel_values=batch.inputs["pixel_values"])
        torch.testing.assert_close(
            model.logits(batch), expected.logits_per_image, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("end", ["<start>", "*", "*", "*", "big", "dog", ".", "<end>"]),
        ("middle", ["<start>", "*", "big", "dog", "*", "*", ".", "<end>"]),
        ("front", ["<start>", "big", "dog", "*", "*", "*", ".", "<end>"]),
    ],
)
def test_vectors_stand_around_the_name(clip_folder: Path, place: Any, expected: list[str]) -> None:
    clip = load_clip(Backbone(path=str(clip_folder)), "image", "cpu")
    prompt = Prompt(length=3, class_at=place, ending=".")
    [ids], [slots] = caption_ids(clip.tokenizer, ["big dog"], prompt)
    words = clip.tokenizer.convert_ids_to_tokens(ids)
    assert ["*" if at in slots else word for at, word in enumerate(words)] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 3},
        {"length": 3, "class_at": "middle"},
        {"length": 3, "class_at": "front", "prompts": 2},
        {"length": 3, "class_specific": True},
        {"length": 2, "class_specific": True, "prompts": 2},
        {"length": 2, "visual": 2},
        {"length": 0, "visual": 2, "visual_blocks": 3},
        {"length": 0, "prefix": 2},
        {"length": 2, "prompts": 2, "prefix": 1, "visual": 1},
    ],
    ids=str,
)
def test_every_prompt_reaches_the_logits_and_nothing_else_is_trained(
    clip_folder: Path, picture_rows: Features, task: LabelledTask, settings: dict[str, Any]
) -> None:
    model = prompted(clip_folder, **settings)
    state = moved(model.initial((task,), 0))
    assert {n: t.shape for n, t in state.items()} == model.shapes(0, task)
    model.load(state, 0, task)
    logits = model.logits(all_rows(model, picture_rows))
    assert logits.shape == (len(picture_rows), len(NAMES))
    torch.nn.functional.cross_entropy(logits, picture_rows.labels).backward()
    for name, parameter in model.parameters().items():
        assert parameter.grad is not None, name
        by_vector = parameter.grad.flatten(0, -2).abs().amax(dim=-1)
        assert (by_vector > 0).all(), name  # no vector is without effect
    assert not any(p.requires_grad for p in model.module.parameters())
    torch.testing.assert_close(model.state(), state, rtol=0, atol=0)


def test_several_prompts_average_the_logits_of_each(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    both, one = prompted(clip_folder, length=3, prompts=2), prompted(clip_folder, length=3)
    state = moved(both.initial((task,), 0))
    batch = all_rows(both, picture_rows)
    with torch.no_grad():
        both.load(state, 0, task)
        together = both.logits(batch)
        alone = []
        for context in state["prompt.text"]:
            one.load({"prompt.text": context}, 0, task)
            alone.append(one.logits(batch))
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-5)


def test_a_context_of_its_own_for_each_class_with_equal_contexts_is_the_shared_one(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    shared = prompted(clip_folder, length=3)
    own = prompted(clip_folder, length=3, class_specific=True)
    context = moved(shared.initial((task,), 0))["prompt.text"]
    batch = all_rows(shared, picture_rows)
    with torch.no_grad():
        shared.load({"prompt.text": context}, 0, task)
        own.load({"head.toy.context": context.expand(3, -1, -1).clone()}, 0, task)
        torch.testing.assert_close(own.logits(batch), shared.logits(batch), rtol=1e-5, atol=1e-5)


def test_a_prompt_of_the_clients_own_is_averaged_with_the_shared_one(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    two, both = prompted(clip_folder, length=3, prompts=2), prompted(clip_folder, length=3)
    state = moved(two.initial((task,), 0))
    shared, local = state["prompt.text"]
    batch = all_rows(two, picture_rows)
    with torch.no_grad():
        two.load(state, 0, task)
        both.load({"prompt.text": shared, "local.text": local}, 0, task)
        torch.testing.assert_close(both.logits(batch), two.logits(batch), rtol=1e-5, atol=1e-5)
    assert list(both.parameters()) == ["local.text", "prompt.text"]


@pytest.mark.parametrize("settings", [{"length": 3}, {"length": 2, "visual": 1}], ids=str)
def test_embedded_once_or_at_every_step_is_the_same(
    clip_folder: Path, picture_rows: Features, task: LabelledTask, settings: dict[str, Any]
) -> None:
    model = prompted(clip_folder, **settings)
    model.load(moved(model.initial((task,), 0)), 0, task)
    past = model.past_stem(picture_rows)
    assert past.past_stem is model.has_stem
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(all_rows(model, past)),
            model.logits(all_rows(model, picture_rows)),
            rtol=1e-5,
            atol=1e-6,
        )


def test_kept_captions_follow_the_prompt(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    model = prompted(clip_folder, length=3)
    model.load(moved(model.initial((task,), 0)), 0, task)
    batch = all_rows(model, model.past_stem(picture_rows))
    with torch.no_grad():
        before = model.logits(batch)
        model.parameters()["prompt.text"].mul_(2)
        after = model.logits(batch)
        model.load(model.state(), 0, replace(task, class_names=("cat", "cat", "cat")))
        alike = model.logits(batch)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(alike, alike[:, :1].expand(-1, 3))


@pytest.mark.parametrize(
    "settings", [{"length": 3}, {"length": 3, "prompts": 2}, {"length": 3, "prefix": 2}], ids=str
)
@pytest.mark.parametrize("own", [False, True])
def test_hits_of_other_contexts_are_those_of_loading_them(
    clip_folder: Path,
    picture_rows: Features,
    task: LabelledTask,
    settings: dict[str, Any],
    own: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.prompted_clip._CAPTIONS_AT_ONCE", 7)  # two contexts at a time
    model = prompted(clip_folder, **settings)
    state = moved(model.initial((task,), 0))
    if own:
        state["local.text"] = moved(state, 6)["prompt.text"]
    model.load(state, 0, task)
    batch = all_rows(model, model.past_stem(picture_rows))
    stream = torch.Generator().manual_seed(1)
    contexts = torch.randn(5, *state["prompt.text"].shape, generator=stream)
    found = model.hits_of(batch, "prompt.text", contexts)
    assert not found.requires_grad
    for context, hits in zip(contexts, found, strict=True):
        model.load(state | {"prompt.text": context}, 0, task)
        with torch.no_grad():
            right = (model.logits(batch).argmax(dim=1) == batch.labels).sum()
        assert int(hits) == int(right)


@pytest.mark.parametrize("place", ["end", "middle", "front"])
@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_probe_takes_up_what_the_training_forward_left_before_the_position(
    clip_folder: Path, picture_rows: Features, task: LabelledTask, place: Any, position: int
) -> None:
    model = prompted(clip_folder, length=4, class_at=place)
    state = moved(model.initial((task,), 0))
    batch = all_rows(model, model.past_stem(picture_rows))
    copy = state["prompt.text"].clone()
    copy[position] *= -3
    model.load({"prompt.text": copy}, 0, task)
    with torch.no_grad():
        right = (model.logits(batch).argmax(dim=1) == batch.labels).sum()
    model.load(state, 0, task)
    model.logits(batch)
    tokens: list[int] = []
    first = model.module.get_submodule("text_model.encoder.layers.0.layer_norm1")
    hook = first.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    hits = model.hits_of(batch, "prompt.text", copy[None])
    hook.remove()
    assert hits.tolist() == [int(right)]
    # Of the shared tokens those from the position on; then three classes' own, one name of two.
    shared = {"end": 5, "middle": 3, "front": 1}[place]
    assert tokens == [max(0, shared - 1 - position) + 3 * (4 + 4 - shared)]


def test_a_probe_of_one_prompt_leaves_the_other_as_it_was_embedded(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    model = prompted(clip_folder, length=3)
    state = moved(model.initial((task,), 0))
    model.load(state | {"local.text": -state["prompt.text"]}, 0, task)
    batch = all_rows(model, model.past_stem(picture_rows))
    rows: list[int] = []
    first = model.module.get_submodule("text_model.encoder.layers.0.layer_norm1")
    hook = first.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    model.logits(batch)
    model.hits_of(batch, "prompt.text", 0.5 * state["prompt.text"][None])
    hook.remove()
    assert rows == [2, 1]


def test_hits_of_other_contexts_of_each_class(
    clip_folder: Path, picture_rows: Features, task: LabelledTask
) -> None:
    model = prompted(clip_folder, length=2, prompts=2, class_specific=True)
    state = moved(model.initial((task,), 0))
    model.load(state, 0, task)
    batch = all_rows(model, model.past_stem(picture_rows))
    contexts = torch.randn(3, 3, 2, 2, 12, generator=torch.Generator().manual_seed(1))
    found = model.hits_of(batch, "head.toy.context", contexts)
    for context, hits in zip(contexts, found, strict=True):
        model.load({"head.toy.context": context}, 0, task)
        with torch.no_grad():
            right = (model.logits(batch).argmax(dim=1) == batch.labels).sum()
        assert int(hits) == int(right)


@pytest.mark.parametrize("settings", [{"length": 0}, {"length": 2, "prompts": 2}], ids=str)
def test_hits_of_other_prefixes(
    clip_folder: Path, picture_rows: Features, task: LabelledTask, settings: dict[str, Any]
) -> None:
    model = prompted(clip_folder, prefix=2, **settings)
    state = moved(model.initial((task,), 0))
    model.load(state, 0, task)
    batch = all_rows(model, model.past_stem(picture_rows))
    stream = torch.Generator().manual_seed(1)
    prefixes = 3 * torch.randn(4, *state["prompt.prefix"].shape, generator=stream)
    found = model.hits_of(batch, "prompt.prefix", prefixes)
    for prefix, hits in zip(prefixes, found, strict=True):
        model.load(state | {"prompt.prefix": prefix}, 0, task)
        with torch.no_grad():
            right = (model.logits(batch).argmax(dim=1) == batch.labels).sum()
        assert int(hits) == int(right)
    assert len(set(found.tolist())) > 1


def test_visual_prompts_of_depth_replace_those_of_the_block_before(
    clip_folder: Path, picture_rows: Features
) -> None:
    tower = load_clip(Backbone(path=str(clip_folder)), "image", "cpu").towers.vision_model
    pixels = picture_rows.batch(torch.arange(2), torch.device("cpu")).inputs["pixel_values"]
    prompts = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    tokens: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        for block in tower.encoder.layers
    ]
    with torch.no_grad():
        deep, shallow = (
            picture_state(tower, pixels, prompts),
            picture_state(tower, pixels, prompts[:1]),
        )
    for hook in hooks:
        hook.remove()
    assert tokens == [7] * 6  # class token, two vectors, four patches
    assert not torch.allclose(deep, shallow)


def test_the_start_is_drawn_from_the_seed_alone(clip_folder: Path, task: LabelledTask) -> None:
    model = prompted(clip_folder, length=16)
    first, again = model.initial((task,), 0), model.initial((task,), 0)
    assert torch.equal(first["prompt.text"], again["prompt.text"])
    assert not torch.equal(first["prompt.text"], model.initial((task,), 1)["prompt.text"])
    assert not torch.equal(first["prompt.text"], model.initial((task,), 0, 1)["prompt.text"])
    assert float(first["prompt.text"].std()) == pytest.approx(0.02, rel=0.2)


def test_what_cannot_be_meant_is_refused(
    clip_folder: Path, vit_folder: Path, bert_folder: Path, task: LabelledTask
) -> None:
    model = prompted(clip_folder, length=22)
    model.load(model.initial((task,), 0), 0, task)
    rows = Features({"embeddings": torch.zeros(1, 8)}, torch.zeros(1), past_stem=True)
    batch = all_rows(model, rows)
    with pytest.raises(
        ConfigError, match=r"length = 22: the caption of class 'big dog' would .* 26"
    ):
        model.logits(batch)
    with pytest.raises(ConfigError, match=r"words = 'a photo of the' are 4 tokens"):
        prompted(clip_folder, length=2, words="a photo of the").initial((task,), 0)
    with pytest.raises(ConfigError, match=r"visual_blocks = 4: the picture tower has 3 blocks"):
        prompted(clip_folder, visual=1, visual_blocks=4)
    with pytest.raises(ConfigError, match=r"family 'vit'; adapter.kind = 'prompt' needs 'clip'"):
        load_clip(Backbone(path=str(vit_folder)), "image", "cpu")
    with pytest.raises(ConfigError, match="needs pictures; the task is of kind 'text'"):
        load_clip(Backbone(path=str(bert_folder)), "text", "cpu")
    model = prompted(clip_folder, length=3)
    with pytest.raises(UpdateRefusedError, match=r"prompt.text has shape \(2, 12\), not \(3, 12\)"):
        model.load({"prompt.text": torch.zeros(2, 12)}, 0, task)
