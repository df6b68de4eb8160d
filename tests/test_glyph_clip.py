"""glyph-clip: the shipped folder, the card's figures, and the script that made both."""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from common.config import Task
from common.errors import ConfigError
from common.package_files import package_file
from common.shipped import make_glyph_clip
from common.shipped.make_glyph_clip import (
    DIGITS,
    NAMES,
    Budget,
    PictureSet,
    Rows,
    captions,
    glyph_card,
    glyphs,
    main,
    make_tokenizer,
    matching_loss,
    merges_of,
    picture_pairs,
    read_picture_sets,
    scored_caption,
    standardised,
    train,
)
from common.tasks import load_tasks, open_picture

ROOT = Path(__file__).parent.parent
FOLDER = package_file("common/shipped/glyph-clip")


@pytest.fixture(scope="module")
def model() -> Any:
    return CLIPModel.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def card_figures(folder: Path) -> dict[str, float]:
    card = (folder / "README.md").read_text(encoding="utf-8")
    return {
        what: float(value) for what, value in re.findall(r"^\| (.+) \| ([\d.]+) \|$", card, re.M)
    }


# --- the shipped folder ---------------------------------------------------------------------------


def test_the_folder_is_small_and_goes_into_the_package() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["common"]
    packed = {file for glob in globs for file in (ROOT / "common").glob(glob)}
    assert {ROOT / "common" / "shipped" / "glyph-clip" / f.name for f in files} <= packed


def test_weights_are_stored_in_half_precision_and_load_in_single(model: Any) -> None:
    stored = (FOLDER / "model.safetensors").stat().st_size
    parameters = sum(weight.numel() for weight in model.parameters())
    assert 2 * parameters <= stored < 2.2 * parameters
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert f"A CLIP of {parameters:,} parameters" in (FOLDER / "README.md").read_text("utf-8")


def test_model_and_tokenizer_agree_on_special_tokens(model: Any, tokenizer: Any) -> None:
    config = model.config.text_config
    given = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == given
    assert config.eos_token_id != 2  # which CLIP takes to mean the largest id of the row
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length == 32


@torch.no_grad()
def test_both_towers_end_in_one_space_and_padding_changes_nothing(
    model: Any, tokenizer: Any
) -> None:
    texts = [scored_caption(name) for name in DIGITS]
    short = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
    padded = tokenizer(texts, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape == (10, 32)
    long = model.get_text_features(input_ids=padded["input_ids"])
    torch.testing.assert_close(short.pooler_output, long.pooler_output, atol=1e-4, rtol=1e-4)
    pictures = model.get_image_features(pixel_values=torch.randn(3, 1, 28, 28))
    assert (long.pooler_output.shape, pictures.pooler_output.shape) == ((10, 64), (3, 64))


def test_its_image_processor_prepares_pictures_as_in_training() -> None:
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil", local_files_only=True)
    [task] = load_tasks(Task(name="digits"))
    few = task.test.cut(slice(0, 20))
    pictures = [open_picture(picture) for picture in few.inputs]
    expected = standardised(few).images
    found = processor(images=pictures, input_data_format="none", return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], expected, atol=1e-5, rtol=0)


# --- the tokenizer --------------------------------------------------------------------------------


def test_words_of_training_are_single_tokens_and_come_back(tokenizer: Any) -> None:
    for name in dict.fromkeys(NAMES):
        for caption in captions(name):
            ids = tokenizer(caption)["input_ids"]
            assert len(ids) <= tokenizer.model_max_length
            words = re.findall(r"[a-z]+|[^a-z\s]", caption)
            assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [word + "</w>" for word in words]
            assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words)


def test_the_script_makes_the_shipped_vocabulary_again(tokenizer: Any) -> None:
    made = make_tokenizer(caption for name in NAMES for caption in captions(name))
    assert made.get_vocab() == tokenizer.get_vocab()


def test_the_most_frequent_pair_is_merged_first_and_of_equals_the_oldest() -> None:
    found = merges_of({"low": 2, "lower": 1, "ace": 1})
    assert found[:2] == [("l", "o"), ("lo", "w</w>")]
    # Once each, letters before what was merged, and `lo` before `ac`.
    rest = [("a", "c"), ("e", "r</w>"), ("w", "er</w>"), ("lo", "wer</w>"), ("ac", "e</w>")]
    assert found[2:] == rest


