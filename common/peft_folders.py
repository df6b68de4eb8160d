"""Folders in PEFT's format: read as plain safetensors and JSON, without PEFT or a base model.

Names are PEFT's: `base_model.model.<module>.lora_A.weight` (r, in), `....lora_B.weight` (out, r),
`....lora_B.bias` (out,) of adapters with `lora_bias`, and `base_model.model.<parameter>` for what
`modules_to_save` keeps whole. With s = alpha/r, or alpha/√r where `use_rslora`, a module adds
`s·(B·A·x + b)`. The shapes are the same for linear layers and for GPT-2's Conv1D, whatever
`fan_in_fan_out` says.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import DataError
from common.lowrank import Term, adapted_modules, factor_names
from common.tensors import Tensors

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_BIAS = ".lora_B.bias"
_LORA = re.compile(r"(^|\.)lora_")
_FLOATS = ("F64", "F32", "F16", "BF16")

# Settings under which the adapter is not `s·(B·A·x + b)` on linear layers, and why.
_NOT_PLAIN: Mapping[str, str] = {
    "use_dora": "DoRA's magnitudes are not linear in the delta",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal factors are not plain LoRA",
    "use_monteclora": "its factors are random",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA has singular values of its own",
    "monteclora_config": "its factors are random",
    "layer_replication": "it changes which layers there are",
    "megatron_config": "layers that Megatron has split are not read",
    "target_parameters": "factors of bare parameters, as of experts, are not read",
    "trainable_token_indices": "trained tokens are not read",
}
# Starts that leave the base as it was. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of
# the base's weights into the factors, at one rank, and PEFT does so again when it loads them.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftFolder:
    """One LoRA adapter on disk; `shapes` are of all its tensors, which are read when asked for."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Return the modules with factors, sorted, by full name (`base_model.model....`)."""
        return tuple(adapted_modules(self.shapes))

    @property
    def saved_whole(self) -> tuple[str, ...]:
        """Return the names of what is no part of a LoRA: heads and other `modules_to_save`."""
        return tuple(sorted(name for name in self.shapes if not _LORA.search(name)))

    @property
    def base(self) -> tuple[str | None, str | None]:
        """Return the base model's name or path, and its revision."""
        return self.config.get("base_model_name_or_path"), self.config.get("revision")

    @property
    def rslora(self) -> bool:
        """Say whether s = alpha/√r."""
        return bool(self.config.get("use_rslora"))

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module, whether it is adapted or not."""
        return int(self._setting("r", "rank_pattern", module))

    def scale(self, module: str) -> float:
        """Return s of a module."""
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        return scale_of(alpha, self.rank(module), self.rslora)

    def size(self, module: str) -> tuple[int, int]:
        """Return (out, in) features of an adapted module."""
        name_B, name_A = factor_names(module)
        return self.shapes[name_B][0], self.shapes[name_A][1]

    def term(self, module: str) -> Term:
        """Read the factors of an adapted module."""
        name_B, name_A = factor_names(module)
        return Term(self.tensor(name_B), self.tensor(name_A))

    def bias(self, module: str) -> Tensor | None:
        """Read b (out,) of an adapted module, if it has one."""
        name = bias_name(module)
        return self.tensor(name) if name in self.shapes else None

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            DataError: it holds numbers that are NaN or infinite.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(f"{self.folder}: {name} holds {bad} numbers that are NaN or infinite")
        return tensor

    def _setting(self, usual: str, pattern: str, module: str) -> float:
        """Look a module up as PEFT does: the first pattern that its name ends in."""
        name = module.removeprefix(PREFIX)
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return float(value)
        return float(self.config[usual])


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return s = alpha/r, or alpha/√r for rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def bias_name(module: str) -> str:
    """Return the name of b of a module in an adapter with `lora_bias`."""
    return module + _BIAS


def read_peft_folder(folder: Path) -> PeftFolder:
    """Open a folder that `PeftModel.save_pretrained` has written, of plain LoRA on linear layers.

    Raises:
        DataError: there is no such adapter, or it is of another kind, or its tensors are not what
            its configuration says.
    """
    config = _read_config(folder)
    file = _open_weights(folder)
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    for name, part in slices.items():
        if part.get_dtype() not in _FLOATS:
            raise DataError(f"{folder}: {name} is of type {part.get_dtype()}, not a float")
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    adapter = PeftFolder(folder, config, shapes, file)
    _check_tensors(adapter)
    return adapter


def write_peft_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write configuration and tensors into an existing folder, as PEFT does."""
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    if not file.is_file():
        below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {', '.join(map(str, below))}" if below else ""
        raise DataError(f"{folder} is no PEFT folder: it has no {CONFIG}{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no JSON object")
    _check_config(folder, config)
    return config


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise DataError(f"{folder}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for field, why in _NOT_PLAIN.items():
        if config.get(field):
            raise DataError(f"{folder}: {field} is set, and {why}; only plain LoRA can be merged")
    if config.get("bias") not in (None, "none"):
        raise DataError(
            f"{folder}: bias is {config['bias']!r}: biases of the base were trained, and only "
            "'none' can be merged (or lora_bias, which is a part of the adapter)"
        )
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise DataError(
            f"{folder}: init_lora_weights is {start!r}, which changes the base's weights; save the "
            "adapter as plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion))"
        )
    ranks = {"r": config.get("r"), **_pattern(folder, config, "rank_pattern")}
    alphas = {"lora_alpha": config.get("lora_alpha"), **_pattern(folder, config, "alpha_pattern")}
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"{folder}: {name} is {value!r}, not a rank of at least 1")
    for name, value in alphas.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise DataError(f"{folder}: {name} is {value!r}, not a positive alpha")


