"""fedcopra gap: prompts of a bank against a client's own pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import Experiment
from common.errors import ConfigError
from common.features import extract_features
from common.modality_gap import mmd
from common.prompt_bank import BankEntry, load_bank, save_entry
from common.prompted_vit import PromptedVit
from common.shards import deal_shards
from server.analysis.gaps import Measuring, client_patches, measure_gaps, vit_of
from server.cli import app

WIDTH = 16


@pytest.fixture
def client(digits_experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    def build(**values: Any) -> Experiment:
        adapter = {"kind": "prompt", "prompt": {"length": 0}}
        return digits_experiment(adapter=adapter, strategy__name="promptfl", **values)

    return build


def put(bank: Path, name: str, prompt: torch.Tensor, **said: Any) -> None:
    save_entry(BankEntry(name, prompt, "toy", name, "CC0-1.0", **said), bank)


@pytest.fixture
def bank(tmp_path: Path, client: Callable[..., Experiment]) -> Path:
    """A prompt of this client's own patches, one far away, and one of another width."""
    folder = tmp_path / "bank"
    patches, _ = client_patches(client(), [0])
    points = patches.flatten(0, 1)
    stream = torch.Generator().manual_seed(0)
    put(folder, "near", points[torch.randperm(len(points), generator=stream)[:40]], examples=10)
    put(folder, "far", 50 * torch.randn(40, WIDTH, generator=stream), examples=1000)
    return folder


def test_patches_are_of_the_clients_that_are_asked(client: Callable[..., Experiment]) -> None:
    experiment = client()
    model = vit_of(experiment)
    assert isinstance(model, PromptedVit)
    shards = deal_shards(experiment.task, experiment.partition, 0)
    own = extract_features(model.preprocessor, shards[1].task.train.select(shards[1].rows))
    found, pictures = client_patches(experiment, [1])
    assert pictures == len(shards[1].rows)
    assert torch.equal(found, model.patch_embeddings(own))
    _, all_pictures = client_patches(experiment, [0, 1, 2])
    assert all_pictures == sum(len(shard.rows) for shard in shards)
    with pytest.raises(ConfigError, match="there is no client 3"):
        client_patches(experiment, [3])


def test_the_nearest_comes_first(client: Callable[..., Experiment], bank: Path) -> None:
    found = measure_gaps(load_bank(bank), client(), [0], Measuring(batches=8))
    near, far = found["sources"]
    assert (near["name"], far["name"]) == ("near", "far")
    assert near["gap"] + 3 * near["error"] < far["gap"] - 3 * far["error"]
    # Random directions of the same norms are not where the patches are.
    assert near["random"] - 3 * near["random_error"] > near["gap"]
    assert near["error"] < 0.2
    assert (found["batches"], found["mapped"]) == (8, [])
    # The prior weighs the gap and the rows alike: here they contradict each other exactly.
    assert near["prior"] == pytest.approx(0)
    again = measure_gaps(load_bank(bank), client(), [0], Measuring(batches=8))
    assert again["sources"] == found["sources"]


def test_all_batches_of_one_picture_each_give_the_plain_statistic(
    client: Callable[..., Experiment], bank: Path
) -> None:
    """Fewer points than a batch: one batch a pass, and always the same points."""
    experiment = client()
    found = measure_gaps(load_bank(bank), experiment, [0], Measuring(0, per_picture=True))
    patches, pictures = client_patches(experiment, [0])
    assert found["patches"] == pictures < 100
    expected = mmd(load_bank(bank)["far"].rows(), patches.mean(dim=1))
    assert found["sources"][1]["gap"] == pytest.approx(expected, abs=1e-5)
    assert found["sources"][1]["error"] == pytest.approx(0, abs=1e-6)


def test_other_widths_need_a_map_that_keeps_them(
    client: Callable[..., Experiment], bank: Path
) -> None:
    put(bank, "narrow", torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ConfigError, match="no place among vectors of width 16"):
        measure_gaps(load_bank(bank), client(), [0], Measuring(5))
    mapped = client(adapter__transfer__begin="orthogonal")
    found = measure_gaps(load_bank(bank), mapped, [0], Measuring(5))
    assert found["mapped"] == [12]
    narrow = next(source for source in found["sources"] if source["name"] == "narrow")
    assert narrow["error"] > 0
    # Without the rows of all of them the prior goes by the gap alone.
    priors = [source["prior"] for source in found["sources"]]
    assert priors == sorted(priors, reverse=True)


def test_the_gaussian_of_one_width(client: Callable[..., Experiment], bank: Path) -> None:
    found = measure_gaps(load_bank(bank), client(), [0], Measuring(10, "gaussian"))
    near, far = found["sources"]
    assert abs(near["gap"]) < 0.1 < far["gap"]


def test_what_cannot_be_measured_is_refused(client: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="--statistic energy: choose from multi-kernel"):
        Measuring(5, "energy")
    with pytest.raises(ConfigError, match="--batches -1"):
        Measuring(-1)
    with pytest.raises(ConfigError, match="'glyph-clip' is of the family 'clip'"):
        vit_of(client(backbone__name="glyph-clip"))
    with pytest.raises(ConfigError, match="'docstrings' is of kind 'text'"):
        vit_of(client(task__name="docstrings"))


def test_the_command_writes_and_refuses(
    bank: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gaps"
    file = "experiments/vision-client.toml"
    sets = ["--set", f"backbone.path={vit_folder}", "--batches", "10"]
    app(["gap", str(bank), file, *sets, "--out", str(out)], standalone_mode=False)
    found = json.loads((out / "gap.json").read_text())
    assert found["pictures"] == 200  # 250, less a fifth that chooses
    assert "near" in (out / "report.html").read_text(encoding="utf-8")
    assert "200 pictures" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists"):
        app(["gap", str(bank), file, *sets, "--out", str(out)], standalone_mode=False)
