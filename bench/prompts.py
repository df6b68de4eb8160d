"""What soft prompts cost: `python -m bench.prompts`. Each claim is a ratio, measured in one run.

On a CLIP of ViT-B/16's sizes with random weights, 10 classes, 16 shared vectors, batches of 32:

- Features: CPU seconds of an epoch that embeds every picture again, over one that starts from
  embeddings made before; and how far the two prompts that come out are apart.
- Norms: CPU seconds of a step with PUN, and with PAN probing one position, over those of a step
  without either, in turn. Labels are random, so that no batch is all right: a step that has nothing
  to gain is not probed at all.
- Gaps: CPU seconds from 13 prompts (100, 768) to 1,000 pictures' 196 patches each, in 200 batches,
  over those of one prompt, whose distances within patches the others share; and the standard error
  that this leaves.
"""

import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from bench.copra import empty_task
from clients.prompt_norms import norm_penalty
from clients.training import LocalRun, train_locally
from common.backbones import Preprocessor
from common.base_fingerprint import base_fingerprint
from common.config import Copra, Nemesis, Prompt, Train
from common.features import Features
from common.modality_gap import modality_gaps
from common.prompted_clip import Clip, PromptedClip
from common.seeds import torch_generator
from server.environment import prepare_environment

BATCH = 32
EPOCH = 2  # batches of pictures
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLAIN = Nemesis()
TRAIN = Train(batch_size=BATCH, optimiser="sgd", learning_rate=0.002)


def main() -> None:
    """Print one line of JSON a measurement."""
    prepare_environment()
    torch.set_num_threads(1)
    model = PromptedClip(_random_clip(), Prompt(length=16))
    print(json.dumps(features_once(model)), flush=True)
    print(json.dumps(norm_terms(model)), flush=True)
    print(json.dumps(modality_gap()), flush=True)


def features_once(model: PromptedClip) -> dict[str, Any]:
    """Train an epoch from pictures and one from their embeddings; return the ratio of CPU time."""
    pictures = _random_pictures(EPOCH * BATCH)
    began = time.process_time()
    embedded = model.past_stem(pictures)
    embedding = time.process_time() - began
    from_pictures, first = _epoch(model, pictures)
    from_embeddings, second = _epoch(model, embedded)
    return {
        "features": "embedded once",
        "ratio": from_pictures / from_embeddings,
        "seconds_an_epoch": from_embeddings,
        "seconds_to_embed_once": embedding,
        "largest_difference": float((first - second).abs().max()),
    }


def norm_terms(model: PromptedClip, repeats: int = 32) -> dict[str, Any]:
    """Take a step in turn without norms, with PUN and with PAN; return the ratios of CPU time.

    Each repeat has a seed, and so a position, of its own. Other work on the machine comes and goes;
    it weighs on the three of one repeat alike.
    """
    rows = Features(
        {"embeddings": torch.randn(BATCH, 512, generator=torch_generator(0, "rows"))},
        _labels(BATCH),
        past_stem=True,
    )
    kinds = {"none": Nemesis(), "pun": Nemesis(kind="pun"), "pan": Nemesis(kind="pan")}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    _epoch(model, rows)
    for seed in range(repeats):
        for kind, nemesis in kinds.items():
            taken[kind].append(_epoch(model, rows, nemesis, seed)[0])
    plain = taken["none"]
    ratios = {
        kind: statistics.median(a / b for a, b in zip(taken[kind], plain, strict=True))
        for kind in ("pun", "pan")
    }
    return {"norms": "over a step without", **ratios, "seconds_a_step": statistics.median(plain)}


def modality_gap(prompts: int = 13, pictures: int = 1000) -> dict[str, Any]:
    """Measure the gap of one prompt and of several, whose norms range as the published ones do."""
    stream = torch_generator(0, "gaps")
    patches = torch.randn(pictures * 196, 768, generator=stream)
    norms = torch.logspace(0, 1.5, prompts) / 768**0.5
    drawn = {f"s{i}": n * torch.randn(100, 768, generator=stream) for i, n in enumerate(norms)}
    seconds, found = {}, {}
    for name, some in (("one", {"s0": drawn["s0"]}), ("all", drawn)):
        began = time.process_time()
        found = modality_gaps(some, patches, torch_generator(0, "batches"))
        seconds[name] = time.process_time() - began
    return {
        "gaps": f"{prompts} prompts over one",
        "ratio": seconds["all"] / seconds["one"],
        "seconds": seconds["all"],
        "largest_standard_error": max(gap.standard_error or 0.0 for gap in found.values()),
        "largest_gap": max(gap.value for gap in found.values()),
    }


def _epoch(
    model: PromptedClip, rows: Features, nemesis: Nemesis = PLAIN, seed: int = 1
) -> tuple[float, torch.Tensor]:
    """Return CPU seconds of one epoch from the same start, and the prompt that comes out."""
    task = replace(empty_task("image", NAMES), class_names=NAMES)
    model.load(model.initial((task,), 0), 0, task)
    steps = len(rows) // BATCH
    run = LocalRun(seed, 0, steps, steps, ("prompt",))
    penalty = norm_penalty(model, run, nemesis)
    began = time.process_time()
    train_locally(model, rows, run, TRAIN, Copra(), penalty=penalty)
    return time.process_time() - began, model.state()["prompt.text"]


def _random_clip() -> Clip:
    """Return a CLIP of the sizes that transformers has by default but for its patches of 16."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(vision_config={"patch_size": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        towers = CLIPModel(config).eval().requires_grad_(False)
    preprocessor = Preprocessor("image", "random", None, 0, config)
    return Clip(preprocessor, _letters, towers, torch.device("cpu"), base_fingerprint(towers))


class _Letters:
    """A tokenizer that knows letters: class names of a few tokens each, as CLIP's own have."""

    bos_token_id, eos_token_id, pad_token_id = 49406, 49407, 49407

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text[:2]]}


_letters = _Letters()


def _random_pictures(count: int) -> Features:
    stream = torch_generator(0, "pictures")
    pixels = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8, generator=stream)
    middle = torch.full((1, 3, 1, 1), 0.5)
    return Features({"pixel_values": pixels}, _labels(count), middle, middle / 2)


def _labels(count: int) -> torch.Tensor:
    return torch.randint(len(NAMES), (count,), generator=torch_generator(0, "labels"))


if __name__ == "__main__":
    main()
