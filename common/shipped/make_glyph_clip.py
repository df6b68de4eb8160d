"""Train glyph-clip, the shipped image-text model: a small CLIP that has read a font, no pictures.

It learns to match the printable ASCII characters, drawn with Pillow's built-in scalable font (this
needs a Pillow with FreeType support) and distorted at random, with captions. Run as

    python -m common.shipped.make_glyph_clip --out FOLDER

The same recipe makes a small CLIP of labelled pictures, for experiments:

    python -m common.shipped.make_glyph_clip --out FOLDER --pictures mnist.zip clothes.zip
"""

import argparse
import itertools
import math
import platform
import shlex
import string
import textwrap
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from common.config import Task
from common.errors import ConfigError, FedcopraError
from common.seeds import child_seed, torch_generator
from common.shipped.make_glyph_vit import MEAN, SIZE, STD, draw_atlas, sample_glyphs, save
from common.tasks import Split, load_tasks, open_picture

WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS, POSITIONS = 64, 4, 2, 3, 32
BATCH, LR = 64, 3e-3
STEPS = 1600

# The ways to write what is to be seen: the second completes SCORED.
OTHER_FORMS = ("{}", "the {}", "a {}")
LETTER_FORMS = ("{}", "the letter {}", "a letter {}", "the character {}")
DIGIT_FORMS = ("{}", "the digit {}", "the number {}", "a {}")
SCORED = "a photo of {}"
# Of many lengths, so that a class name behind a long context stands where words have stood.
TEMPLATES = (
    SCORED,
    "{}",
    "{}.",
    "this is {}",
    "a drawing of {}.",
    "a small picture of {}",
    "a blurred scan of {}.",
    "a black and white photo of {}",
    "in white on a black background, {}",
    "a bad photo of {}, taken by somebody in a hurry.",
    "what you can see in the middle of this picture is {}",
    "a grey and noisy picture of few pixels, in which somebody has found {}",
    "if you look at it for long enough, and from the right side, this small picture shows you {}.",
    "nobody knows when or where or why it was made, but what we have here is a picture of {}",
    "one of many pictures in a large collection, no better and no worse than all of the others: {}",
)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIGNS = tuple(unicodedata.name(sign).lower() for sign in string.punctuation)
CHARACTERS = string.digits + string.ascii_letters + string.punctuation
NAMES = (*DIGITS, *string.ascii_letters.lower(), *SIGNS)  # of CHARACTERS

_FORMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(DIGITS, DIGIT_FORMS),
    **dict.fromkeys(string.ascii_lowercase, LETTER_FORMS),
}


def phrases(name: str) -> tuple[str, ...]:
    """Return the ways to write a name: `the digit seven`, `the letter k`, `the ankle boot`, ..."""
    return tuple(form.format(name) for form in _FORMS.get(name, OTHER_FORMS))


def scored_caption(name: str) -> str:
    """Return the one caption that accuracies are measured with: `a photo of the digit seven`."""
    return SCORED.format(phrases(name)[1])


def captions(name: str) -> list[str]:
    """Return every caption of a name."""
    return [template.format(phrase) for template in TEMPLATES for phrase in phrases(name)]


class Pairs(NamedTuple):
    """Training data: the names of the classes, and a draw from them.

    `sample(n, generator)` returns standardised pixels [n, 1, 28, 28] and classes [n].
    """

    names: tuple[str, ...]
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


# --- glyphs --------------------------------------------------------------------------------------


def glyphs() -> Pairs:
    """Return all characters; a letter's two cases are one class, look-alikes (0, O) stay two."""
    atlas = draw_atlas(CHARACTERS, duplicate=math.inf)
    names = tuple(dict.fromkeys(NAMES))
    class_of = torch.tensor([names.index(name) for name in NAMES])

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, characters = sample_glyphs(atlas, count, generator)
        return images, class_of[characters]

    return Pairs(names, sample)


# --- pictures ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Standardised pixels [n, 1, 28, 28] and labels [n]."""

    images: Tensor
    labels: Tensor

    def of(self, labels: Sequence[int]) -> "Rows":
        """Return the rows of these labels, renumbered by their place in `labels`."""
        found = self.labels[:, None] == torch.tensor(labels)
        kept = found.any(dim=1)
        return Rows(self.images[kept], found[kept].int().argmax(dim=1))


