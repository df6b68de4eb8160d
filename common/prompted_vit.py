"""Soft prompts of a frozen ViT with a linear head: VPT, and prompts that come from text.

VPT (arXiv 2203.12119) puts trained vectors among the patches, shallow or deep; prompt transfer
(`common.prompt_transfer`) makes such vectors from a prompt that was learned on text. With neither,
what is trained is the head alone: a linear probe.

A model's state, float32:

- `prompt.image` (blocks, T, width), VPT's; or the prompt that a projection makes, where that is
  what travels;
- `transfer.*` and `own.image`, what a transfer trains (`common.prompt_transfer`);
- `head.<task>.classifier.weight` (C, width) and `.bias` (C,).
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.backbones import Preprocessor, PretrainedBackbone
from common.config import Adapter, Prompt
from common.config import Transfer as TransferConfig
from common.control_prompts import CONTROLS
from common.errors import ConfigError
from common.features import Batch, Features
from common.prompt_bank import BankEntry, capped, load_entry
from common.prompt_transfer import (
    Attention,
    Frozen,
    Projection,
    Transfer,
    fold,
    uniform,
    vpt_bound,
)
from common.seeds import child_seed, torch_generator
from common.tasks import LabelledTask
from common.tensors import Tensors, check_update, head_prefix

VISUAL = "prompt.image"
_PICTURES_AT_ONCE = 64
Place = Literal["behind", "front"]


class PromptedVit:
    """One frozen ViT with a soft prompt and a linear head; see `common.models.Model`.

    Where the prompt of a projection travels and not the map, training starts from the prompt that
    was loaded, `P + S ΔWᵀ + 1 Δbᵀ`, the map's change being 0 each time. The mean of such prompts is
    the prompt of the mean map, at l·d numbers in place of d·d_s + d; the map itself is lost.

    Raises:
        ConfigError: a setting is for captions, there are fewer blocks than prompts, or a source
            prompt does not fit.
    """

    def __init__(self, backbone: PretrainedBackbone, adapter: Adapter) -> None:
        self._backbone, self._prompt = backbone, adapter.prompt
        # Its dropout stays off in training, as VPT has it.
        self._vit = backbone.encoder.eval()
        self.in_use = threading.RLock()
        config = self._vit.config
        _check(adapter.prompt, config.num_hidden_layers)
        self._bound = vpt_bound(config.patch_size, config.hidden_size, config.num_channels)
        self._transfer = load_transfer(
            adapter.transfer, config.hidden_size, self._bound, backbone.device
        )
        self._sends_prompt = adapter.transfer.travels == "prompt"
        self._sent: Tensor | None = None
        self._trained = nn.Module()
        self._parameters: dict[str, nn.Parameter] = {}
        self._task: LabelledTask | None = None

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self._backbone.device

    @property
    def preprocessor(self) -> Preprocessor:
        """Return how pictures become what it takes."""
        return self._backbone.preprocessor

    @property
    def base_fingerprint(self) -> str:
        """Return what tells its frozen base from others."""
        return self._backbone.fingerprint

    @property
    def vit(self) -> Any:
        """Return the frozen ViT."""
        return self._vit

    @property
    def module(self) -> nn.Module:
        """Return a module without layers: whatever mode it is set to, the ViT stays as it is."""
        return self._trained

    @property
    def blocks(self) -> list[list[Any]]:
        """Return nothing: no block carries an adapter that could be switched off."""
        return []

    @property
    def has_stem(self) -> bool:
        """Say whether nothing is trained but the head, so that the ViT sees each picture once."""
        return not self._prompt_shapes()

    # --- state ---------------------------------------------------------------------------------

    def shapes(self, rank: int, task: LabelledTask) -> dict[str, torch.Size]:
        """Return name and shape of every tensor that can be trained; `rank` has no meaning here."""
        weight, bias = _head_names(task)
        head = {
            weight: torch.Size((len(task.labels), self._vit.config.hidden_size)),
            bias: torch.Size((len(task.labels),)),
        }
        return self._prompt_shapes() | head

    def initial(
        self, tasks: tuple[LabelledTask, ...], seed: int, restart: int = 0
    ) -> dict[str, Tensor]:
        """Return the common start: VPT's or the transfer's, and heads as PyTorch draws them."""
        state: dict[str, Tensor] = {}
        if self._transfer:
            started = self._transfer.start(child_seed(seed, "transfer", restart))
            on_device = {name: tensor.to(self.device) for name, tensor in started.items()}
            prompt = {VISUAL: fold(self._transfer, on_device).cpu()[None]}
            state |= prompt if self._sends_prompt else started
        elif self._prompt.visual:
            stream = torch_generator(seed, VISUAL, restart)
            state[VISUAL] = uniform(self._prompt_shapes()[VISUAL], self._bound, stream)
        for task in tasks:
            for name in _head_names(task):
                shape = self.shapes(0, task)[name]
                bound = float(self._vit.config.hidden_size**-0.5)
                state[name] = uniform(shape, bound, torch_generator(seed, name))
        return state

    def load(self, state: Tensors, rank: int, task: LabelledTask) -> None:
        """Make `state` the prompt and head in use.

        Raises:
            UpdateRefusedError: a tensor is missing, unknown, of the wrong shape or not finite.
        """
        shapes = self.shapes(rank, task)
        check_update(state, shapes)
        self._task = task
        values = {name: state[name] for name in shapes}
        if self._transfer and self._sends_prompt:
            self._sent = values.pop(VISUAL).to(self.device, torch.float32, copy=True)
            values |= {n: torch.zeros(shape) for n, shape in self._transfer.shapes().items()}
        self._parameters = {
            name: nn.Parameter(values[name].to(self.device, torch.float32, copy=True))
            for name in sorted(values)
        }

    def state(self) -> dict[str, Tensor]:
        """Return a copy, on the CPU, of every trained tensor."""
        values: dict[str, Tensor] = dict(self.parameters())
        if self._transfer and self._sends_prompt:
            made = self._prompts()
            assert made is not None
            heads = _head_names(self._loaded_task())
            values = {VISUAL: made, **{name: values[name] for name in heads}}
        return {name: value.detach().cpu().clone() for name, value in values.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live trained tensors, in name order."""
        self._loaded_task()
        return dict(self._parameters)

    def folded(self) -> dict[str, Tensor]:
        """Return the state of the same model without a transfer: its prompt as VPT's, and the head.

        The logits are the same. A model of `adapter.prompt.visual` vectors, as many as the prompt
        has, loads it; the source is needed no more.
        """
        state = self.state()
        if not self._transfer or self._sends_prompt:
            return state
        prompt = fold(self._transfer, self._parameters).cpu()[None]
        heads = _head_names(self._loaded_task())
        return {VISUAL: prompt, **{name: state[name] for name in heads}}

    # --- what it computes ----------------------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        """Return (n, C) in float32."""
        weight, bias = (self._parameters[name] for name in _head_names(self._loaded_task()))
        if batch.past_stem:
            read = batch.inputs["embeddings"]
        else:
            read = class_state(self._vit, batch.inputs["pixel_values"], self._prompts())
        return functional.linear(read, weight, bias).float()

    def past_stem(self, features: Features) -> Features:
        """Return what the ViT makes of each picture, (n, width), on the CPU; or the rows as is."""
        if not self.has_stem or features.past_stem:
            return features
        prompts = self._prompts()
        with self.in_use, torch.no_grad():
            found = [
                class_state(self._vit, batch.inputs["pixel_values"], prompts).cpu()
                for batch in features.batches(_PICTURES_AT_ONCE, self.device)
            ]
        return Features({"embeddings": torch.cat(found)}, features.labels, past_stem=True)

    def patch_embeddings(self, features: Features) -> Tensor:
        """Return (n, patches, width), float32: what the first block gets, without the class token.

        Patch projection and position; what the modality gap is measured to.
        """
        with self.in_use, torch.no_grad():
            found = [
                self._vit.embeddings(batch.inputs["pixel_values"])[:, 1:].cpu()
                for batch in features.batches(_PICTURES_AT_ONCE, self.device)
            ]
        return torch.cat(found)

    # --- inside --------------------------------------------------------------------------------

    def _prompt_shapes(self) -> dict[str, torch.Size]:
        if self._transfer and self._sends_prompt:
            width = self._vit.config.hidden_size
            return {VISUAL: torch.Size((1, self._transfer.length, width))}
        if self._transfer:
            return self._transfer.shapes()
        prompt, width = self._prompt, self._vit.config.hidden_size
        if not prompt.visual:
            return {}
        return {VISUAL: torch.Size((prompt.visual_blocks, prompt.visual, width))}

    def _prompts(self) -> Tensor | None:
        """Return the live prompts (blocks, T, width), if there are any."""
        if self._transfer:
            made = self._transfer.prompt(self._parameters)[None]
            return made if self._sent is None else self._sent + made
        return self._parameters.get(VISUAL)

    def _loaded_task(self) -> LabelledTask:
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        return self._task


