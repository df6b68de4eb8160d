"""Models: a frozen backbone and what is trained beside it, whatever that is."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.adapters import AdaptedBackbone
from common.backbones import (
    Preprocessor,
    PretrainedBackbone,
    load_backbone,
    load_preprocessor,
)
from common.config import Adapter, Backbone
from common.errors import ConfigError
from common.features import Batch, Features
from common.prompted_clip import PromptedClip, load_clip
from common.prompted_text import PromptedText, load_text_encoder
from common.prompted_vit import PromptedVit
from common.tasks import Kind, LabelledTask
from common.tensors import Tensors


class Model(Protocol):
    """What training, evaluation and merging know of a model.

    Its state is `{name: tensor}`, float32, and exactly what can be trained. One model serves all
    clients that pass through a process, one at a time (`in_use`): `load` demands the complete state
    and overwrites all of it.
    """

    in_use: threading.RLock

    @property
    def device(self) -> torch.device:
        """Return where it computes."""

    @property
    def preprocessor(self) -> Preprocessor:
        """Return how rows become what it takes."""

    @property
    def base_fingerprint(self) -> str:
        """Return what tells its frozen base from others (`common.base_fingerprint`)."""

    @property
    def module(self) -> nn.Module:
        """Return the loaded torch module, for its training and evaluation modes."""

    @property
    def blocks(self) -> list[list[Any]]:
        """Return the adapted layers, grouped by transformer block; none where there are none."""

    @property
    def has_stem(self) -> bool:
        """Say whether rows can be taken past parts that nothing changes."""

    def shapes(self, rank: int, task: LabelledTask) -> dict[str, torch.Size]:
        """Return name and shape of every tensor that a model of `rank` and `task` can train."""

    def initial(
        self, tasks: tuple[LabelledTask, ...], seed: int, restart: int = 0
    ) -> dict[str, Tensor]:
        """Return the common start, drawn from `seed` alone; each `restart` has one of its own."""

    def load(self, state: Tensors, rank: int, task: LabelledTask) -> None:
        """Make `state` the model of `task`.

        Raises:
            UpdateRefusedError: a tensor is missing, unknown, of the wrong shape or not finite.
        """

    def state(self) -> dict[str, Tensor]:
        """Return a copy, on the CPU, of every trainable tensor of the loaded model."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live trainable parameters of the loaded model, in name order."""

    def logits(self, batch: Batch) -> Tensor:
        """Return (n, classes) logits of the loaded model."""

    def past_stem(self, features: Features) -> Features:
        """Return the rows past the stem, or as they are if there is none."""


@functools.lru_cache(maxsize=8)
def load_model(backbone: Backbone, kind: Kind, adapter: Adapter, device: str) -> Model:
    """Load a backbone with room for what is trained, once a process for each adapter setting.

    Raises:
        ConfigError: the backbone cannot be loaded, or takes no such adapter.
    """
    return _MODELS[adapter.kind](backbone, kind, adapter, device)


def _with_lora(backbone: Backbone, kind: Kind, adapter: Adapter, device: str) -> Model:
    return AdaptedBackbone(load_backbone(backbone, kind, device), adapter)


def _prompted_clip(backbone: Backbone, kind: Kind, adapter: Adapter, device: str) -> Model:
    if adapter.transfer.kind != "none":
        raise ConfigError(
            f"adapter.transfer.kind = {adapter.transfer.kind!r} gives a prompt to a ViT; "
            f"{backbone.label!r} is a CLIP"
        )
    return PromptedClip(load_clip(backbone, kind, device), adapter.prompt)


def _prompted_vit(backbone: Backbone, kind: Kind, adapter: Adapter, device: str) -> Model:
    return PromptedVit(_shared_backbone(backbone, kind, device), adapter)


@functools.lru_cache(maxsize=2)
def _shared_backbone(backbone: Backbone, kind: Kind, device: str) -> PretrainedBackbone:
    """Load a backbone that nothing is built into: models that differ in their prompt share it."""
    return load_backbone(backbone, kind, device)


# By transformers' name of the family.
_PROMPTED: Mapping[str, Callable[[Backbone, Kind, Adapter, str], Model]] = {
    "clip": _prompted_clip,
    "vit": _prompted_vit,
}


def _prompted_text(backbone: Backbone, adapter: Adapter, device: str) -> Model:
    if adapter.transfer.kind != "none":
        raise ConfigError(
            f"adapter.transfer.kind = {adapter.transfer.kind!r} gives a prompt to a ViT; the task "
            "is of texts"
        )
    return PromptedText(load_text_encoder(backbone, adapter.prompt, device), adapter.prompt)


def _with_prompts(backbone: Backbone, kind: Kind, adapter: Adapter, device: str) -> Model:
    if kind == "text":
        return _prompted_text(backbone, adapter, device)
    if adapter.prompt.verbaliser or adapter.prompt.task_specific:
        key = "verbaliser" if adapter.prompt.verbaliser else "task_specific"
        raise ConfigError(f"adapter.prompt.{key} = true is for texts; the task is of pictures")
    preprocessor = load_preprocessor(backbone, kind)
    family = preprocessor.model_config.model_type
    if family not in _PROMPTED:
        raise ConfigError(
            f"backbone {preprocessor.location!r} is of the family {family!r}; adapter.kind = "
            f"'prompt' needs one of {', '.join(_PROMPTED)}"
        )
    return _PROMPTED[family](backbone, kind, adapter, device)


_MODELS: Mapping[str, Callable[[Backbone, Kind, Adapter, str], Model]] = {
    "lora": _with_lora,
    "prompt": _with_prompts,
}