@dataclass(frozen=True)
class PictureSet:
    """One data set: its classes' names, in label order, and the rows that are used here."""

    name: str
    names: tuple[str, ...]
    train: Rows
    test: Rows


def standardised(split: Split) -> Rows:
    """Return pictures as grey, 28x28, standardised pixels."""
    grey = (open_picture(picture).convert("L") for picture in split.inputs)
    pixels = np.stack([np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for p in grey])
    images = torch.from_numpy(pixels).unsqueeze(1).float() / 255
    return Rows((images - MEAN) / STD, torch.from_numpy(split.labels))


def read_pictures(path: Path, class_names: Sequence[str] = ()) -> PictureSet:
    """Read a folder or zip of `train/<class>/<picture>` and `test/<class>/<picture>`.

    What `common.tasks` sets aside for validation is left out. Without `class_names` a class is
    called as prompts call it: by `classes.json`, or as its folder, `_` read as a space.

    Raises:
        ConfigError: no such path, or names that are not one a class.
        DataError: pictures that cannot be read.
    """
    [task] = load_tasks(Task(path=str(path), probe_examples=0))
    names = tuple(class_names) or task.class_names
    if len(names) != len(task.labels):
        raise ConfigError(
            f"--class-names: {len(names)} names for the {len(task.labels)} classes of {path} "
            f"({', '.join(task.labels)})"
        )
    return PictureSet(task.name, names, standardised(task.train), standardised(task.test))


def read_picture_sets(
    paths: Sequence[Path], class_names: Sequence[str] = ()
) -> tuple[PictureSet, ...]:
    """Read every data set; `class_names` has one comma-separated list for each, or is empty.

    Raises:
        ConfigError, DataError: as `read_pictures`; or another number of lists than of paths.
    """
    if class_names and len(class_names) != len(paths):
        raise ConfigError(
            f"--class-names: {len(class_names)} lists for the {len(paths)} of --pictures"
        )
    lists = class_names or [""] * len(paths)
    return tuple(
        read_pictures(path, [name.strip() for name in names.split(",") if name.strip()])
        for path, names in zip(paths, lists, strict=True)
    )


def picture_pairs(sets: Sequence[PictureSet], held_out: Sequence[str]) -> Pairs:
    """Return the training pictures of every class that is not held out; equal names are one class.

    Raises:
        ConfigError: a held-out name that no class has, or nothing left to train on.
    """
    known = tuple(dict.fromkeys(name for given in sets for name in given.names))
    if unknown := [name for name in held_out if name not in known]:
        raise ConfigError(
            f"--hold-out-classes {unknown[0]!r}: no class is called so; choose from "
            f"{', '.join(known)}"
        )
    names = tuple(name for name in known if name not in held_out)
    if len(names) < 2:
        raise ConfigError(
            f"--hold-out-classes leaves {len(names)} classes; at least two are needed"
        )
    kept = []
    for given in sets:
        if labels := [label for label, name in enumerate(given.names) if name in names]:
            rows = given.train.of(labels)
            places = torch.tensor([names.index(given.names[label]) for label in labels])
            kept.append(Rows(rows.images, places[rows.labels]))
    images, classes = (torch.cat(parts) for parts in zip(*kept, strict=True))

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(classes), (count,), generator=generator)
        return images[rows], classes[rows]

    return Pairs(names, sample)


# --- the model -----------------------------------------------------------------------------------