@pytest.mark.parametrize("text", ["aardvark", "ankle boot", "jumping fox 42", "zürich", "漢字"])
def test_any_text_is_spelled_without_a_loss(tokenizer: Any, text: str) -> None:
    begin, *ids, end = tokenizer(text)["input_ids"]
    assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {begin, end} & set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_case_does_not_matter(tokenizer: Any) -> None:
    assert tokenizer("The Letter K")["input_ids"] == tokenizer("the letter k")["input_ids"]


# --- the card -------------------------------------------------------------------------------------


def test_the_card_says_what_the_shipped_weights_score(model: Any, tokenizer: Any) -> None:
    measured = glyph_card(model, tokenizer, glyphs(), seed=0).figures
    told = card_figures(FOLDER)
    assert told.keys() == measured.keys()
    # Another processor may round differently: a few of 359 digits may change sides.
    assert told == pytest.approx(measured, abs=0.015)


def test_it_reads_handwriting_that_it_has_never_seen_far_better_than_by_chance() -> None:
    assert card_figures(FOLDER)["Handwritten digits, 10 classes"] > 0.35  # chance: 0.1


@pytest.mark.usefixtures("threads")
def test_the_script_measures_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_glyph_clip, "BATCH", 8)
    main(["--out", str(tmp_path), "--steps", "2", "--seed", "3"])
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in FOLDER.iterdir()}
    model, tokenizer = CLIPModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    measured = glyph_card(model.eval(), tokenizer, glyphs(), seed=3).figures
    assert card_figures(tmp_path) == pytest.approx(measured, abs=0.0005)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "make_glyph_clip --out FOLDER --seed 3 --steps 2\n" in card


# --- training -------------------------------------------------------------------------------------