def _head_names(task: LabelledTask) -> tuple[str, str]:
    prefix = head_prefix(task.name) + "classifier."
    return prefix + "weight", prefix + "bias"


_OF_PICTURES = ("visual", "visual_blocks")


def _check(prompt: Prompt, blocks: int) -> None:
    unused = Prompt(length=0)
    for key in (key for key in Prompt.model_fields if key not in _OF_PICTURES):
        if (given := getattr(prompt, key)) != (wanted := getattr(unused, key)):
            raise ConfigError(
                f"adapter.prompt.{key} = {given!r} is for captions or texts, which a ViT has not; "
                f"set it to {wanted!r}, and adapter.prompt.visual to the vectors among the patches"
            )
    if prompt.visual and prompt.visual_blocks > blocks:
        raise ConfigError(
            f"adapter.prompt.visual_blocks = {prompt.visual_blocks}: the ViT has {blocks} blocks; "
            "choose at most that many"
        )


# --- transfers from the bank ---------------------------------------------------------------------


def load_transfer(
    config: TransferConfig, width: int, bound: float, device: torch.device
) -> Transfer | None:
    """Return the transfer to prompts of this width, its sources loaded; None for `none`.

    Raises:
        ConfigError: a source is not there, or does not fit the target or the other sources.
        DataError: a source is damaged.
    """
    if config.kind == "none":
        return None
    entries = [load_entry(source) for source in config.sources]
    if len({entry.width for entry in entries}) > 1:
        widths = ", ".join(f"{entry.name} {entry.width}" for entry in entries)
        raise ConfigError(f"adapter.transfer.sources: widths must be one, not {widths}")
    parts = [source_rows(entry, config) for entry in entries]
    return _TRANSFERS[config.kind](torch.cat(parts).to(device), width, bound, config)