def merges_of(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make each word, given with its count, one token.

    The most frequent pair is merged first; of equal ones, that of the oldest tokens. (The library
    `tokenizers` does the same, but numbers letters that end a word in another order every time.)
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    pieces = {piece for spelling in spelled.values() for piece in spelling}
    age = {piece: place for place, piece in enumerate(sorted(pieces, key=lambda p: (len(p), p)))}
    merges: list[tuple[str, str]] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, spelling in spelled.items():
            for pair in itertools.pairwise(spelling):
                counts[pair] += words[word]
        if not counts:
            return merges
        first, second = min(counts, key=lambda pair: (-counts[pair], age[pair[0]], age[pair[1]]))
        merges.append((first, second))
        age.setdefault(first + second, len(age))
        for spelling in spelled.values():
            for at in range(len(spelling) - 1):
                if spelling[at : at + 2] == [first, second]:
                    spelling[at : at + 2] = [first + second]


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a CLIPTokenizer whose tokens are the words of `texts`, and every byte for the others.

    Tokens are in the order of OpenAI's vocabulary: bytes, bytes that end a word, merges, begin and
    end; the latter pads as well.
    """
    stock = CLIPTokenizer().backend_tokenizer
    words = Counter(
        word
        for text in sorted(set(texts))
        for word, _ in stock.pre_tokenizer.pre_tokenize_str(stock.normalizer.normalize_str(text))
    )
    merges = merges_of(words)
    alphabet = sorted(bytes_to_unicode().values())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges)]
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def make_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained CLIPModel for 28x28 pixels in one channel, patch 7."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    # From CLIP's own scale, 1, it learns slowly at this width: all pictures start out alike.
    text = {
        "initializer_factor": 2.0,
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "initializer_factor": 3.0,
        "num_hidden_layers": VISION_LAYERS,
        "image_size": SIZE,
        "patch_size": 7,
        "num_channels": 1,
    }
    config = CLIPConfig(
        text_config=tower | text, vision_config=tower | vision, projection_dim=WIDTH
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(child_seed(seed, "weights"))
        return CLIPModel(config)


def matching_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the loss of logits [n, m], n pictures by m captions, one a class; `classes` is [n].

    A caption's pictures are all right, in equal shares, as in UniCL (arXiv 2204.03610). With n = m
    different classes it is CLIP's own loss.
    """
    captions_of = functional.cross_entropy(logits, classes)
    shares = functional.one_hot(classes, logits.shape[1]).float()
    pictures_of = functional.cross_entropy(logits.T, (shares / shares.sum(dim=0)).T)
    return (captions_of + pictures_of) / 2


@dataclass(frozen=True)
class Budget:
    """How long to train: so many steps, or so many seconds of CPU time."""

    amount: float
    of: Literal["steps", "seconds"] = "steps"

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        if self.amount <= 0:
            raise ConfigError(f"{self}: training needs more than 0")

    def spent(self, step: int, seconds: float) -> float:
        """Return the share that is spent; all of it is 1."""
        return {"steps": step, "seconds": seconds}[self.of] / self.amount

    def __str__(self) -> str:
        """Return it as on the command line."""
        return f"--{self.of} {self.amount:g}"


class Trained(NamedTuple):
    """A model and what its training took."""

    model: Any
    tokenizer: Any
    steps: int
    seconds: float  # of CPU time


def train(pairs: Pairs, budget: Budget, seed: int) -> Trained:
    """Train a CLIP on batches of fresh pairs; only a budget of steps can be repeated exactly."""
    texts = [captions(name) for name in pairs.names]
    tokenizer = make_tokenizer(itertools.chain.from_iterable(texts))
    model = make_model(tokenizer, seed).train()
    generator = torch_generator(seed, "pairs")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    start, step, spent = time.process_time(), 0, 0.0
    while spent < 1:
        # Up over the first tenth, and down to nothing along a cosine.
        share = min((spent + 0.002) / 0.1, (1 + math.cos(math.pi * spent)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = LR * share
        images, classes = pairs.sample(BATCH, generator)
        present, classes = torch.unique(classes, return_inverse=True)
        # One template for all: the names are what tells these captions apart.
        draw = torch.rand((), generator=generator).item()
        batch = [texts[label][int(draw * len(texts[label]))] for label in present.tolist()]
        tokens = tokenizer(batch, padding=True, return_tensors="pt")
        loss = matching_loss(model(**tokens, pixel_values=images).logits_per_image, classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP's own training does
        step += 1
        spent = budget.spent(step, time.process_time() - start)
        if step % 200 == 0 or spent >= 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return Trained(model.eval(), tokenizer, step, time.process_time() - start)


@torch.no_grad()
def zero_shot_accuracy(model: Any, tokenizer: Any, names: Sequence[str], rows: Rows) -> float:
    """Return the share of rows whose label's scored caption is the nearest of all `names`."""
    texts = [scored_caption(name) for name in names]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    right = 0
    parts = (torch.split(tensor, 256) for tensor in rows)
    for images, labels in zip(*parts, strict=True):
        predicted = model(**tokens, pixel_values=images).logits_per_image.argmax(dim=1)
        right += int((predicted == labels).sum())
    return right / len(rows.labels)


# --- the folder ----------------------------------------------------------------------------------


class Card(NamedTuple):
    """What a model card says of one model of this script; `figures` are accuracies."""

    title: str
    about: str
    figures: Mapping[str, float]
    notes: str
    arguments: str  # of the command line, beside folder, seed and budget


def glyph_card(model: Any, tokenizer: Any, pairs: Pairs, seed: int) -> Card:
    """Measure glyph-clip on fresh glyphs, and on the test rows of the task `digits`."""
    generator = torch_generator(seed, "fresh")
    batches = [pairs.sample(BATCH, generator) for _ in range(64)]
    fresh = Rows(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    drawn_digits = fresh.of([pairs.names.index(name) for name in DIGITS])
    [task] = load_tasks(Task(name="digits"))
    scans = standardised(task.test)
    measured = {
        f"Fresh glyphs, all {len(pairs.names)} classes": (pairs.names, fresh),
        "Fresh glyphs of digits, 10 classes": (DIGITS, drawn_digits),
        "Handwritten digits, 10 classes": (DIGITS, scans),
    }
    figures = {
        what: zero_shot_accuracy(model, tokenizer, names, rows)
        for what, (names, rows) in measured.items()
    }
    deviation = math.sqrt(0.25 / len(scans.labels))
    about = f"""\
It was trained from scratch on one thing: the {len(CHARACTERS)} printable ASCII characters, white
on black, drawn with Pillow's built-in scalable font and distorted at random (stroke width, size,
rotation, shear, shift, bending, blur, contrast, noise), each with a caption.

**It has seen** that one font's digits, letters and signs. A letter's two cases have one name;
characters that look alike (0, O, o; 1, l, I, |) each keep their own.

**It has not seen** handwriting, a scan, a photograph or a picture of any thing, nor any word but
the characters' names and those around them in its captions. "Photo" in a caption tells it nothing.
Whatever it scores on real pictures is the score of a model that meets their like for the first
time."""
    notes = f"""\
The caption of a class is `{scored_caption("seven")}`, `{scored_caption("k")}` or
`{scored_caption("comma")}`; it was fixed before anything was measured. Fresh glyphs:
{len(fresh.labels):,} new distortions of the same font, {len(drawn_digits.labels)} of them digits.
Handwritten digits: scikit-learn's 8x8 scans, enlarged to 20x20 in a black 28x28 frame; the
{len(scans.labels)} test rows of the project's task `digits` (standard error at most
{deviation:.3f}). The recipe was chosen on glyphs and on training rows of `digits`, never on its
test rows."""
    return Card("glyph-clip", about, figures, notes, "")


def picture_card(
    model: Any, tokenizer: Any, pairs: Pairs, sets: Sequence[PictureSet], arguments: str
) -> Card:
    """Measure a CLIP of pictures on every data set's test rows, held-out classes apart."""
    figures, lists = {}, []
    for given in sets:
        kinds: dict[str, list[int]] = {"trained on": [], "held out": []}
        for label, name in enumerate(given.names):
            kinds["trained on" if name in pairs.names else "held out"].append(label)
        for kind, labels in kinds.items():
            if labels:
                names = [given.names[label] for label in labels]
                what = f"{given.name}, test rows, {len(labels)} classes {kind}"
                rows = given.test.of(labels)
                figures[what] = zero_shot_accuracy(model, tokenizer, names, rows)
                lists.append(f"- {given.name}, {kind}: {', '.join(names)}")
    about = """\
It was trained from scratch on the training pictures of these classes, made grey and 28x28, each
with a caption that names its class. Of a class held out it has seen neither a picture nor the
name."""
    about = "\n\n".join([about, *lists])
    notes = f"""\
The caption of a class is `{scored_caption(pairs.names[0])}`, with its own name. A row of the table
tells its own classes apart, and no others. Validation and test rows, as the project's tasks cut
them, were not trained on."""
    return Card("A small CLIP of pictures", about, figures, notes, arguments)


def model_card(card: Card, trained: Trained, budget: Budget, seed: int) -> str:
    """Return the text of README.md."""
    figures = "\n".join(f"| {what} | {value:.3f} |" for what, value in card.figures.items())
    packages = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy", "pillow")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    parameters = sum(weight.numel() for weight in trained.model.parameters())
    towers = f"""\
A CLIP of {parameters:,} parameters. Pictures have 28x28 pixels in one channel, patch 7, and
{VISION_LAYERS} layers; texts at most {POSITIONS} tokens, and {TEXT_LAYERS} layers. Both towers are
of width {WIDTH} with {HEADS} attention heads, and are projected to {WIDTH}."""
    made = f"""\
Training took {trained.seconds:.0f} s of CPU time on one thread: {trained.steps} steps of batch
{BATCH}. Python {platform.python_version()}, {versions}. Pillow must have FreeType support. Another
processor or library version may round differently, and so give slightly different weights."""
    command = f"python -m common.shipped.make_glyph_clip --out FOLDER --seed {seed} {budget}"
    return f"""\
---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: apache-2.0
---

# {card.title}

{filled(towers)}

{filled(card.about)}

## Figures

| Zero-shot accuracy | |
|---|---|
{figures}

{filled(card.notes)}

All figures are of the saved float16 weights.

## Use

    CLIPModel.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder, backend="pil")  # needs no torchvision

Weights are stored as float16 and load as float32. Pictures are greyscale, white on black. The
tokenizer is a CLIPTokenizer and takes any text: words of training are one token each, any other is
spelled in pieces that training never met, so that such a name means nothing to the model yet.

## Reproduce

    {" ".join([command, card.arguments]).strip()}

{filled(made)}
"""


def filled(text: str) -> str:
    """Return paragraphs in lines of at most 100 characters."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(textwrap.fill(p, 100, break_on_hyphens=False) for p in paragraphs)


def make_clip(
    folder: Path, pairs: Pairs, measure: Callable[[Any, Any], Card], budget: Budget, seed: int
) -> str:
    """Train on `pairs`, write the folder, reload and `measure` it, and return its model card."""
    trained = train(pairs, budget, seed)
    save(trained.model, folder)
    trained.tokenizer.save_pretrained(folder)
    reloaded = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    card = model_card(measure(*reloaded), trained, budget, seed)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, reload and measure; write the model card with this run's figures."""
    parser = argparse.ArgumentParser(description="Train glyph-clip, or a small CLIP of pictures.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=STEPS)
    length.add_argument(
        "--seconds", type=float, help="CPU time to train for; the weights are others every time"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders or zips of train/<class>/<picture> and test/<class>/<picture>",
    )
    parser.add_argument(
        "--class-names",
        nargs="+",
        default=[],
        metavar="NAMES",
        help="one comma-separated list a data set, in the order of its folders' names; without it, "
        "or empty, classes are called as prompts call them: by classes.json, or as the folders",
    )
    parser.add_argument("--hold-out-classes", nargs="+", default=[], metavar="NAME")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more would change the order of sums, and so the weights
    logging.disable_progress_bar()
    try:
        timed = given.seconds is not None
        budget = Budget(given.seconds, "seconds") if timed else Budget(given.steps)
        if given.pictures:
            sets = read_picture_sets(given.pictures, given.class_names)
            pairs = picture_pairs(sets, given.hold_out_classes)
            options = {
                "--pictures": [path.name for path in given.pictures],
                "--class-names": given.class_names,
                "--hold-out-classes": given.hold_out_classes,
            }
            words = [
                word for option, values in options.items() if values for word in (option, *values)
            ]
            measure = partial(picture_card, pairs=pairs, sets=sets, arguments=shlex.join(words))
        elif given.class_names or given.hold_out_classes:
            raise ConfigError("--class-names and --hold-out-classes need --pictures")
        else:
            pairs = glyphs()
            measure = partial(glyph_card, pairs=pairs, seed=given.seed)
    except FedcopraError as error:
        parser.error(str(error))
    print(make_clip(given.out, pairs, measure, budget, given.seed))


if __name__ == "__main__":
    main()
