"""The prompt bank: trained soft prompts with all that one must know before using them elsewhere.

An entry is one safetensors file: the prompt, the neurons it activates if they are known, and text.
Nothing in it is code, and its checksum is over everything.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import ConfigError, DataError
from common.modality_gap import mmd
from common.nemesis import vector_norms
from common.prompt_transfer import uniform
from common.seeds import torch_generator
from common.tensors import Tensors, digest

FORMAT = "soft prompt 1"
FirstRow = Literal["trained", "meaningless"]
ENDING = ".safetensors"


@dataclass(frozen=True)
class Privacy:
    """(ε, δ) of the differential privacy under which a prompt was trained."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Fingerprint:
    """What tells prompts apart without a model; rows that mean nothing are left out.

    Attributes:
        norm: mean Euclidean norm of its vectors.
        norm_spread: their standard deviation.
        distance: multi-kernel MMD² to one fixed random start of VPT; about 0.06 at 100 vectors for
            what nothing has trained.
    """

    norm: float
    norm_spread: float
    distance: float


@dataclass(frozen=True, eq=False)
class BankEntry:
    """One source prompt.

    Attributes:
        name: how it is called in the bank: letters, digits, `-`, `_` and `.`.
        prompt: (l, d), float32 or float16, finite.
        backbone: the model it was trained on.
        backbone_digest: SHA-256 of that model's weights; empty if it is not known.
        task: what it was trained for.
        group: the kind of task, where prompts are compared by it.
        examples: rows it was trained on; None if not known.
        metric, score: how good it is at its own task, and by what measure; None if not known.
        first_row: `meaningless` where the model never saw row 0 of the prompt.
        licence: of the prompt.
        origin: where it comes from.
        privacy: None if it was trained without.
        neurons: bool, (neurons,): which of the backbone's it activates; None if not known.
    """

    name: str
    prompt: Tensor
    backbone: str
    task: str
    licence: str
    backbone_digest: str = ""
    group: str = ""
    examples: int | None = None
    metric: str = "accuracy"
    score: float | None = None
    first_row: FirstRow = "trained"
    origin: str = ""
    privacy: Privacy | None = None
    neurons: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise DataError(f"a prompt cannot be called {self.name!r}: letters, digits, - _ and .")
        if self.prompt.ndim != 2 or self.prompt.dtype not in (torch.float32, torch.float16):
            raise DataError(
                f"prompt {self.name}: {tuple(self.prompt.shape)} of {self.prompt.dtype} is not "
                "(length, width) of float32 or float16"
            )
        if not torch.isfinite(self.prompt).all():
            raise DataError(f"prompt {self.name} holds NaN or infinity")
        if self.first_row not in get_args(FirstRow):
            raise DataError(f"prompt {self.name}: first_row = {self.first_row!r} is neither of "
                            f"{', '.join(get_args(FirstRow))}")  # fmt: skip
        if len(self.prompt) <= (self.first_row == "meaningless"):
            raise DataError(f"prompt {self.name} has no vector that means anything")
        if self.neurons is not None and self.neurons.dtype != torch.bool:
            raise DataError(f"prompt {self.name}: neurons are bool, not {self.neurons.dtype}")

    @property
    def length(self) -> int:
        """Return how many vectors it has, meaningless ones included."""
        return self.prompt.shape[0]

    @property
    def width(self) -> int:
        """Return how wide they are."""
        return self.prompt.shape[1]

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of the tensors and of all that is said about them."""
        said = json.dumps(_said(self), sort_keys=True)
        return hashlib.sha256((said + digest(_tensors(self))).encode()).hexdigest()

    def rows(self) -> Tensor:
        """Return the vectors that mean something, float32: without row 0 where it does not."""
        return self.prompt[int(self.first_row == "meaningless") :].float()

    def all_rows(self, first: Tensor | None = None) -> Tensor:
        """Return all vectors, float32; with `first` (d,) in the place of row 0 if given.

        As published is without: a meaningless row 0 stays. What the model did see there is the
        embedding of its mask token.
        """
        rows = self.prompt.to(torch.float32, copy=True)
        if first is not None:
            if first.shape != (self.width,):
                raise ConfigError(
                    f"prompt {self.name}: a first row of shape {tuple(first.shape)} is not "
                    f"({self.width},)"
                )
            rows[0] = first
        return rows

    def fingerprint(self) -> Fingerprint:
        """Return what tells it apart."""
        rows = self.rows()
        norms = vector_norms(rows)
        bound = (3 / self.width) ** 0.5
        start = uniform(rows.shape, bound, torch_generator(0, "fingerprint", *rows.shape))
        spread = float(norms.std()) if len(norms) > 1 else 0.0
        return Fingerprint(float(norms.mean()), spread, mmd(rows, start))

    def halved(self) -> "BankEntry":
        """Return it in float16, half as large.

        Raises:
            DataError: a number is too large for that.
        """
        return replace(self, prompt=self.prompt.half())


def capped(prompt: Tensor, longest: float) -> Tensor:
    """Return the prompt (..., d) with vectors above this norm scaled back to it.

    A vector of huge norm can take all attention of the model it is given to, by accident or by
    intent.

    Raises:
        ConfigError: the norm is not above 0.
    """
    if not longest > 0:
        raise ConfigError(f"the longest norm {longest} must be above 0")
    norms = vector_norms(prompt)[..., None]
    return prompt * (longest / norms.clamp_min(longest)).to(prompt)


# --- files ------------------------------------------------------------------------------------


def save_entry(entry: BankEntry, folder: Path) -> Path:
    """Write an entry to `folder`, made if need be, and return the file.

    Raises:
        ConfigError: the folder has a prompt of this name already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (entry.name + ENDING)
    if path.exists():
        raise ConfigError(f"{path} is there already; remove it, or choose another name")
    found = entry.fingerprint()
    told = {
        "format": FORMAT,
        "checksum": entry.checksum,
        "entry": json.dumps(_said(entry), sort_keys=True),
        "shape": json.dumps([entry.length, entry.width]),
        "fingerprint": json.dumps(vars(found)),
    }
    save_file(_tensors(entry), path, metadata=told)
    path.chmod(0o644)  # safetensors writes it for its owner alone
    return path