def source_rows(entry: BankEntry, config: TransferConfig) -> Tensor:
    """Return the vectors (n, d_s) that a transfer starts from: the source's, or its control's.

    Without a row that means nothing, unless as published, and capped.
    """
    rows = entry.all_rows() if config.paper_exact else entry.rows()
    if config.norm_cap:
        rows = capped(rows, config.norm_cap)
    if config.control == "none":
        return rows
    stream = torch_generator(config.draw, "control", config.control, entry.name)
    return CONTROLS[config.control](rows, stream)


def bridged(rows: Tensor, width: int, config: TransferConfig) -> Tensor:
    """Return source vectors as vectors of the target's width: themselves, or by a fixed map.

    The map is what a projection of this `draw` starts as, the same for all sources of a width.

    Raises:
        ConfigError: the widths differ, and the map would only cut vectors off or fill them up.
    """
    if rows.shape[1] == width:
        return rows
    if config.begin == "identity":
        raise ConfigError(
            f"a source of width {rows.shape[1]} has no place among vectors of width {width} as it "
            "is; for a fixed map choose adapter.transfer.begin = 'orthogonal' or 'uniform'"
        )
    projection = Projection(rows, width, config.begin)
    started = projection.start(child_seed(config.draw, "bridge"))
    with torch.no_grad():
        return projection.prompt({n: t.to(rows.device) for n, t in started.items()})


def _frozen(source: Tensor, width: int, _: float, config: TransferConfig) -> Transfer:
    return Frozen(bridged(source, width, config), width)


def _projection(source: Tensor, width: int, _: float, config: TransferConfig) -> Transfer:
    return Projection(source, width, config.begin)


def _attention(source: Tensor, width: int, bound: float, config: TransferConfig) -> Transfer:
    return Attention(
        source,
        width,
        bound,
        length=config.length,
        concentrated=config.concentrated,
        scaled=not config.paper_exact,
        unit_rows=not config.paper_exact,
        top=config.top,
    )


_TRANSFERS: Mapping[str, Callable[[Tensor, int, float, TransferConfig], Transfer]] = {
    "frozen": _frozen,
    "projection": _projection,
    "attention": _attention,
}


# --- the ViT, composed from its parts -------------------------------------------------------------


def class_state(
    vit: Any, pixels: Tensor, prompts: Tensor | None, place: Place = "behind"
) -> Tensor:
    """Return what the ViT's head reads, the class token's last normalised state (n, width).

    `prompts` (blocks, T, width) go in after position embeddings, without any of their own, from the
    first block on; each further block of them replaces the block before (VPT-Deep). They stand
    `behind` the class token, as VPT has it, or in `front` of it, as prompt transfer has it: blocks
    do not see order, so that both are one function.
    """
    hidden: Tensor = vit.embeddings(pixels)
    start = {"behind": 1, "front": 0}[place]
    for number, block in enumerate(vit.layers):
        if prompts is not None and number < len(prompts):
            replaced = prompts.shape[1] if number else 0
            inserted = prompts[number].expand(len(hidden), -1, -1).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :start], inserted, hidden[:, start + replaced :]], dim=1)
        hidden = block(hidden, None)
    at = 0 if prompts is None or place == "behind" else prompts.shape[1]
    read: Tensor = vit.layernorm(hidden[:, at])
    return read


def activated_neurons(vit: Any, prompt: Tensor, blocks: int = 3) -> Tensor:
    """Return which neurons of the feed-forward layers a prompt (T, width) activates: (neurons,).

    Of the class token in the last `blocks` blocks, where the ViT sees the prompt and that token
    alone: no picture, and no position. For `common.prompt_similarity.activation_overlap`.

    Raises:
        ConfigError: the prompt is of another width, or there are not as many blocks.
    """
    width, layers = vit.config.hidden_size, vit.layers
    if prompt.ndim != 2 or prompt.shape[1] != width or not 1 <= blocks <= len(layers):
        raise ConfigError(
            f"a prompt of shape {tuple(prompt.shape)} and {blocks} blocks do not fit a ViT of "
            f"width {width} and {len(layers)} blocks"
        )
    found: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        found.append(output[0, -1] > 0)

    hooks = [block.mlp.fc1.register_forward_hook(note) for block in layers[-blocks:]]
    try:
        with torch.no_grad():
            token = vit.embeddings.cls_token
            hidden = torch.cat([prompt[None].to(token), token], dim=1)
            for block in layers:
                hidden = block(hidden, None)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found).cpu()