def test_training_is_repeated_exactly_by_its_seed_and_leaves_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (train(glyphs(), Budget(2), seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.visual_projection.weight, other.visual_projection.weight)


def test_training_on_three_easy_classes_learns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank, left half and right half: a loss with wrong targets would not tell them apart."""
    monkeypatch.setattr(make_glyph_clip, "BATCH", 16)

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classes = torch.randint(3, (count,), generator=generator)
        images = torch.zeros(count, 1, 28, 28)
        images[classes == 1, :, :, :14] = 1
        images[classes == 2, :, :, 14:] = 1
        return images, classes

    names = ("nothing", "left", "right")
    trained = train(make_glyph_clip.Pairs(names, sample), Budget(80), seed=0)
    rows = Rows(*sample(60, torch.Generator().manual_seed(5)))
    found = make_glyph_clip.zero_shot_accuracy(trained.model, trained.tokenizer, names, rows)
    assert found == 1


def test_the_loss_is_clips_own_when_classes_differ(model: Any, tokenizer: Any) -> None:
    tokens = tokenizer([scored_caption(name) for name in DIGITS[:4]], return_tensors="pt")
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(**tokens, pixel_values=images, return_loss=True)
    ours = matching_loss(found.logits_per_image, torch.arange(4))
    torch.testing.assert_close(ours, found.loss)


def test_pictures_of_one_caption_are_right_in_equal_shares() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.5]])
    captions_of = functional.log_softmax(logits, dim=1)
    pictures_of = functional.log_softmax(logits, dim=0)
    expected = -(captions_of[0, 0] + captions_of[1, 1] + captions_of[2, 0]) / 3 / 2
    expected -= ((pictures_of[0, 0] + pictures_of[2, 0]) / 2 + pictures_of[1, 1]) / 2 / 2
    found = matching_loss(logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("budget", [(0, "steps"), (-1.0, "seconds")])
def test_a_budget_of_nothing_is_refused(budget: tuple[float, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"--{budget[1]} {budget[0]:g}: .* more than 0"):
        Budget(*budget)


def test_a_budget_of_seconds_ends() -> None:
    trained = train(glyphs(), Budget(0.2, "seconds"), seed=0)
    assert trained.steps >= 1
    assert trained.seconds >= 0.2


# --- pictures -------------------------------------------------------------------------------------


def write_pictures(folder: Path, classes: Sequence[str], count: int = 10) -> Path:
    """Write grey pictures whose brightness is their class's place."""
    for split in ("train", "test"):
        for place, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            pixels = np.full((30, 20, 3), 40 * place, dtype=np.uint8)
            for number in range(count):
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> tuple[PictureSet, ...]:
    numbers = write_pictures(tmp_path / "numbers", ["3", "7"])
    (numbers / "classes.json").write_text(json.dumps(["three", "seven"]))
    things = write_pictures(tmp_path / "things", ["ankle_boot", "bag", "shirt"])
    return read_picture_sets([numbers, things])


def test_classes_are_called_as_prompts_call_them(
    sets: tuple[PictureSet, ...], tmp_path: Path
) -> None:
    """By classes.json, or as their folders: a prompt asks for the names that were learned."""
    assert [given.names for given in sets] == [("three", "seven"), ("ankle boot", "bag", "shirt")]
    for folder, given in zip(("numbers", "things"), sets, strict=True):
        [task] = load_tasks(Task(path=str(tmp_path / folder), probe_examples=0))
        assert given.names == task.class_names
    assert scored_caption("seven") == "a photo of the digit seven"
    assert scored_caption("ankle boot") == "a photo of the ankle boot"
    assert sets[1].train.images.shape == (27, 1, 28, 28)  # less a tenth for validation
    assert len(sets[1].test.labels) == 30


def test_given_names_replace_those_of_folders(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clothes", ["0", "1"])
    [given] = read_picture_sets([folder], ["T-shirt/top, Trouser"])
    assert given.names == ("T-shirt/top", "Trouser")


def test_a_wrong_number_of_names_or_lists_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clothes", ["0", "1"])
    with pytest.raises(ConfigError, match=r"3 names for the 2 classes of .*clothes \(0, 1\)"):
        read_picture_sets([folder], ["a,b,c"])
    with pytest.raises(ConfigError, match="2 lists for the 1 of --pictures"):
        read_picture_sets([folder], ["a,b", "c,d"])


def test_held_out_classes_are_seen_neither_as_pictures_nor_as_names(
    sets: tuple[PictureSet, ...],
) -> None:
    pairs = picture_pairs(sets, ["seven", "bag"])
    assert pairs.names == ("three", "ankle boot", "shirt")
    images, classes = pairs.sample(500, torch.Generator().manual_seed(0))
    shade = {0: 0, 1: 0, 2: 80}  # what `write_pictures` gave 3, ankle_boot and shirt
    assert set(classes.tolist()) == set(shade)
    grey = (images.mean(dim=(1, 2, 3)) * make_glyph_clip.STD + make_glyph_clip.MEAN) * 255
    expected = torch.tensor([float(shade[label]) for label in classes.tolist()])
    torch.testing.assert_close(grey, expected, atol=0.1, rtol=0)
    tokenizer = make_tokenizer(text for name in pairs.names for text in captions(name))
    assert "boot</w>" in tokenizer.get_vocab()
    assert not {"seven</w>", "bag</w>"} & tokenizer.get_vocab().keys()


def test_a_whole_data_set_can_be_held_out(sets: tuple[PictureSet, ...]) -> None:
    assert picture_pairs(sets, ["three", "seven"]).names == ("ankle boot", "bag", "shirt")


def test_the_same_name_in_two_data_sets_is_one_class(sets: tuple[PictureSet, ...]) -> None:
    assert picture_pairs([sets[0], sets[0]], []).names == ("three", "seven")


def test_impossible_hold_outs_are_refused(sets: tuple[PictureSet, ...]) -> None:
    choices = "three, seven, ankle boot, bag, shirt"
    with pytest.raises(ConfigError, match=f"'boot': no class is called so; choose from {choices}"):
        picture_pairs(sets, ["boot"])
    with pytest.raises(ConfigError, match="leaves 1 classes; at least two"):
        picture_pairs(sets, ["three", "seven", "bag", "shirt"])


def test_rows_of_labels_are_renumbered_by_their_place() -> None:
    rows = Rows(torch.arange(5.0), torch.tensor([4, 0, 2, 0, 4])).of([2, 4])
    assert rows.images.tolist() == [0, 2, 4]
    assert rows.labels.tolist() == [1, 0, 1]


@pytest.mark.usefixtures("threads")
def test_the_script_trains_on_pictures_and_tells_held_out_classes_apart(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "things", ["bag", "hat", "key", "pen"])
    out = tmp_path / "clip"
    pictures = ["--pictures", str(folder), "--hold-out-classes", "key", "pen"]
    main(["--out", str(out), "--steps", "2", *pictures])
    assert card_figures(out).keys() == {
        "things, test rows, 2 classes trained on",
        "things, test rows, 2 classes held out",
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--seed 0 --steps 2 --pictures things --hold-out-classes key pen\n" in card
    assert "- things, held out: key, pen" in card


def test_a_mistake_on_the_command_line_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), "--hold-out-classes", "seven"])
    assert "--hold-out-classes need --pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
