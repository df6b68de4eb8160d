"""A soft prompt of a frozen text encoder, with a linear head or with words for the classes.

Prompt tuning (arXiv 2104.08691) of BERT, RoBERTa and their like: P (M, d) goes in before the text's
tokens, and the answer is read at the first position:

    linear head   [CLS ; P ; text SEP]          head(h_0)
    verbaliser    [MASK ; P ; CLS text SEP]     the model's own masked-LM head at h_0, of one word
                                                a class

as in Su et al. (NAACL 2022), whose prompts have the mask in the place of their row 0. The mask is
no part of P here. Positions: the text keeps those it has without a prompt; P and the mask have
none. All else of the embedding layer, token type 0 and LayerNorm, they pass as words do; so that
the scale of a vector hardly matters. Dropout stays off. With M = 0 and a linear head it is the
stock encoder, bit by bit.

A model's state, float32:

- `prompt.text` (M, d), shared by all tasks, or `head.<task>.context` (M, d), one a task;
- `head.<task>.classifier.weight` (C, d) and `.bias` (C,), unless words answer.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.backbones import (
    Preprocessor,
    choose_device,
    load_backbone,
    load_preprocessor,
    named_in_errors,
)
from common.base_fingerprint import base_fingerprint
from common.config import Backbone, Prompt
from common.errors import ConfigError
from common.features import Batch, Features
from common.first_token import keep_first_token
from common.seeds import torch_generator
from common.tasks import LabelledTask
from common.tensors import Tensors, check_update, head_prefix

SHARED = "prompt.text"
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class TextEncoder:
    """A frozen BERT-like encoder; `answers` is its masked-LM head, where words are to answer."""

    preprocessor: Preprocessor
    encoder: Any
    device: torch.device
    fingerprint: str
    answers: Any | None = None


def load_text_encoder(config: Backbone, prompt: Prompt, device: str) -> TextEncoder:
    """Load an encoder, frozen, on `device`, with its masked-LM head if the prompt needs it.

    Raises:
        ConfigError: the model cannot be loaded, has no masked-LM head where one is needed, or is
            not built like BERT.
    """
    if prompt.verbaliser:
        loaded = _with_masked_lm(config, device)
    else:
        backbone = load_backbone(config, "text", device)
        loaded = TextEncoder(
            backbone.preprocessor, backbone.encoder, backbone.device, backbone.fingerprint
        )
    embeddings = getattr(loaded.encoder, "embeddings", None)
    parts = ("word_embeddings", "token_type_embeddings", "LayerNorm")
    layers = getattr(getattr(loaded.encoder, "encoder", None), "layer", None)
    if layers is None or not all(hasattr(embeddings, part) for part in parts):
        raise ConfigError(
            f"backbone {loaded.preprocessor.location!r} ({type(loaded.encoder).__name__}) is not "
            "built like BERT, with embeddings of words and token types; adapter.kind = 'prompt' "
            "on text needs that"
        )
    loaded.encoder.eval()
    return loaded


def _with_masked_lm(config: Backbone, device: str) -> TextEncoder:
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging as transformers_logging

    preprocessor, place = load_preprocessor(config, "text"), choose_device(device)
    location = preprocessor.location
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with named_in_errors(location, "text"), torch.random.fork_rng(devices=[]):
        model, found = AutoModelForMaskedLM.from_pretrained(
            location, dtype=torch.float32, output_loading_info=True
        )
    encoder = getattr(model, model.base_model_prefix)
    heads = {name: child for name, child in model.named_children() if child is not encoder}
    absent = [name for name in found["missing_keys"] if name.partition(".")[0] in heads]
    if absent or len(heads) != 1 or preprocessor.tool.mask_token_id is None:
        raise ConfigError(
            f"adapter.prompt.verbaliser = true: backbone {location!r} has no masked-LM head "
            f"({', '.join(absent[:1]) or 'one module'} is missing); set it to false for a linear "
            "head"
        )
    model.requires_grad_(False)
    model.to(place).eval()
    keep_first_token(encoder)
    answers = next(iter(heads.values()))
    return TextEncoder(preprocessor, encoder, place, base_fingerprint(model), answers)


class PromptedText:
    """One frozen text encoder with a soft prompt; see `common.models.Model`.

    Raises:
        ConfigError: a setting is for pictures or their captions.
    """

    def __init__(self, text: TextEncoder, prompt: Prompt) -> None:
        self._text, self._prompt = text, prompt
        self.in_use = threading.RLock()
        _check(prompt)
        self._trained = nn.Module()
        self._parameters: dict[str, nn.Parameter] = {}
        self._task: LabelledTask | None = None
        self._words: dict[tuple[str, ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self._text.device

    @property
    def preprocessor(self) -> Preprocessor:
        """Return how texts become what it takes."""
        return self._text.preprocessor

    @property
    def base_fingerprint(self) -> str:
        """Return what tells its frozen base from others."""
        return self._text.fingerprint

    @property
    def text(self) -> TextEncoder:
        """Return the frozen encoder."""
        return self._text

    @property
    def module(self) -> nn.Module:
        """Return a module without layers: whatever mode it is set to, the encoder stays as is."""
        return self._trained

    @property
    def blocks(self) -> list[list[Any]]:
        """Return nothing: no block carries an adapter that could be switched off."""
        return []

    @property
    def has_stem(self) -> bool:
        """Say whether nothing is trained but the head, so that each text is read once."""
        return not self._prompt.length

    # --- state ---------------------------------------------------------------------------------

    def shapes(self, rank: int, task: LabelledTask) -> dict[str, torch.Size]:
        """Return name and shape of every tensor that can be trained; `rank` has no meaning here."""
        width, classes = self._text.encoder.config.hidden_size, len(task.labels)
        shapes = {}
        if self._prompt.length:
            shapes[self.prompt_name(task)] = torch.Size((self._prompt.length, width))
        if not self._prompt.verbaliser:
            weight, bias = _head_names(task)
            shapes |= {weight: torch.Size((classes, width)), bias: torch.Size((classes,))}
        return shapes

    def prompt_name(self, task: LabelledTask) -> str:
        """Return how the prompt of a task is called in a state."""
        return head_prefix(task.name) + "context" if self._prompt.task_specific else SHARED

    def initial(
        self, tasks: tuple[LabelledTask, ...], seed: int, restart: int = 0
    ) -> dict[str, Tensor]:
        """Return the common start: N(0, spread²) for prompts, U(-1/√d, 1/√d) for heads."""
        state: dict[str, Tensor] = {}
        bound = float(self._text.encoder.config.hidden_size**-0.5)
        for task in tasks:
            for name, shape in self.shapes(0, task).items():
                if name == self.prompt_name(task):
                    stream = torch_generator(seed, name, restart)
                    state[name] = self._prompt.spread * torch.randn(shape, generator=stream)
                else:
                    drawn = torch.rand(shape, generator=torch_generator(seed, name))
                    state[name] = bound * (2 * drawn - 1)
        return state

    def load(self, state: Tensors, rank: int, task: LabelledTask) -> None:
        """Make `state` the prompt and head in use.

        Raises:
            ConfigError: a class has no word that the model can answer with.
            UpdateRefusedError: a tensor is missing, unknown, of the wrong shape or not finite.
        """
        shapes = self.shapes(rank, task)
        check_update(state, shapes)
        if self._prompt.verbaliser and (names := _names(task)) not in self._words:
            ids = word_ids(self._text.preprocessor, task)
            self._words[names] = torch.tensor(ids, device=self.device)
        self._task = task
        self._parameters = {
            name: nn.Parameter(state[name].to(self.device, torch.float32, copy=True))
            for name in sorted(shapes)
        }

    def state(self) -> dict[str, Tensor]:
        """Return a copy, on the CPU, of every trained tensor."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live trained tensors, in name order."""
        self._loaded_task()
        return dict(self._parameters)

    # --- what it computes ----------------------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        """Return (n, C) in float32."""
        task = self._loaded_task()
        read = batch.inputs["embeddings"] if batch.past_stem else self._read(batch)
        if self._text.answers is not None:
            answers: Tensor = self._text.answers(read[:, None])[:, 0]
            return answers[:, self._words[_names(task)]].float()
        weight, bias = (self._parameters[name] for name in _head_names(task))
        return functional.linear(read, weight, bias).float()

    def past_stem(self, features: Features) -> Features:
        """Return the first state of each text, (n, d), on the CPU; or the rows as they are."""
        if not self.has_stem or features.past_stem:
            return features
        with self.in_use, torch.no_grad():
            found = [
                self._read(batch).cpu() for batch in features.batches(_TEXTS_AT_ONCE, self.device)
            ]
        return Features({"embeddings": torch.cat(found)}, features.labels, past_stem=True)

    # --- inside --------------------------------------------------------------------------------

    def _read(self, batch: Batch) -> Tensor:
        prompt = None
        if self._prompt.length:
            prompt = self._parameters[self.prompt_name(self._loaded_task())]
        mask = self.preprocessor.tool.mask_token_id if self._prompt.verbaliser else None
        return first_state(self._text.encoder, batch.inputs, prompt, mask)

    def _loaded_task(self) -> LabelledTask:
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        return self._task


