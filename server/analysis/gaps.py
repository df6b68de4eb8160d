"""How far each prompt of a bank is from a client's pictures, before anything is trained."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from common.backbones import load_preprocessor
from common.config import Adapter, Experiment, Prompt
from common.control_prompts import norm_matched
from common.errors import ConfigError
from common.features import extract_features
from common.modality_gap import (
    Gap,
    Statistic,
    gaussian,
    median_distance,
    modality_gaps,
    multi_kernel,
)
from common.models import load_model
from common.nemesis import vector_norms
from common.prompt_bank import BankEntry
from common.prompted_vit import PromptedVit, bridged, source_rows
from common.seeds import child_seed, torch_generator
from common.shards import deal_shards
from common.source_ranking import best_first, prior_scores
from common.tensors import Tensors

MAPS = 5
STATISTICS = ("multi-kernel", "gaussian")
CONTROL = "random, as long as "

METHOD = (
    "gap: the mean of MMD² between the vectors of a prompt and batches of 100 patch embeddings "
    "(patch projection and position, no class token) of this client's training pictures; lower is "
    "nearer. multi-kernel: the biased estimator of algorithm 1 of OpenReview SYnIf4LxAG, whose "
    "widths depend on the pair, so that values rank prompts and are no metric; gaussian: the "
    "unbiased estimator at one width, the median distance of the client's own patches. error: "
    "standard error over batches drawn from these very pictures; what other pictures would give is "
    "not in it. Where a prompt has not the width of the patches it is mapped by what a projection "
    "starts as; gap and error are then the mean and its standard error over five random maps, "
    "the same for all prompts. random: the same of random directions with the prompt's own "
    "norms, vector by vector: as far as the two agree, the gap knows of norms alone. prior: "
    "-z(gap) + z(log rows), z over the prompts of the bank; without the rows of all of them it is "
    "-z(gap). A rank by gap is a guess before training, and no measure of what transfer will give."
)


@dataclass(frozen=True)
class Measuring:
    """How gaps are measured.

    Attributes:
        batches: of 100 patches; 0 for all, five passes over the pictures, as published.
        statistic: one of `STATISTICS`.
        per_picture: whether the points are mean patches, one a picture.
    """

    batches: int = 200
    statistic: str = "multi-kernel"
    per_picture: bool = False

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ConfigError(f"--statistic {self.statistic}: choose from {', '.join(STATISTICS)}")
        if self.batches < 0:
            raise ConfigError(f"--batches {self.batches}: choose 1 or more, or 0 for all")


def measure_gaps(
    bank: Mapping[str, BankEntry],
    experiment: Experiment,
    clients: Sequence[int],
    measuring: Measuring = Measuring(),
) -> dict[str, Any]:
    """Return the gap of every prompt to the pictures of these clients, nearest first, for JSON.

    Raises:
        ConfigError: the backbone is no ViT, a client that is not there, or a prompt of another
            width and no map for it (`adapter.transfer.begin`).
    """
    began = time.perf_counter()
    patches, pictures = client_patches(experiment, clients)
    if measuring.per_picture:
        patches = patches.mean(dim=1)
    points = patches.flatten(0, -2)
    embedded = time.perf_counter()
    seed = experiment.federation.seed
    transfer = experiment.adapter.transfer
    sources = {name: source_rows(entry, transfer) for name, entry in bank.items()}
    controls = {
        CONTROL + name: norm_matched(rows, torch_generator(seed, "gap control", name))
        for name, rows in sources.items()
    }
    found = _gaps({**sources, **controls}, points, experiment, measuring)
    norms = {name: float(vector_norms(rows).mean()) for name, rows in sources.items()}
    gaps = {name: found[name] for name in sources}
    priors = prior_of({name: gap.value for name, gap in gaps.items()}, bank)
    order = best_first({name: -gap.value for name, gap in gaps.items()})
    return {
        "clients": list(clients),
        "pictures": pictures,
        "patches": len(points),
        "statistic": measuring.statistic,
        "batches": next(iter(found.values())).batches,
        "paper_exact": transfer.paper_exact,
        "mapped": sorted({rows.shape[1] for rows in sources.values()} - {points.shape[1]}),
        "begin": transfer.begin,
        "seconds": {
            "embedding": embedded - began,
            "gaps": time.perf_counter() - embedded,
        },
        "sources": [
            {
                "name": name,
                "gap": gaps[name].value,
                "error": gaps[name].standard_error,
                "random": found[CONTROL + name].value,
                "random_error": found[CONTROL + name].standard_error,
                "norm": norms[name],
                "examples": bank[name].examples,
                "prior": priors[name],
            }
            for name in order
        ],
        "gap_and_norm": _rho([gaps[n].value for n in order], [norms[n] for n in order]),
        "gap_and_random": _rho(
            [gaps[n].value for n in order], [found[CONTROL + n].value for n in order]
        ),
        "method": METHOD,
    }


def client_patches(experiment: Experiment, clients: Sequence[int]) -> tuple[Tensor, int]:
    """Return patch embeddings (n, patches, width) of these clients' training pictures, and n."""
    count = experiment.partition.clients
    if absent := [client for client in clients if not 0 <= client < count]:
        raise ConfigError(f"there is no client {absent[0]}: there are {count}, numbered from 0")
    shards = deal_shards(experiment.task, experiment.partition, experiment.federation.seed)
    tasks = {shards[client].task.name: shards[client].task for client in clients}
    model = vit_of(experiment)
    rows = {
        name: np.concatenate([shards[k].rows for k in clients if shards[k].task.name == name])
        for name in tasks
    }
    found = [
        model.patch_embeddings(
            extract_features(model.preprocessor, tasks[name].train.select(np.sort(chosen)))
        )
        for name, chosen in rows.items()
    ]
    patches = torch.cat(found)
    return patches, len(patches)