def _pattern(folder: Path, config: Mapping[str, Any], field: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise DataError(f"{folder}: {field} is {pattern!r}, not a table of modules")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise DataError(
                f"{folder}: {field} {key!r} is no regular expression: {error}"
            ) from None
    return {f"{field} of {key}": value for key, value in pattern.items()}


def _open_weights(folder: Path) -> Any:
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / PICKLED).is_file():
            raise DataError(
                f"{folder} has {PICKLED}, a pickle, which may run code; only safetensors are read: "
                "load it with PEFT and save_pretrained it again"
            )
        raise DataError(f"{folder} has no {WEIGHTS}")
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _check_tensors(adapter: PeftFolder) -> None:
    """Raise unless every factor has its partner, and the rank that the configuration says."""
    folder, shapes = adapter.folder, adapter.shapes
    if stray := sorted(name for name in shapes if not name.startswith(PREFIX)):
        raise DataError(f"{folder}: {stray[0]} does not begin with {PREFIX}, as PEFT's names do")
    known: set[str] = set(adapter.saved_whole)
    factors = [name for name in shapes if name.endswith((".lora_A.weight", ".lora_B.weight"))]
    for module in sorted({name.rsplit(".", 2)[0] for name in factors}):
        names = factor_names(module)
        if missing := [name for name in names if name not in shapes]:
            raise DataError(f"{folder}: {missing[0]} is missing, its other factor is there")
        _check_factors(adapter, module)
        known |= {*names, bias_name(module)}
    if unread := sorted(shapes.keys() - known):
        raise DataError(
            f"{folder}: {unread[0]} is no factor of a linear layer; adapters of embeddings and "
            "other kinds of LoRA cannot be merged"
        )
    if not adapter.modules:
        raise DataError(f"{folder} holds no LoRA factors at all")


def _check_factors(adapter: PeftFolder, module: str) -> None:
    name_B, name_A = factor_names(module)
    B, A = adapter.shapes[name_B], adapter.shapes[name_A]
    for name, shape in ((name_A, A), (name_B, B)):
        if len(shape) != 2:
            raise DataError(
                f"{adapter.folder}: {name} has shape {shape}: only linear layers can be merged, "
                "no convolutions"
            )
    rank = adapter.rank(module)
    if A[0] != rank or B[1] != rank:
        raise DataError(
            f"{adapter.folder}: {module} has factors B {B} and A {A}, and {CONFIG} says rank {rank}"
        )
    bias = adapter.shapes.get(bias_name(module), B[:1])
    if bias != B[:1]:
        raise DataError(f"{adapter.folder}: {bias_name(module)} has shape {bias}, not {B[:1]}")


def exact_pattern(module: str) -> str:
    """Return the key of `rank_pattern` and `alpha_pattern` that matches this module alone."""
    return "^" + re.escape(module.removeprefix(PREFIX))


def target_names(modules: Sequence[str]) -> list[str]:
    """Return `target_modules` for these modules, by the full names of the base model."""
    return [module.removeprefix(PREFIX) for module in modules]
