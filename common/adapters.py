"""Adapters: the only caller of PEFT. Builds LoRA on a shared backbone, reads and loads its state.

A model's state is `{name: tensor}`, float32, and exactly what can be trained, under names that do
not depend on PEFT's version:

- `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r),
- `head.<task>.<parameter>`, the classification head, which tasks do not share,
- `<module>.residual.weight` (out, in), a frozen dense delta beside the factors; only strategies
  that change the base model send one.
"""

import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.backbones import Preprocessor, PretrainedBackbone, load_base_model
from common.config import Adapter, Backbone
from common.copra import block_of, group_by_block
from common.errors import ConfigError
from common.features import Batch, Features
from common.lowrank import adapted_modules, factor_names, is_factor, kaiming_start
from common.residuals import is_residual, residual_name
from common.seeds import torch_generator
from common.stem import Stem
from common.tasks import LabelledTask
from common.tensors import Tensors, check_update, head_prefix, part_of

# PEFT has no defaults for vision models; these are its own for the others.
_DEFAULT_TARGETS = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("c_attn",))


class AdaptedBackbone:
    """One backbone with LoRA factors of every rank asked for, and a head for every task.

    It is shared by all clients that pass through a process. Nothing of one client can reach the
    next: `load` demands the complete trainable state and overwrites all of it.
    """

    def __init__(self, backbone: PretrainedBackbone, adapter: Adapter) -> None:
        self.backbone = backbone
        self._adapter = adapter
        self._targets = _choose_targets(backbone.encoder, adapter)
        self._layers: dict[str, Any] = {}
        self._residuals: dict[str, Tensor] = {}
        # One model, one user at a time: several runs may share this process.
        self.in_use = threading.RLock()
        self._rank = 0
        self._task: LabelledTask | None = None
        self._check_rank(adapter.server_rank)
        self._stem = _stem_of(backbone.encoder, adapter, self._targets)

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self.backbone.device

    @property
    def preprocessor(self) -> Preprocessor:
        """Return how rows become what it takes."""
        return self.backbone.preprocessor

    @property
    def base_fingerprint(self) -> str:
        """Return what tells its frozen base from others."""
        return self.backbone.fingerprint

    # --- shape of the state --------------------------------------------------------------------

    def shapes(self, rank: int, task: LabelledTask) -> dict[str, torch.Size]:
        """Return name and shape of every tensor that a model of `rank` and `task` can train."""
        heads = {name: parameter.shape for name, parameter in self._head(task).items()}
        return _factor_shapes(self._targets, rank) | heads

    def initial(
        self, tasks: tuple[LabelledTask, ...], seed: int, restart: int = 0
    ) -> dict[str, Tensor]:
        """Return the common start, of the largest rank: A as PEFT draws it, B zero, a fresh head.

        A client of rank r starts from the first r rows of A. Drawn from `seed` alone, so that
        every process can make the same start; each `restart` has an A of its own.
        """
        rank = self._adapter.server_rank
        state: dict[str, Tensor] = {}
        for module, (out_features, in_features) in self._targets.items():
            name_B, name_A = factor_names(module)
            state[name_A] = kaiming_start(rank, in_features, module, seed, restart)
            state[name_B] = torch.zeros(out_features, rank)
        spread = float(getattr(self.backbone.encoder.config, "initializer_range", 0.02))
        for task in tasks:
            for name, parameter in self._head(task).items():
                state[name] = _initial_head(name, parameter.shape, spread, seed)
        return state

    # --- state in and out ----------------------------------------------------------------------

    def load(self, state: Tensors, rank: int, task: LabelledTask) -> None:
        """Make `state` the model of `task` at `rank`: all trainable tensors, and residuals if any.

        Raises:
            UpdateRefusedError: a tensor is missing, unknown, of the wrong shape or not finite.
        """
        trainable = {n: t for n, t in state.items() if not is_residual(n)}
        residuals = {
            residual_name(module): torch.Size(size)
            for module, size in self._targets.items()
            if residual_name(module) in state
        }
        check_update(state, self.shapes(rank, task) | residuals)
        self._activate(rank)
        self._task = task
        parameters = self.parameters()
        with torch.no_grad():
            for name, tensor in trainable.items():
                parameters[name].copy_(tensor)
                parameters[name].grad = None
        self._residuals.clear()
        for module in self._targets:
            if (name := residual_name(module)) in state:
                self._residuals[module] = state[name].to(self.backbone.device, torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return a copy, on the CPU, of every trainable tensor of the loaded model."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live trainable parameters of the loaded model, in name order."""
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        live: dict[str, nn.Parameter] = {}
        for module, layer in self._layers.items():
            name_B, name_A = factor_names(module)
            live[name_B] = layer.lora_B[_slot(self._rank)].weight
            live[name_A] = layer.lora_A[_slot(self._rank)].weight
        live |= self._head(self._task)
        return dict(sorted(live.items()))

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """Return the adapted layers by the name of their module."""
        return self._layers

    def head_layer(self, name: str) -> nn.Module:
        """Return the layer of the loaded task's head whose tensors are called `name` and a dot."""
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        return self.module.get_submodule(name.removeprefix(head_prefix(self._task.name)))

    @property
    def blocks(self) -> list[list[Any]]:
        """Return the adapted layers, grouped by transformer block."""
        return group_by_block(self._layers)

    def logits(self, batch: Batch) -> Tensor:
        """Return (n, classes) logits of the loaded model."""
        with self._stem.bypass(batch.past_stem) if self._stem else nullcontext():
            output: Tensor = self.module(**batch.inputs).logits
        return output.float()

    @property
    def has_stem(self) -> bool:
        """Say whether rows can be taken past blocks that nothing changes."""
        return self._stem is not None

    def past_stem(self, features: Features) -> Features:
        """Return the rows past the stem, or as they are if there is none."""
        if self._stem is None or features.past_stem:
            return features
        with self.in_use:
            return self._stem.run(features, self.backbone.device)

    @property
    def module(self) -> nn.Module:
        """Return the loaded torch module, for its training and evaluation modes."""
        if self._task is None:
            raise RuntimeError("no state has been loaded yet")
        return self.backbone.classifier(len(self._task.labels))

    # --- inside --------------------------------------------------------------------------------

    def _head(self, task: LabelledTask) -> dict[str, nn.Parameter]:
        model = self.backbone.classifier(len(task.labels))
        prefix = head_prefix(task.name)
        head = {prefix + name: own for name, own in model.named_parameters(recurse=False)}
        # Around the encoder, not through it: every load and every state ask for this.
        for child, module in model.named_children():
            if child != model.base_model_prefix:
                head |= dict(module.named_parameters(prefix=prefix + child))
        return head

    def _check_rank(self, rank: int) -> None:
        for module, (out_features, in_features) in self._targets.items():
            if rank > min(out_features, in_features):
                raise ConfigError(
                    f"adapter.rank = {rank} is above the size of {module}, which is "
                    f"{out_features}x{in_features}; choose at most {min(out_features, in_features)}"
                )

    def _activate(self, rank: int) -> None:
        if rank == self._rank:
            return
        slot = _slot(rank)
        if not self._layers or slot not in next(iter(self._layers.values())).lora_A:
            self._inject(rank)
        for layer in self._layers.values():
            layer.set_adapter(slot)
        self._rank = rank

    def _inject(self, rank: int) -> None:
        peft = _peft()
        prefix = next(iter(self._targets)).split(".", 1)[0] + "."
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=self._adapter.alpha,
            use_rslora=self._adapter.rslora,
            lora_dropout=self._adapter.dropout,
            target_modules=[module.removeprefix(prefix) for module in self._targets],
            fan_in_fan_out=_stored_transposed(self.backbone.encoder, self._targets),
        )
        # PEFT draws its own start from the global stream; `load` overwrites it.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # It warns of a second adapter; here every rank has one of its own.
            warnings.simplefilter("ignore", UserWarning)
            peft.inject_adapter_in_model(config, self.backbone.encoder, adapter_name=_slot(rank))
        for module in self._targets:
            layer = self.backbone.encoder.get_submodule(module.removeprefix(prefix))
            if module not in self._layers:
                layer.register_forward_hook(self._residual_hook(module))
            self._layers[module] = layer

    def _residual_hook(self, module: str) -> Any:
        def add_residual(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            residual = self._residuals.get(module)
            if residual is None:
                return output
            return output + functional.linear(inputs[0], residual.to(inputs[0].dtype))

        return add_residual


def at_rank(state: Tensors, rank: int) -> dict[str, Tensor]:
    """Return a state cut to its first `rank` directions, as a client of that rank starts."""
    cut = {"lora_A": lambda t: t[:rank], "lora_B": lambda t: t[:, :rank]}
    return {
        name: cut[part_of(name)](tensor).contiguous() if is_factor(name) else tensor
        for name, tensor in state.items()
    }


def _factor_shapes(targets: Mapping[str, tuple[int, int]], rank: int) -> dict[str, torch.Size]:
    shapes = {}
    for module, (out_features, in_features) in targets.items():
        name_B, name_A = factor_names(module)
        shapes[name_A] = torch.Size((rank, in_features))
        shapes[name_B] = torch.Size((out_features, rank))
    return shapes


def _peft() -> Any:
    """Import PEFT, and bitsandbytes with it where that is there, without torch's word on itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import peft
    return peft


def _slot(rank: int) -> str:
    return f"rank{rank}"


def _initial_head(name: str, shape: torch.Size, spread: float, seed: int) -> Tensor:
    if len(shape) >= 2:
        return spread * torch.randn(shape, generator=torch_generator(seed, name))
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


def _linear_modules(encoder: Any) -> dict[str, Any]:
    """Return the pretrained linear modules by full name, quantised ones and GPT-2's included."""
    from transformers.pytorch_utils import Conv1D

    prefix = type(encoder).base_model_prefix
    return {
        f"{prefix}.{name}".replace(".base_layer", ""): module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
    }


def _size(module: Any) -> tuple[int, int]:
    """Return (out, in) features; GPT-2's Conv1D has names of its own for them."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx


def _stored_transposed(encoder: Any, targets: Iterable[str]) -> bool:
    """Say whether a target is GPT-2's Conv1D, with a weight (in, out); PEFT sorts out mixtures."""
    linear = _linear_modules(encoder)
    return any(not isinstance(linear[target], nn.Linear) for target in targets)


def _choose_targets(encoder: Any, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Return the modules to adapt, by full name, with (out, in) features."""
    linear = _linear_modules(encoder)
    endings = {name.rsplit(".", 1)[-1] for name in linear}
    wanted = adapter.targets or next(
        (names for names in _DEFAULT_TARGETS if set(names) <= endings), ()
    )
    if not wanted or not set(wanted) <= endings:
        raise ConfigError(
            f"adapter.targets = {list(adapter.targets)}: this backbone has linear modules that "
            f"end in {', '.join(sorted(endings)) or 'nothing (none at all)'}; choose among these"
        )
    chosen = {n: _size(m) for n, m in linear.items() if n.rsplit(".", 1)[-1] in set(wanted)}
    return _in_last_blocks(chosen, adapter.blocks) if adapter.blocks else chosen


def _in_last_blocks(
    targets: Mapping[str, tuple[int, int]], count: int
) -> dict[str, tuple[int, int]]:
    """Return the targets in the last `count` blocks."""
    blocks = sorted({block_of(name)[1] for name in targets})
    if count > len(blocks):
        raise ConfigError(
            f"adapter.blocks = {count}: this backbone has {len(blocks)} blocks with "
            "modules to adapt; choose at most that many, or 0 for all"
        )
    return {n: size for n, size in targets.items() if block_of(n)[1] in blocks[-count:]}


def _stem_of(encoder: Any, adapter: Adapter, targets: Iterable[str]) -> Stem | None:
    """Split off what lies below the lowest adapted block, if the adapter leaves anything there."""
    if not adapter.blocks:
        return None
    stack, lowest = min(block_of(name) for name in targets)
    prefix = type(encoder).base_model_prefix + "."
    return Stem(encoder, stack.removeprefix(prefix), lowest)


def export_peft(
    state: Tensors,
    backbone: Backbone,
    adapter: Adapter,
    task: LabelledTask,
    folder: Path,
) -> None:
    """Write `state` as a standard PEFT folder: `PeftModel.from_pretrained(base, folder)` takes it.

    The base is `AutoModelFor...Classification.from_pretrained(backbone, num_labels=...)`.

    Raises:
        UpdateRefusedError: the state has not exactly the tensors that PEFT expects.
    """
    peft = _peft()
    # An adapter is the same on any grid of its base.
    plain = backbone.model_copy(update={"quantised": "none"})
    base: Any = load_base_model(plain, task.kind, len(task.labels))
    base.config.id2label = dict(enumerate(task.labels))
    base.config.label2id = {label: index for index, label in enumerate(task.labels)}
    rank = state[factor_names(adapted_modules(state)[0])[1]].shape[0]
    prefix = head_prefix(task.name)
    inside = str(base.base_model_prefix) + "."
    head = {
        name: parameter.shape
        for name, parameter in base.named_parameters()
        if not name.startswith(inside)
    }
    encoder = getattr(base, base.base_model_prefix)
    targets = _choose_targets(encoder, adapter)
    check_update(
        state,
        _factor_shapes(targets, rank) | {prefix + name: shape for name, shape in head.items()},
    )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=adapter.scale(rank) * (rank**0.5 if adapter.rslora else rank),
        use_rslora=adapter.rslora,
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        fan_in_fan_out=_stored_transposed(encoder, targets),
        modules_to_save=sorted({name.split(".")[0] for name in head}),
        task_type={"text": "SEQ_CLS", "image": None}[task.kind],
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers by a name that is on its way out.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, config)
    named = {
        "base_model.model." + name.removeprefix(prefix): tensor for name, tensor in state.items()
    }
    peft.set_peft_model_state_dict(model, named)
    model.save_pretrained(str(folder))