def vit_of(experiment: Experiment) -> PromptedVit:
    """Return the experiment's ViT without a prompt.

    Raises:
        ConfigError: the backbone is none.
    """
    plain = Adapter(kind="prompt", prompt=Prompt(length=0))
    kind = deal_shards(experiment.task, experiment.partition, experiment.federation.seed)[
        0
    ].task.kind
    if kind != "image":
        raise ConfigError(
            f"task {experiment.task.label!r} is of kind {kind!r}: prompts of a bank are "
            "transferred to pictures"
        )
    family = load_preprocessor(experiment.backbone, kind).model_config.model_type
    if family != "vit":
        raise ConfigError(
            f"backbone {experiment.backbone.label!r} is of the family {family!r}: prompts of a "
            "bank are transferred to a ViT"
        )
    model = load_model(experiment.backbone, kind, plain, experiment.train.device)
    assert isinstance(model, PromptedVit)
    return model


def prior_of(gaps: Mapping[str, float], bank: Mapping[str, BankEntry]) -> dict[str, float]:
    """Return the prior score of every source, higher for what to try first."""
    known = {n: e.examples for n, e in bank.items() if n in gaps and e.examples}
    if len(known) == len(gaps):
        return prior_scores(gaps, {name: float(count) for name, count in known.items()})
    return prior_scores(gaps, dict.fromkeys(gaps, 1.0))


def _gaps(
    sources: Tensors, points: Tensor, experiment: Experiment, measuring: Measuring
) -> dict[str, Gap]:
    seed, width = experiment.federation.seed, points.shape[1]
    statistic: Statistic = multi_kernel
    if measuring.statistic == "gaussian":
        statistic = gaussian(median_distance(points, torch_generator(seed, "gap width")))
    transfer = experiment.adapter.transfer

    def measured(prompts: Tensors, draw: int) -> dict[str, Gap]:
        return modality_gaps(
            prompts,
            points,
            torch_generator(seed, "gap", draw),
            statistic=statistic,
            batches=measuring.batches or None,
            batch=min(100, len(points)),
        )

    fitting = {name: rows for name, rows in sources.items() if rows.shape[1] == width}
    found = measured(fitting, 0) if fitting else {}
    if others := {name: rows for name, rows in sources.items() if name not in fitting}:
        draws = []
        for number in range(MAPS):
            drawn = transfer.model_copy(update={"draw": child_seed(transfer.draw, "map", number)})
            mapped = {name: bridged(rows, width, drawn) for name, rows in others.items()}
            draws.append(measured(mapped, number))
        found |= {name: _over_maps([draw[name] for draw in draws]) for name in others}
    return found


def _over_maps(gaps: Sequence[Gap]) -> Gap:
    values = [gap.value for gap in gaps]
    return Gap(fmean(values), stdev(values) / len(values) ** 0.5, gaps[0].batches)


def _rho(one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(stats.spearmanr(one, other).statistic)
