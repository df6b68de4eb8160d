"""Runs on a CUDA device, where there is one, against the same on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import Experiment
from server.simulation import simulate

Build = Callable[..., Experiment]
REASON = "torch finds no CUDA device; where there is one this runs on it"
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)


def rounds_of(experiment: Experiment) -> list[dict[str, Any]]:
    [finished] = simulate([experiment], lambda *_: None)
    rounds = [dict(row) for row in finished.outcomes.rounds]
    assert {client["status"] for row in rounds for client in row["clients"]} == {"ok"}
    return rounds


@on_cuda
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy__name": "copra-merge", "copra__enabled": True},  # slopes of probe rows
        {"strategy__name": "scaffold", "train__optimiser": "sgd"},  # clients remember tensors
        {"strategy__name": "fedex-lora"},  # residuals beside the base
        {"adapter__blocks": 1, "wire__up": "int8"},  # what lies below is kept
    ],
    ids=lambda settings: str(next(iter(settings.values()))),
)
def test_a_run_ends_where_it_does_on_the_cpu(
    digits_experiment: Build, settings: dict[str, Any]
) -> None:
    here = rounds_of(digits_experiment(train__device="cuda", **settings))
    there = rounds_of(digits_experiment(train__device="cpu", **settings))
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], abs=5e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_mixed_precision_is_close_to_float32(digits_experiment: Build, device: str) -> None:
    mixed = rounds_of(digits_experiment(train__device=device, train__precision="bfloat16"))
    single = rounds_of(digits_experiment(train__device=device))
    losses = [row["loss"] for row in single]
    assert [row["loss"] for row in mixed] == pytest.approx(losses, abs=0.1)
    assert [row["loss"] for row in mixed] != losses


@on_cuda
@pytest.mark.parametrize("nemesis", ["none", "pun", "pan"])
def test_soft_prompts_end_where_they_do_on_the_cpu(
    digits_experiment: Build, clip_folder: Path, nemesis: str
) -> None:
    prompts = {
        "backbone__path": str(clip_folder),
        "adapter": {
            "kind": "prompt",
            "prompt": {"length": 3, "visual": 0 if nemesis == "pan" else 2},
        },
        "nemesis__kind": nemesis,
        "strategy": {"name": "promptfl"},
        "task__probe_examples": 0,
    }
    here = rounds_of(digits_experiment(train__device="cuda", **prompts))
    there = rounds_of(digits_experiment(train__device="cpu", **prompts))
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], abs=5e-3)


@pytest.mark.ray
@on_cuda
def test_two_workers_share_a_gpu(digits_experiment: Build) -> None:
    rounds_of(digits_experiment(train__device="cuda", federation__workers=2))
    rounds_of(digits_experiment(train__device="cuda:0", federation__workers=0))
