"""Shared fixtures: tiny random backbones on disk, and experiments small enough to run in seconds.

Nothing here is downloaded or shipped: a model of a few thousand parameters is drawn from its
configuration, and BERT's vocabulary is written by hand.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.environment import prepare_environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")
prepare_environment()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from clients.repeats import Kept  # noqa: E402
from common.config import Experiment, build_experiment  # noqa: E402
from common.features import Features  # noqa: E402
from common.tasks import Kind, LabelledTask, Split  # noqa: E402
from strategies import STRATEGIES  # noqa: E402

WORDS = ["the", "this", "film", "book", "was", "is", "very", "not", "good", "bad", "dull", "slow"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let every test compute on one thread, as clients do."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def trained_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no run take over what another has trained: most tests ask what training does."""
    monkeypatch.setattr("clients.app.kept_trainings", lambda: Kept(room=0))


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of 4 blocks, width 16, for grey pictures of 28x28."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=28,
        patch_size=14,
        num_channels=1,
    )
    folder = tmp_path_factory.mktemp("backbones") / "tiny-vit"
    save_random(ViTModel(config, add_pooling_layer=False), folder)
    processor = ViTImageProcessorPil(
        size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 4 blocks, width 16, with a WordPiece vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-bert"
    save_bert(folder, width=16, intermediate=24)
    return folder


def save_bert(folder: Path, width: int, intermediate: int) -> None:
    """Save a random BERT of 4 blocks and its tokenizer of a few words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##er"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=intermediate,
        max_position_embeddings=64,
        # As in most classifiers that are fine-tuned; it also lets evaluation differ from training.
        hidden_dropout_prob=0.1,
    )
    save_random(BertModel(config), folder, spread=width**-0.5)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of 3 blocks a tower, text width 12, picture width 16, with a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    special = ["<start>", "<end>", "<pad>", "<unknown>"]
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    words = [*special, *digits, "a", "photo", "of", "the", "digit", "cat", "big", "dog", "."]
    vocabulary = {word: number for number, word in enumerate(words)}
    tower = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPConfig(
        text_config={
            **tower,
            "hidden_size": 12,
            "vocab_size": len(words),
            "max_position_embeddings": 24,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        vision_config={
            **tower,
            "hidden_size": 16,
            "image_size": 28,
            "patch_size": 14,
            "num_channels": 1,
        },
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("backbones") / "tiny-clip"
    save_random(CLIPModel(config), folder)
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": 28, "width": 28},
        do_center_crop=False,
        do_convert_rgb=False,
        image_mean=[0.5],
        image_std=[0.5],
    ).save_pretrained(folder)
    return folder


def save_random(model: Any, folder: Path, spread: float = 0.25) -> None:
    """Save `model` with random weights of a spread at which so small a model is not flat."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases stay as they are.
            if parameter.ndim >= 2 or name.endswith("class_embedding"):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=stream))
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def empty_task() -> Callable[..., LabelledTask]:
    """A function of kind and name: a task of 3 labels without rows, for its head alone."""

    def make(kind: Kind, name: str = "toy", labels: int = 3) -> LabelledTask:
        none = Split([], np.zeros(0, dtype=np.int64))
        return LabelledTask(name, kind, tuple("abcdefgh"[:labels]), none, none, none, none)

    return make


@pytest.fixture(scope="session")
def digits_experiment(vit_folder: Path) -> Callable[..., Experiment]:
    """A function of dotted keys: digits on the tiny ViT, 3 clients, 2 rounds of 2 steps."""

    def build(**values: Any) -> Experiment:
        method = STRATEGIES.get(values.get("strategy__name", "fedavg"))
        tables = {
            "task": {"name": "digits", "limit": 240, "probe_examples": 40},
            "partition": {"kind": "iid", "clients": 3},
            "backbone": {"path": str(vit_folder)},
            "adapter": {"rank": 4, "alpha": 6},
            "train": {
                "local_steps": 2,
                "batch_size": 16,
                "learning_rate": 0.02,
                # Some methods hold for one optimiser only.
                "optimiser": (method and method.optimiser) or "adamw",
            },
            "federation": {"rounds": 2, "workers": 0},
            "strategy": {"name": "fedavg", "copra-merge": {"probe_examples": 40}},
        }
        dotted = {key.replace("__", "."): value for key, value in values.items()}
        return build_experiment(tables, dotted)

    return build


@pytest.fixture(scope="session")
def picture_rows() -> Features:
    """48 random pictures for the tiny ViT, 3 classes."""
    stream = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (48, 1, 28, 28), generator=stream, dtype=torch.uint8)
    half = torch.full((1, 1, 1, 1), 0.5)
    return Features({"pixel_values": pixels}, torch.arange(48) % 3, half, half)
