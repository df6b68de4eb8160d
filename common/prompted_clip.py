"""Soft prompts of a frozen CLIP: captions with learned vectors, and pictures with some if wished.

CoOp (arXiv 2109.01134) puts M learned vectors beside the words of each class name; the embedded
caption is the classifier's weight for that class. VPT (arXiv 2203.12119) puts vectors among the
patches of the picture. Prefix tuning (arXiv 2101.00190) gives every block of the text tower keys
and values that all its tokens attend to, here learned as they are, without a network that makes
them. Both towers are composed from the model's own parts, so that without a prompt they give what
`CLIPModel` gives.

A model's state, float32:

- `prompt.text` (M, d), or (N, M, d) for several prompts, shared by all tasks and classes;
- `local.text`, the same again, where a method gives clients a prompt of their own;
- `head.<task>.context` (C, M, d) or (C, N, M, d) in place of these, one context a class;
- `prompt.prefix` (blocks, 2, T, d), keys and values, shared by all contexts, tasks and classes;
- `prompt.image` (blocks, T, width).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.backbones import Preprocessor, choose_device, load_preprocessor, named_in_errors
from common.base_fingerprint import base_fingerprint
from common.captions import Captions, Past, caption_ids, no_past, past_of, shared_tokens
from common.config import Backbone, Prompt
from common.errors import ConfigError
from common.features import Batch, Features
from common.seeds import torch_generator
from common.tasks import Kind, LabelledTask
from common.tensors import Tensors, check_update, head_prefix

SHARED, LOCAL, VISUAL = "prompt.text", "local.text", "prompt.image"
PREFIX = "prompt.prefix"
_PICTURES_AT_ONCE = 64
_CAPTIONS_AT_ONCE = 1024  # of a probe: bounds its memory where there are many classes


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP with its tokenizer and image processor."""

    preprocessor: Preprocessor
    tokenizer: Any
    towers: Any  # transformers' CLIPModel
    device: torch.device
    fingerprint: str


