"""The prompt bank from the outside: prompts of finished runs go in, and what is in it is told."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from common.errors import ConfigError
from common.models import load_model
from common.prompt_bank import (
    ENDING,
    BankEntry,
    holds_entry,
    load_entry,
    published_roberta_prompts,
    save_entry,
)
from common.prompt_similarity import activation_overlap, cosine_of_means, group_means
from common.prompted_text import PromptedText
from common.prompted_text import activated_neurons as neurons_of_text
from common.prompted_vit import VISUAL, PromptedVit
from common.prompted_vit import activated_neurons as neurons_of_vit
from common.tasks import LabelledTask, load_tasks
from common.tensors import Tensors, digest, only
from server.analysis.stored_run import StoredRun

NOT_STATED = "not stated"


def entries_of_run(run: StoredRun, licence: str = NOT_STATED, prefix: str = "") -> list[BankEntry]:
    """Return the prompts that a run has trained, one a task, with all that its record says of them.

    Of texts, or of pictures in the first block; a trained transfer is folded into a plain prompt.

    Raises:
        ConfigError: the run has no single model, or no such prompt.
    """
    experiment, served = run.experiment, run.one_model()
    tasks = load_tasks(experiment.task)
    adapter, device = experiment.adapter, experiment.train.device
    if adapter.kind != "prompt":
        raise ConfigError(
            f"{run.folder}: adapter.kind = {adapter.kind!r}, which has no soft prompts; choose a "
            "run with adapter.kind = 'prompt'"
        )
    model = load_model(experiment.backbone, tasks[0].kind, adapter, device)
    if not isinstance(model, PromptedText | PromptedVit):
        raise ConfigError(
            f"{run.folder}: a bank holds prompts of text encoders and of ViTs, not of "
            f"{experiment.backbone.label!r}"
        )
    return [_entry(run, model, served.tensors, task, licence, prefix) for task in tasks]


def _entry(
    run: StoredRun,
    model: PromptedText | PromptedVit,
    tensors: Tensors,
    task: LabelledTask,
    licence: str,
    prefix: str,
) -> BankEntry:
    record = run.record
    described, final = record["task"], record["final"]
    with model.in_use:
        model.load(only(tensors, set(model.shapes(0, task))), 0, task)
        prompt, neurons, encoder = _prompt_of(model, task, run.folder)
    scored = final.get("tasks", {}).get(task.name, final)
    return BankEntry(
        prefix + _slug(task.name),
        prompt,
        backbone=run.experiment.backbone.label,
        backbone_digest=digest(encoder.state_dict()),
        task=task.name,
        licence=licence,
        group=task.kind,
        examples=sum(
            client["num_examples"] for client in described["clients"] if client["task"] == task.name
        ),
        metric=f"accuracy on {described['evaluated_on']} rows",
        score=scored["accuracy"],
        origin=f"{record['label']}, seed {record['seed']}, served {record['digest'][:12]}",
        neurons=neurons,
    )


def _prompt_of(
    model: PromptedText | PromptedVit, task: LabelledTask, folder: Path
) -> tuple[Tensor, Tensor, Any]:
    """Return the loaded model's prompt (l, d), the neurons it activates, and its encoder."""
    if isinstance(model, PromptedText):
        if (name := model.prompt_name(task)) in model.state():
            prompt = model.state()[name]
            return prompt, neurons_of_text(model.text, prompt), model.text.encoder
    else:
        folded = model.folded()
        if VISUAL in folded and len(folded[VISUAL]) == 1:
            prompt = folded[VISUAL][0]
            blocks = min(3, len(model.vit.layers))
            return prompt, neurons_of_vit(model.vit, prompt, blocks), model.vit
    raise ConfigError(f"{folder}: there is no prompt of the first layer to put into a bank")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def entries_of_file(file: Path) -> list[BankEntry]:
    """Return the prompts in a file: an entry of another bank, or the 13 published for roberta-base.

    Raises:
        ConfigError: there is no such file.
        DataError: it is neither, or is damaged.
    """
    if holds_entry(file):
        return [load_entry(file)]
    return list(published_roberta_prompts(file).values())


def put_into(bank: Path, entries: Sequence[BankEntry]) -> list[Path]:
    """Write entries into a bank; all or none.

    Raises:
        ConfigError: one of their names is taken.
    """
    names = [entry.name for entry in entries]
    for name in names:
        if (bank / (name + ENDING)).exists() or names.count(name) > 1:
            raise ConfigError(
                f"{bank} has a prompt called {name} already; remove it, or give --prefix"
            )
    return [save_entry(entry, bank) for entry in entries]


def describe(bank: Mapping[str, BankEntry]) -> dict[str, Any]:
    """Return all that is known of the prompts of a bank, and how alike they are, for JSON.

    Rows that mean nothing are left out of norms and similarities. `cosine` is that of mean vectors,
    of prompts of one width; `overlap` that of the neurons they activate, of one backbone.
    `norm_and_examples` is Spearman's rho between norms and sizes of training sets: where it is
    high, a source that looks good may be good for its norm alone.
    """
    names = sorted(bank)
    prints = {name: bank[name].fingerprint() for name in names}
    return {
        "prompts": [_described(bank[name]) | vars(prints[name]) for name in names],
        "names": names,
        "cosine": [[_cosine(bank[a], bank[b]) for b in names] for a in names],
        "overlap": [[_overlap(bank[a], bank[b]) for b in names] for a in names],
        "groups": _group_means(bank, names),
        "norm_and_examples": _rho([(prints[n].norm, bank[n].examples) for n in names]),
    }


def _described(entry: BankEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "task": entry.task,
        "group": entry.group,
        "backbone": entry.backbone,
        "backbone_digest": entry.backbone_digest,
        "length": entry.length,
        "width": entry.width,
        "type": str(entry.prompt.dtype).removeprefix("torch."),
        "first_row": entry.first_row,
        "examples": entry.examples,
        "metric": entry.metric,
        "score": entry.score,
        "licence": entry.licence,
        "privacy": vars(entry.privacy) if entry.privacy else None,
        "origin": entry.origin,
        "bytes": entry.prompt.numel() * entry.prompt.element_size(),
        "checksum": entry.checksum,
    }


def _cosine(one: BankEntry, other: BankEntry) -> float | None:
    if one.width != other.width:
        return None
    return cosine_of_means(one.rows().double(), other.rows().double())


def _overlap(one: BankEntry, other: BankEntry) -> float | None:
    known = one.neurons is not None and other.neurons is not None
    if not (known and one.backbone_digest == other.backbone_digest):
        return None
    assert one.neurons is not None
    assert other.neurons is not None
    return activation_overlap(one.neurons, other.neurons)


def _group_means(bank: Mapping[str, BankEntry], names: Sequence[str]) -> dict[str, float] | None:
    groups = {name: bank[name].group for name in names}
    widths = {bank[name].width for name in names}
    if len(set(groups.values())) < 2 or not all(groups.values()) or len(widths) > 1:
        return None
    found = torch.tensor([[_cosine(bank[a], bank[b]) for b in names] for a in names])
    alike, unlike = group_means(names, found, groups)
    return {"same": alike, "different": unlike}


def _rho(pairs: Sequence[tuple[float, int | None]]) -> float | None:
    known = [pair for pair in pairs if pair[1] is not None]
    if len(known) < 3 or any(len(set(values)) == 1 for values in zip(*known, strict=True)):
        return None
    return float(stats.spearmanr(*zip(*known, strict=True)).statistic)