def _names(task: LabelledTask) -> tuple[str, ...]:
    return task.class_names or task.labels


def _head_names(task: LabelledTask) -> tuple[str, str]:
    prefix = head_prefix(task.name) + "classifier."
    return prefix + "weight", prefix + "bias"


def _check(prompt: Prompt) -> None:
    foreign = ("class_specific", "prompts", "prefix", "words", "ending", "class_at")
    usual = Prompt()
    for key in (*foreign, "visual", "visual_blocks"):
        if (given := getattr(prompt, key)) != (wanted := getattr(usual, key)):
            whose = "captions" if key in foreign else "pictures"
            raise ConfigError(
                f"adapter.prompt.{key} = {given!r} is for {whose}, and the task is of texts; set "
                f"it to {wanted!r}"
            )
    if not prompt.length and (prompt.verbaliser or prompt.task_specific):
        key = "verbaliser" if prompt.verbaliser else "task_specific"
        raise ConfigError(f"adapter.prompt.{key} = true needs adapter.prompt.length above 0")


def word_ids(preprocessor: Preprocessor, task: LabelledTask) -> list[int]:
    """Return the token that stands for each class: the class's name, in the middle of a sentence.

    Raises:
        ConfigError: a name is more than one token or none that is known, or two are the same.
    """
    tool = preprocessor.tool
    found: dict[int, str] = {}
    for name in _names(task):
        ids = tool(" " + name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tool.unk_token_id or ids[0] in found:
            problem = (
                f"it is {len(ids)} tokens"
                if len(ids) != 1
                else "the model does not know it"
                if ids[0] == tool.unk_token_id
                else f"it is the same token as {found[ids[0]]!r}"
            )
            raise ConfigError(
                f"task.class_names: {name!r} cannot stand for a class of {task.name}, since "
                f"{problem}; give every class one word of {preprocessor.location!r}, or set "
                "adapter.prompt.verbaliser = false"
            )
        found[ids[0]] = name
    return list(found)


# --- the encoder, with vectors among its tokens ---------------------------------------------------


def first_state(
    encoder: Any, inputs: Tensors, prompt: Tensor | None, mask_token: int | None = None
) -> Tensor:
    """Return the last state at position 0, (n, d).

    The text passes the stock embedding layer by itself, and so has its own positions; `prompt`
    (M, d) goes in behind its first token, or, where there is a `mask_token`, both before it.
    """
    from transformers.masking_utils import create_bidirectional_mask

    attention = inputs["attention_mask"]
    layer = encoder.embeddings
    types = inputs.get("token_type_ids")
    text: Tensor = layer(input_ids=inputs["input_ids"], token_type_ids=types)
    vectors = [] if prompt is None else [prompt]
    if mask_token is not None:
        vectors = [layer.word_embeddings.weight[mask_token][None], *vectors]
    start = 0 if mask_token is not None else 1
    if vectors:
        inserted = layer.LayerNorm(torch.cat(vectors) + layer.token_type_embeddings.weight[0])
        several = inserted.expand(len(text), -1, -1)
        text = torch.cat([text[:, :start], several, text[:, start:]], dim=1)
        seen = attention.new_ones(len(attention), len(inserted))
        attention = torch.cat([seen, attention], dim=1)
    mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=text, attention_mask=attention
    )
    states: Tensor = encoder.encoder(text, attention_mask=mask).last_hidden_state
    return states[:, 0]


def activated_neurons(text: TextEncoder, prompt: Tensor) -> Tensor:
    """Return which neurons of the feed-forward layers a prompt (M, d) activates: (neurons,), bool.

    Of the first position, in all layers, where the model sees it and the prompt alone, and no text
    (Su et al.: at the mask; of a model with a linear head it is the class token). For
    `common.prompt_similarity.activation_overlap`.

    Raises:
        ConfigError: the prompt is of another width.
    """
    width, tool = text.encoder.config.hidden_size, text.preprocessor.tool
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise ConfigError(
            f"a prompt of shape {tuple(prompt.shape)} does not fit an encoder of width {width}"
        )
    mask_token = None if text.answers is None else tool.mask_token_id
    alone = [] if text.answers is not None else [tool.cls_token_id]
    ids = torch.tensor([alone], dtype=torch.int64, device=text.device)
    found: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        found.append(output[0, 0] > 0)

    dense = [layer.intermediate.dense for layer in text.encoder.encoder.layer]
    hooks = [module.register_forward_hook(note) for module in dense]
    try:
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            vectors = prompt.to(text.device, torch.float32)
            first_state(text.encoder, inputs, vectors, mask_token)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found).cpu()