def load_entry(path: str | Path) -> BankEntry:
    """Read an entry.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no prompt of a bank, or is not what its checksum says.
    """
    told, tensors = _read(Path(path))
    if told.get("format") != FORMAT:
        raise DataError(f"{path} is no prompt of a bank: its format is not {FORMAT!r}")
    try:
        entry = _entry(json.loads(told["entry"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no prompt of a bank: {error}") from None
    if entry.checksum != told.get("checksum"):
        raise DataError(f"{path} is damaged or was changed: its checksum does not fit")
    return entry


def holds_entry(path: str | Path) -> bool:
    """Say whether a file claims to be an entry of a bank.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no safetensors file.
    """
    told, _ = _read(Path(path))
    return told.get("format") == FORMAT


def load_bank(folder: Path) -> dict[str, BankEntry]:
    """Return all entries of a folder, by name.

    Raises:
        ConfigError: there is no such folder, or no prompt in it.
        DataError: as `load_entry`; or two files hold prompts of one name.
    """
    files = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder} holds no prompts (*{ENDING})")
    bank: dict[str, BankEntry] = {}
    for file in files:
        entry = load_entry(file)
        if entry.name in bank:
            raise DataError(f"{file}: there is another prompt called {entry.name}")
        bank[entry.name] = entry
    return bank


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            return told, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise DataError(f"{path} is no safetensors file: {error}") from None


def _tensors(entry: BankEntry) -> dict[str, Tensor]:
    tensors = {"prompt": entry.prompt.contiguous()}
    return tensors if entry.neurons is None else tensors | {"neurons": entry.neurons.contiguous()}


def _said(entry: BankEntry) -> dict[str, Any]:
    """Return all that is no tensor."""
    said = {f.name: getattr(entry, f.name) for f in fields(entry)}
    privacy = said.pop("privacy")
    del said["prompt"], said["neurons"]
    return said | {"privacy": vars(privacy) if privacy else None}


def _entry(said: Mapping[str, Any], tensors: Tensors) -> BankEntry:
    privacy = Privacy(**said["privacy"]) if said["privacy"] else None
    others = {name: value for name, value in said.items() if name != "privacy"}
    return BankEntry(
        prompt=tensors["prompt"], neurons=tensors.get("neurons"), privacy=privacy, **others
    )


# --- published prompts --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Published:
    """What is known of a published prompt: its task, and accuracy on development rows."""

    name: str
    group: str
    examples: int
    score: float


# thunlp/Prompt-Transferability (MIT), by the name of the tensor. Sizes of training sets are those
# that the authors of cross-modality prompt transfer rank by.
_ROBERTA_BASE: Mapping[str, _Published] = {
    "IMDB": _Published("imdb", "sentiment", 25_000, 0.8971),
    "SST2": _Published("sst2", "sentiment", 67_349, 0.9327),
    "laptop": _Published("laptop", "sentiment", 3_045, 0.7531),
    "restaurant": _Published("restaurant", "sentiment", 3_041, 0.7950),
    "movierationales": _Published("movie-rationales", "sentiment", 1_600, 0.7604),
    "tweetevalsentiment": _Published("tweet-sentiment", "sentiment", 45_389, 0.7450),
    "MNLI": _Published("mnli", "inference", 392_702, 0.7991),
    "QNLI": _Published("qnli", "inference", 104_743, 0.9055),
    "snli": _Published("snli", "inference", 549_367, 0.8846),
    "ethicsdeontology": _Published("ethics-deontology", "ethics", 18_164, 0.7168),
    "ethicsjustice": _Published("ethics-justice", "ethics", 21_791, 0.6775),
    "QQP": _Published("qqp", "paraphrase", 363_846, 0.8693),
    "MRPC": _Published("mrpc", "paraphrase", 3_668, 0.8438),
}


def published_roberta_prompts(path: str | Path) -> dict[str, BankEntry]:
    """Return the 13 prompts for roberta-base of Su et al. (NAACL 2022), by our names.

    From a safetensors file with one tensor (100, 768) a task, under the authors' names. The model
    never saw row 0: at that place it was given the embedding of `<mask>`, while the stored row
    drifted under gradients that meant another. See `BankEntry.rows` and `BankEntry.all_rows`.

    Raises:
        ConfigError: there is no such file.
        DataError: a tensor is missing, or none of these.
    """
    _, tensors = _read(Path(path))
    if tensors.keys() != _ROBERTA_BASE.keys():
        differing = sorted(tensors.keys() ^ _ROBERTA_BASE.keys())
        raise DataError(f"{path} is not the 13 prompts for roberta-base: {', '.join(differing)}")
    return {
        known.name: BankEntry(
            known.name,
            tensors[theirs],
            backbone="roberta-base",
            task=known.name,
            licence="MIT",
            group=known.group,
            examples=known.examples,
            score=known.score,
            first_row="meaningless",
            origin="thunlp/Prompt-Transferability",
        )
        for theirs, known in _ROBERTA_BASE.items()
    }
