"""A client whose base model is not the server's is found out before it trains."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from torch import nn
from transformers import ViTForImageClassification

from clients.app import app as client_app
from common.base_fingerprint import base_fingerprint
from common.config import Adapter, Backbone, Experiment
from common.messages import pack_instruction, unpack_instruction
from common.models import load_model
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, find_clients, run_federation
from server.local_grid import LocalGrid
from server.record import build_record
from server.simulation import Finished

Build = Callable[..., Experiment]
Clients = Callable[[Message, Context], Message]
ADAPTERS = {
    "vit_folder": ("image", Adapter(rank=2)),
    "clip_folder": ("image", Adapter(kind="prompt")),
    "bert_folder": ("text", Adapter(kind="prompt")),
}


@pytest.fixture
def tuned_vit(vit_folder: Path, tmp_path: Path) -> Path:
    """The same architecture after one small step of somebody's fine-tuning."""
    folder = tmp_path / "tuned"
    shutil.copytree(vit_folder, folder)
    model = ViTForImageClassification.from_pretrained(vit_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-6
    model.save_pretrained(folder)
    return folder


def run(experiment: Experiment, clients: Clients = client_app) -> Outcomes:
    grid = LocalGrid(clients, experiment.partition.clients)  # type: ignore[arg-type]
    nodes = find_clients(grid, experiment.partition.clients, timeout=1.0)
    return run_federation(grid, experiment, Evaluator(experiment), nodes, lambda row: None)


def elsewhere(client: int, folder: Path) -> Clients:
    """Clients of which one finds other weights where its base model should be."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            plan, tensors = unpack_instruction(message.content)
            if plan.client == client:
                experiment = json.loads(plan.experiment)
                experiment["backbone"]["path"] = str(folder)
                message.content = pack_instruction(
                    replace(plan, experiment=json.dumps(experiment)), tensors
                )
        return client_app(message, context)

    return answer


def test_a_client_with_another_base_is_named_and_left_out(
    digits_experiment: Build, tuned_vit: Path
) -> None:
    experiment = digits_experiment()
    outcomes = run(experiment, elsewhere(1, tuned_vit))
    for row in outcomes.rounds:
        others = [client for client in row["clients"] if client["client"] != 1]
        (client,) = [client for client in row["clients"] if client["client"] == 1]
        assert client["status"] == "failed"
        assert client["weight"] == 0
        assert "client 1 has another base model" in client["reason"]
        assert Evaluator(experiment).model.base_fingerprint in client["reason"]
        assert {client["status"] for client in others} == {"ok"}


def test_the_same_weights_under_another_path_are_the_same_base(
    digits_experiment: Build, vit_folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(vit_folder, tmp_path / "copied")
    outcomes = run(digits_experiment(), elsewhere(1, copied))
    assert outcomes.digest == run(digits_experiment()).digest


def test_the_record_says_which_base_it_was(digits_experiment: Build) -> None:
    experiment = digits_experiment(federation__rounds=1)
    evaluator = Evaluator(experiment)
    record = build_record(Finished(experiment, run(experiment), evaluator), "a run")
    assert record["base"] == evaluator.model.base_fingerprint


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_model_knows_its_base(name: str, request: pytest.FixtureRequest) -> None:
    kind, adapter = ADAPTERS[name]
    backbone = Backbone(path=str(request.getfixturevalue(name)))
    first = load_model(backbone, kind, adapter, "cpu").base_fingerprint
    load_model.cache_clear()
    again = load_model(backbone, kind, adapter, "cpu")
    assert again.base_fingerprint == first
    assert len(first) == 16


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4099])
def test_a_small_change_everywhere_is_seen_at_any_size(size: int) -> None:
    model = nn.Linear(size, 3)
    before = base_fingerprint(model)
    with torch.no_grad():
        model.weight += 1e-3
    assert base_fingerprint(model) != before


def test_numbers_that_quantising_packs_are_not_looked_at() -> None:
    model = nn.Linear(4, 2)
    before = base_fingerprint(model)
    packed = nn.Linear(4, 2)
    packed.bias = model.bias
    packed.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    without = base_fingerprint(packed)
    packed.weight = nn.Parameter(torch.ones(8, dtype=torch.uint8), requires_grad=False)
    assert base_fingerprint(packed) == without != before
