"""Pretrain glyph-vit, the default backbone: a small ViT that has never seen a digit.

It learns to tell apart the printable ASCII characters other than 0-9, drawn with Pillow's built-in
scalable font (this needs a Pillow with FreeType support) and distorted at random. Run as

    python -m common.shipped.make_glyph_vit --out FOLDER
"""

import argparse
import platform
import string
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.utils import logging

SIZE = 28  # pixels a side of the model's input
MEAN, STD = 0.15, 0.3  # about those of a drawn glyph's pixels, which lie in 0..1
CHARACTERS = string.ascii_letters + string.punctuation
STROKE_WIDTHS = (0, 1, 2, 3)  # pixels added around the outline of a 48-pixel font
PRETRAIN_BATCH, PRETRAIN_LR = 32, 3e-3
LORA_STEPS, LORA_BATCH, LORA_LR = 150, 32, 2e-3


class Atlas(NamedTuple):
    """Clean glyphs: their characters, and pixels [glyphs, stroke widths, 64, 64] in 0..1."""

    characters: str
    pixels: Tensor


def draw_atlas(characters: str = CHARACTERS, duplicate: float = 0.93) -> Atlas:
    """Draw every character in every stroke width, 40 pixels in its longer side.

    A character is dropped when, so scaled, its cosine similarity at 16x16 to one kept before it is
    above `duplicate`: S is s once distorted, I is l, and e is hard to tell from c.
    """
    font = ImageFont.load_default(48)
    kept, pixels, coarse = "", [], torch.empty(0, 256)
    for character in characters:
        widths = []
        for stroke_width in STROKE_WIDTHS:
            canvas = Image.new("L", (160, 120))
            draw = ImageDraw.Draw(canvas)
            draw.text((40, 30), character, fill=255, font=font, stroke_width=stroke_width)
            left, top, right, bottom = canvas.getbbox() or (0, 0, 1, 1)
            scale = 40 / max(right - left, bottom - top)
            width, height = round((right - left) * scale), round((bottom - top) * scale)
            glyph = canvas.resize(
                (width, height), Image.Resampling.BILINEAR, (left, top, right, bottom)
            )
            tile = Image.new("L", (64, 64))
            tile.paste(glyph, ((64 - width) // 2, (64 - height) // 2))
            widths.append(np.asarray(tile, dtype=np.float32) / 255)
        tiles = torch.from_numpy(np.stack(widths))
        signature = functional.normalize(functional.avg_pool2d(tiles[1:2], 4).flatten(1))
        if not (coarse @ signature.T > duplicate).any():
            kept, coarse = kept + character, torch.cat([coarse, signature])
            pixels.append(tiles)
    return Atlas(kept, torch.stack(pixels))


def sample_glyphs(atlas: Atlas, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` distorted glyphs: standardised pixels [count, 1, 28, 28] and labels [count]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(len(atlas.characters), (count,), generator=generator)
    widths = torch.randint(len(STROKE_WIDTHS), (count,), generator=generator)
    angle, shear = uniform(-0.26, 0.26), uniform(-0.35, 0.35)  # radians, ratio
    zoom_x, zoom_y = uniform(0.8, 1.35), uniform(0.8, 1.15)
    cos, sin, slant = angle.cos(), angle.sin(), shear * zoom_x
    rows = (cos * zoom_x, slant * cos - sin * zoom_y, sin * zoom_x, slant * sin + cos * zoom_y)
    linear = torch.stack(rows, dim=1).view(count, 2, 2)
    affine = torch.cat([linear, uniform(-0.15, 0.15, 2, 1)], dim=2)
    grid = functional.affine_grid(affine, [count, 1, SIZE, SIZE], align_corners=False)
    # A smooth displacement bends strokes as a hand would.
    bend = 0.04 * torch.randn(count, 2, 4, 4, generator=generator)
    bend = functional.interpolate(bend, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    source = atlas.pixels[labels, widths].unsqueeze(1)
    images = functional.grid_sample(source, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    # Blur, as a scanner of few pixels does: through one coarser resolution a batch.
    coarse = int(torch.randint(11, SIZE + 1, (), generator=generator))
    images = functional.interpolate(images, size=(coarse, coarse), mode="area")
    images = functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
    images = images * uniform(0.6, 1.5, 1, 1, 1)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) - MEAN) / STD, labels


def pretrain(atlas: Atlas, steps: int, seed: int) -> Any:
    """Train a ViTForImageClassification on `steps` batches of fresh glyphs."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # the default 0.02 learns slowly at this width
        id2label=dict(enumerate(atlas.characters)),
        label2id={character: label for label, character in enumerate(atlas.characters)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, labels = sample_glyphs(atlas, PRETRAIN_BATCH, generator)
        loss = functional.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Return the share of images [n, 1, 28, 28] whose label [n] is the largest logit's."""
    predicted: Tensor = model(pixel_values=images).logits.argmax(-1)
    return (predicted == labels).float().mean().item()


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: standardised pixels [1797, 1, 28, 28] and labels [1797]."""
    bunch = load_digits()
    images = torch.zeros(len(bunch.target), 1, SIZE, SIZE)
    for image, pixels in zip(images, bunch.images, strict=True):
        scan = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        enlarged = np.asarray(scan.resize((20, 20), Image.Resampling.BILINEAR), dtype=np.float32)
        image[0, 4:24, 4:24] = torch.from_numpy(enlarged / 255)
    return (images - MEAN) / STD, torch.tensor(bunch.target)


def lora_accuracy(folder: Path, seed: int, pretrained: bool = True) -> float:
    """Fine-tune LoRA and a fresh head on 80% of the digits; return the accuracy on the rest."""
    images, labels = digits()
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pretrained:
            model = ViTForImageClassification.from_pretrained(
                folder, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
            )
        else:
            config = ViTConfig.from_pretrained(folder, num_labels=10)
            model = ViTForImageClassification(config)
        targets = ["q_proj", "v_proj"]
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"]
        )
        model = get_peft_model(model, lora).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LORA_LR)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(LORA_STEPS):
        rows = train[torch.randint(len(train), (LORA_BATCH,), generator=generator)]
        loss = functional.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return accuracy(model.eval(), images[test], labels[test])


def save(model: Any, folder: Path) -> None:
    """Write the model, its weights as float16, and its image processor into `folder`."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    # from_pretrained takes the config's dtype: half precision is for the file alone.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_convert_rgb=False,
        image_mean=[MEAN],
        image_std=[STD],
    )
    processor.save_pretrained(folder)


def model_card(folder: Path, atlas: Atlas, seed: int, steps: int, seconds: float) -> str:
    """Measure the saved model, and describe it; `seconds` of CPU time went into training."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    batches = [sample_glyphs(atlas, PRETRAIN_BATCH, generator) for _ in range(128)]
    glyph_accuracy = np.mean([accuracy(model, *batch) for batch in batches])
    tuned, untrained = (
        [lora_accuracy(folder, lora_seed, pretrained) for lora_seed in range(3)]
        for pretrained in (True, False)
    )
    packages = ("torch", "transformers", "peft", "scikit-learn", "numpy", "pillow")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"""\
---
library_name: transformers
pipeline_tag: image-classification
license: apache-2.0
---

# glyph-vit

A ViT for 28x28 pixels in one channel: patch 7, 4 layers of width 64, 4 attention heads;
{sum(weight.numel() for weight in model.vit.parameters()):,} parameters without its classifier. It
was trained from scratch to tell apart {len(atlas.characters)} printable ASCII characters, white on
black, drawn with Pillow's built-in scalable font and distorted at random (stroke width, size,
rotation, shear, shift, bending, blur, contrast, noise):

    {atlas.characters}

**No digit is among them**: 0-9 are new to it. Letters shaped much like one are (o, l, z, s, b, g).
Of characters alike at 16x16 once scaled to one size, such as s and S, only the first was kept.

## Figures

| Accuracy | |
|---|---|
| The {len(atlas.characters)} glyphs, drawn afresh | {glyph_accuracy:.3f} |
| Digits, LoRA on this model | {_mean_and_each(tuned)} |
| Digits, LoRA on the same ViT with random weights | {_mean_and_each(untrained)} |

Fresh glyphs: {len(batches) * PRETRAIN_BATCH:,} new distortions of the same font. Digits:
scikit-learn's 8x8 scans, enlarged to 20x20 in a black 28x28 frame; trained on 80%, measured on the
other 20% (360 rows); mean, and each of the seeds 0, 1, 2. LoRA: r=8, alpha=16 on `q_proj` and
`v_proj`, a new `classifier`, {LORA_STEPS} AdamW steps of batch {LORA_BATCH}, constant learning rate
{LORA_LR}. The recipe was chosen within the 80%. All figures are of the saved float16 weights.

## Use

    ViTModel.from_pretrained(folder, add_pooling_layer=False)
    ViTForImageClassification.from_pretrained(folder, num_labels=10, ignore_mismatched_sizes=True)
    AutoImageProcessor.from_pretrained(folder, backend="pil")  # needs no torchvision

Weights are stored as float16 and load as float32. Pictures are greyscale, white on black; the
glyphs of training fill about half to four fifths of the frame's side.

## Reproduce

    python -m common.shipped.make_glyph_vit --out FOLDER --seed {seed} --steps {steps}

Training took {seconds:.0f} s of CPU time on one thread: {steps} steps of batch {PRETRAIN_BATCH}.
Python {platform.python_version()}, {versions}.
Pillow must have FreeType support. Another processor or library version may round differently, and
so give slightly different weights.
"""


def _mean_and_each(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def main() -> None:
    """Train, save, reload and measure; write the model card with this run's figures."""
    parser = argparse.ArgumentParser(description="Pretrain glyph-vit and write it to a folder.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more would change the order of sums, and so the weights
    logging.set_verbosity_error()  # a new head is meant: no report of mismatched weights
    logging.disable_progress_bar()

    atlas = draw_atlas()
    print(f"{len(atlas.characters)} glyphs: {atlas.characters}")
    start = time.process_time()
    model = pretrain(atlas, arguments.steps, arguments.seed)
    seconds = time.process_time() - start
    save(model, arguments.out)
    card = model_card(arguments.out, atlas, arguments.seed, arguments.steps, seconds)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