def load_clip(config: Backbone, kind: Kind, device: str) -> Clip:
    """Load a CLIP, frozen, on `device`.

    Raises:
        ConfigError: the backbone is no CLIP, cannot be loaded, or the task has no pictures.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import logging as transformers_logging

    if kind != "image":
        raise ConfigError(f"adapter.kind = 'prompt' needs pictures; the task is of kind {kind!r}")
    preprocessor = load_preprocessor(config, kind)
    location, family = preprocessor.location, preprocessor.model_config.model_type
    if family != "clip":
        raise ConfigError(
            f"backbone {location!r} is of the family {family!r}; adapter.kind = 'prompt' needs "
            "'clip': a picture and a text tower, such as the shipped glyph-clip"
        )
    place = choose_device(device)
    transformers_logging.disable_progress_bar()
    with named_in_errors(location, kind):
        towers = CLIPModel.from_pretrained(location, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(location)
    towers.requires_grad_(False)
    towers = towers.to(place).eval()
    return Clip(preprocessor, tokenizer, towers, place, base_fingerprint(towers))


@dataclass(frozen=True)
class _Embedded:
    """Captions as they were embedded last.

    Attributes:
        of: what they were made of and how, to know them again by.
        embeddings: (N, C, projection), of length 1.
        past: what their shared tokens left, for N sets of captions.
    """

    of: tuple[Any, ...]
    embeddings: Tensor
    past: Past


class PromptedClip:
    """One frozen CLIP with soft prompts; see `common.models.Model`."""

    def __init__(self, clip: Clip, prompt: Prompt) -> None:
        self._clip, self._prompt = clip, prompt
        self.in_use = threading.RLock()
        self._check()
        self._parameters: dict[str, nn.Parameter] = {}
        self._captions: dict[tuple[str, ...], Captions] = {}
        self._task: LabelledTask | None = None
        self._kept: _Embedded | None = None
        self._making_captions = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self._clip.device

    @property
    def preprocessor(self) -> Preprocessor:
        """Return how pictures become what it takes."""
        return self._clip.preprocessor

    @property
    def base_fingerprint(self) -> str:
        """Return what tells its frozen base from others."""
        return self._clip.fingerprint

    @property
    def module(self) -> nn.Module:
        """Return both towers; they stay frozen."""
        return self._clip.towers  # type: ignore[no-any-return]

    @property
    def blocks(self) -> list[list[Any]]:
        """Return nothing: no block carries an adapter that could be switched off."""
        return []

    @property
    def has_stem(self) -> bool:
        """Say whether pictures can be embedded once: nothing that is trained stands before that."""
        return not self._prompt.visual

    # --- state ---------------------------------------------------------------------------------

    def shapes(self, rank: int, task: LabelledTask) -> dict[str, torch.Size]:
        """Return name and shape of every tensor that can be trained; `rank` has no meaning here."""
        prompt, width = self._prompt, self._clip.towers.config.text_config.hidden_size
        several = (prompt.prompts,) if prompt.prompts > 1 else ()
        context = (*several, prompt.length, width)
        shapes = {}
        if prompt.length and prompt.class_specific:
            shapes[_own_context(task)] = torch.Size((len(task.labels), *context))
        elif prompt.length:
            shapes[SHARED] = torch.Size(context)
        if prompt.prefix:
            blocks = len(self._clip.towers.text_model.encoder.layers)
            shapes[PREFIX] = torch.Size((blocks, 2, prompt.prefix, width))
        if prompt.visual:
            size = self._clip.towers.config.vision_config.hidden_size
            shapes[VISUAL] = torch.Size((prompt.visual_blocks, prompt.visual, size))
        return shapes

    def initial(
        self, tasks: tuple[LabelledTask, ...], seed: int, restart: int = 0
    ) -> dict[str, Tensor]:
        """Return the common start: N(0, spread²), and the words of the prompt where it has some."""
        state = {}
        for task in tasks:
            for name, shape in self.shapes(0, task).items():
                stream = torch_generator(seed, name, restart)
                state[name] = self._prompt.spread * torch.randn(shape, generator=stream)
                if self._prompt.words and name not in (VISUAL, PREFIX):
                    words = self._embedded_words().cpu()
                    state[name][..., : len(words), :] = words
        return state

    def load(self, state: Tensors, rank: int, task: LabelledTask) -> None:
        """Make `state` the prompts in use, with the class names of `task`.

        Raises:
            UpdateRefusedError: a tensor is missing, unknown, of the wrong shape or not finite.
        """
        shapes = self.shapes(rank, task)
        if LOCAL in state and SHARED in shapes:
            shapes[LOCAL] = shapes[SHARED]
        check_update(state, shapes)
        self._task, self._kept = task, None
        self._parameters = {
            name: nn.Parameter(state[name].to(self.device, torch.float32, copy=True))
            for name in sorted(shapes)
        }

    def state(self) -> dict[str, Tensor]:
        """Return a copy, on the CPU, of every prompt."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live prompts, in name order."""
        self._loaded_task()
        return dict(self._parameters)

    # --- what it computes ----------------------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        """Return (n, C): cosine similarities times the model's temperature, in float32."""
        captions = self._caption_embeddings()
        return self._similarities(self._pictures(batch), captions).mean(dim=0)

    def hits_of(self, batch: Batch, name: str, contexts: Tensor) -> Tensor:
        """Return how many rows are classified right with each of K prompts in place of one.

        (K,), without a gradient, for contexts (K, *shape of the prompt called `name`); all others
        stay as they are, and what comes before the first vector that changes is not computed again.
        """
        hits = []
        with torch.no_grad():
            pictures = self._pictures(batch)
            for some in torch.split(contexts, self._contexts_at_once()):
                scores = self._similarities(pictures, self._embedded_with(name, some))
                hits.append((scores.mean(dim=1).argmax(dim=-1) == batch.labels).sum(dim=1))
        return torch.cat(hits)

    def past_stem(self, features: Features) -> Features:
        """Return the pictures' embeddings, (n, projection), of length 1, on the CPU."""
        if not self.has_stem or features.past_stem:
            return features
        with self.in_use, torch.no_grad():
            found = [
                self._embed_pictures(batch.inputs["pixel_values"]).cpu()
                for batch in features.batches(_PICTURES_AT_ONCE, self.device)
            ]
        return Features({"embeddings": torch.cat(found)}, features.labels, past_stem=True)

    # --- inside --------------------------------------------------------------------------------

    def _pictures(self, batch: Batch) -> Tensor:
        if batch.past_stem:
            return batch.inputs["embeddings"]
        return self._embed_pictures(batch.inputs["pixel_values"])

    def _similarities(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """Return (..., n, C) logits of captions (..., C, projection)."""
        scale: Tensor = self._clip.towers.logit_scale.exp()
        return scale * (pictures.float() @ captions.mT)

    def _contexts(self) -> dict[str, Tensor]:
        """Return the live prompts of captions, in name order."""
        return {n: p for n, p in self._parameters.items() if n not in (VISUAL, PREFIX)}

    def _of_captions(self) -> dict[str, Tensor]:
        """Return all that captions are made of, in name order."""
        return {n: p for n, p in self._parameters.items() if n != VISUAL}

    def _contexts_at_once(self) -> int:
        return max(1, _CAPTIONS_AT_ONCE // len(self._loaded_task().labels))

    def _caption_embeddings(self) -> Tensor:
        """Return (N, C, projection); made once for all batches as long as nothing is trained."""
        if torch.is_grad_enabled() and self._of_captions():
            made = self._embed_captions()
            past = [(keys.detach(), values.detach()) for keys, values in made.past]
            self._kept = _Embedded(made.of, made.embeddings.detach(), past)
            return made.embeddings
        return self._kept_captions().embeddings

    def _kept_captions(self) -> _Embedded:
        """Return the captions of the live prompts as they were embedded last, if they still are."""
        with self._making_captions:  # batches may be scored in several threads at a time
            if self._kept is None or self._kept.of != self._made_of():
                # Training may go on with those that evaluation asks for.
                with torch.inference_mode(False), torch.no_grad():
                    self._kept = self._embed_captions()
            return self._kept

    def _made_of(self) -> tuple[Any, ...]:
        """Return the versions of what captions are made of, and the precision that holds here."""
        kind = self.device.type
        precision = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return precision, *(prompt._version for prompt in self._of_captions().values())

    def _embed_captions(self) -> _Embedded:
        """Embed the captions of the live prompts."""
        contexts = self._stacked(list(self._contexts().values()))
        past = self._before(self._parameters.get(PREFIX), len(contexts))
        return _Embedded(self._made_of(), *self._embed(contexts, past))

    def _before(self, prefix: Tensor | None, many: int) -> Past:
        """Return what stands before `many` sets of captions: a prefix (blocks, 2, T, d), if any."""
        tower = self._clip.towers.text_model
        return no_past(tower, many) if prefix is None else past_of(tower, prefix, many)

    def _embedded_with(self, name: str, contexts: Tensor) -> Tensor:
        """Return (K, N, C, projection), with K prompts in place of the live one called `name`."""
        if name == PREFIX:
            live = self._stacked(list(self._contexts().values()))
            before = [self._before(prefix, len(live)) for prefix in contexts]
            return torch.stack([self._embed(live, past)[0] for past in before])
        captions, kept = self._captions_of(self._loaded_task()), self._kept_captions()
        changed = (contexts != self._parameters[name]).any(dim=-1).flatten(0, -2).any(dim=0)
        # Up to P a vector stands at the same place in all captions.
        start = min([captions.shared, *captions.slots[0, changed].tolist()])
        several, ahead = self._prompt.prompts, self._prompt.prefix
        other = torch.tensor([of != name for of in self._contexts() for _ in range(several)])
        past = [
            (
                keys[~other, :, : ahead + start].repeat(len(contexts), 1, 1, 1),
                values[~other, :, : ahead + start].repeat(len(contexts), 1, 1, 1),
            )
            for keys, values in kept.past
        ]
        found, _ = self._embed(self._stacked(list(contexts)), past, start)
        rest = kept.embeddings[other].expand(len(contexts), -1, -1, -1)
        return torch.cat([found.view(len(contexts), several, *found.shape[1:]), rest], dim=1)

    def _embed(self, contexts: Tensor, past: Past, start: int = 0) -> tuple[Tensor, Past]:
        """Return (n, C, projection), of length 1, of contexts (n, 1 or C, M, d), and the past."""
        captions, towers = self._captions_of(self._loaded_task()), self._clip.towers
        states, after = captions.states(towers.text_model, contexts, past, start)
        return functional.normalize(towers.text_projection(states).float(), dim=-1), after

    def _stacked(self, contexts: Sequence[Tensor]) -> Tensor:
        """Return the contexts as (n, 1 or C, M, d)."""
        several = self._prompt.prompts > 1
        forms = []
        for context in contexts:
            if self._prompt.class_specific:
                forms.append(context.transpose(0, 1) if several else context[None])
            else:
                forms.append(context.reshape(-1, 1, *context.shape[-2:]))
        if forms:
            return torch.cat(forms)
        width = self._clip.towers.config.text_config.hidden_size
        return torch.zeros(1, 1, 0, width, device=self.device)

    def _captions_of(self, task: LabelledTask) -> Captions:
        names = task.class_names or task.labels
        if names not in self._captions:
            self._captions[names] = self._make_captions(names)
        return self._captions[names]

    def _make_captions(self, names: Sequence[str]) -> Captions:
        ids, slots = caption_ids(self._clip.tokenizer, names, self._prompt)
        longest, room = max(map(len, ids)), self._text_room()
        if longest > room:
            name = names[max(range(len(ids)), key=lambda at: len(ids[at]))]
            raise ConfigError(
                f"adapter.prompt.length = {self._prompt.length}: the caption of class {name!r} "
                f"would have {longest} tokens; this model takes at most {room}"
            )
        filler = self._clip.tokenizer.pad_token_id or 0  # behind the end, where nobody looks
        padded = [row + [filler] * (longest - len(row)) for row in ids]
        # They are kept for training too, even where evaluation asks first.
        with torch.inference_mode(False), torch.no_grad():
            words = self._clip.towers.text_model.embeddings.token_embedding(
                torch.tensor(padded, device=self.device)
            )
            return Captions(
                words,
                torch.tensor(slots, device=self.device, dtype=torch.int64).view(len(ids), -1),
                torch.tensor([len(row) - 1 for row in ids], device=self.device),
                shared_tokens(ids, slots, self._prompt.class_specific),
            )

    def _embed_pictures(self, pixels: Tensor) -> Tensor:
        """Return (n, projection), of length 1."""
        towers = self._clip.towers
        read = picture_state(towers.vision_model, pixels, self._parameters.get(VISUAL))
        return functional.normalize(towers.visual_projection(read).float(), dim=-1)

    def _embedded_words(self) -> Tensor:
        """Return the embeddings (words, d) that the context starts as."""
        ids = self._clip.tokenizer(self._prompt.words, add_special_tokens=False)["input_ids"]
        if len(ids) > self._prompt.length:
            raise ConfigError(
                f"adapter.prompt.words = {self._prompt.words!r} are {len(ids)} tokens; "
                f"adapter.prompt.length = {self._prompt.length} leaves too little room"
            )
        with torch.no_grad():
            embedded: Tensor = self._clip.towers.text_model.embeddings.token_embedding(
                torch.tensor(ids, device=self.device, dtype=torch.int64)
            )
        return embedded

    def _text_room(self) -> int:
        return int(self._clip.towers.config.text_config.max_position_embeddings)

    def _check(self) -> None:
        if not (self._prompt.length or self._prompt.prefix or self._prompt.visual):
            raise ConfigError(
                "adapter.prompt.length, prefix and visual are all 0: of a CLIP nothing would be "
                "trained"
            )
        blocks = self._clip.towers.config.vision_config.num_hidden_layers
        if self._prompt.visual and self._prompt.visual_blocks > blocks:
            raise ConfigError(
                f"adapter.prompt.visual_blocks = {self._prompt.visual_blocks}: the picture tower "
                f"has {blocks} blocks; choose at most that many"
            )

    def _loaded_task(self) -> LabelledTask:
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        return self._task


def _own_context(task: LabelledTask) -> str:
    return head_prefix(task.name) + "context"


def picture_state(tower: Any, pixels: Tensor, prompts: Tensor | None) -> Tensor:
    """Return what CLIP's picture tower reads off its class token, (n, width).

    `prompts` (blocks, T, width) stand behind the class token from the first block on; each further
    block of them replaces the block before (VPT-Deep).
    """
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for number, block in enumerate(tower.encoder.layers):
        if prompts is not None and number < len(prompts):
            replaced = prompts.shape[1] if number else 0
            inserted = prompts[number].expand(len(hidden), -1, -1).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :1], inserted, hidden[:, 1 + replaced :]], dim=1)
        hidden = block(hidden, None)
    read: Tensor = tower.post_layernorm(hidden[:, 0])
    return read
