"""The stem: what lies below the lowest adapted block, run once a row and never again.

Where only the last blocks carry adapters, the embeddings and the blocks below them never change:
what they make of a row is a property of the row. It is computed once, without dropout, and training
and evaluation start from it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.features import Batch, Features

_ROWS_AT_ONCE = 64


class _ReachedError(Exception):
    """The lowest adapted block has been reached: what comes in is what is wanted."""


class Stem:
    """The embeddings of an encoder and its blocks below `lowest`, a list of blocks and a position.

    Raises:
        ConfigError: the encoder keeps its embeddings under another name than `embeddings`.
    """

    def __init__(self, encoder: Any, blocks: str, lowest: int) -> None:
        if not isinstance(getattr(encoder, "embeddings", None), nn.Module):
            raise ConfigError(
                f"adapter.blocks: {type(encoder).__name__} has no module called embeddings, whose "
                "output could be kept; choose adapter.blocks = 0"
            )
        # Batches are scored in several threads at a time.
        self._here = threading.local()
        self._encoder = encoder
        stack: Any = encoder.get_submodule(blocks)
        for module in (encoder.embeddings, *stack[:lowest]):
            # In place of the method, not of the module: models reach for attributes of both.
            module.forward = self._skippable(module.forward)
        self._lowest = stack[lowest]

    def _skippable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skip_or_run(*inputs: Any, **named: Any) -> Any:
            if not getattr(self._here, "bypassed", False):
                return forward(*inputs, **named)
            given = named.get("inputs_embeds")
            return inputs[0] if given is None else given

        return skip_or_run

    @contextlib.contextmanager
    def bypass(self, wanted: bool) -> Iterator[None]:
        """Skip the stem, if wanted: the batch is past it."""
        self._here.bypassed = wanted
        try:
            yield
        finally:
            self._here.bypassed = False

    def run(self, features: Features, device: torch.device) -> Features:
        """Return the rows past the stem: (n, tokens, width), on the CPU."""
        hidden: Tensor | None = None
        self._encoder.eval()
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, len(features)))
            found = self._hidden_states(features.batch(rows, device)).cpu()
            if hidden is None:
                tokens = features.inputs.get("attention_mask", found).shape[1]
                hidden = torch.zeros(len(features), tokens, found.shape[2])
            hidden[rows, : found.shape[1]] = found
        if hidden is None:
            raise ValueError("there is no row to run")
        return _past_stem(features, hidden)

    def _hidden_states(self, batch: Batch) -> Tensor:
        reached: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(inputs[0] if inputs else named["hidden_states"])
            raise _ReachedError

        hook = self._lowest.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_ReachedError):
                self._encoder(**batch.inputs)
        finally:
            hook.remove()
        return reached[0]


def _past_stem(features: Features, hidden: Tensor) -> Features:
    if "attention_mask" in features.inputs:
        mask = features.inputs["attention_mask"]
        inputs = {"inputs_embeds": hidden, "attention_mask": mask}
    else:
        inputs = {"pixel_values": hidden}
    return Features(inputs, features.labels, past_stem=True)
