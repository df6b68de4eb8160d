"""fedcopra transfer: what is chosen, on which rows, and when nothing is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import Experiment, build_experiment
from common.errors import ConfigError
from common.prompt_bank import BankEntry, save_entry
from server.analysis.transfer_choice import (
    Candidate,
    choose,
    lengths_of,
    paired_difference,
    plain_candidates,
    sentence,
    transfer_candidate,
    whole_settings,
)
from server.cli import app
from server.plans import PlannedRun

VISION = "experiments/vision-client.toml"


@pytest.fixture
def experiment(vit_folder: Path) -> Experiment:
    return build_experiment(
        {
            "task": {"name": "digits"},
            "backbone": {"path": str(vit_folder)},
            "adapter": {"kind": "prompt", "prompt": {"length": 0, "visual": 4}},
        }
    )


class Race:
    """Stands in for training: which share of 100 rows a candidate gets right, whatever its run."""

    def __init__(self, experiment: Experiment, accuracies: Mapping[str, float]) -> None:
        self._experiment, self._accuracies = experiment, accuracies
        self.raced: list[list[str]] = []

    def plan(self, candidate: Candidate, rounds: int, cell: str) -> PlannedRun:
        return PlannedRun(candidate.label, self._experiment, cell)

    def run_all(self, runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
        self.raced.append([run.label for run in runs])
        return [
            {
                "final": {"accuracy": self._accuracies[run.label], "loss": 1.0},
                "rounds": [{"seconds": {"training": 1.0}}],
            }
            for run in runs
        ]

    def hits_of(self, run: PlannedRun) -> Tensor:
        return torch.arange(100) < 100 * self._accuracies[run.label]


def race(experiment: Experiment, transfers: Sequence[float], control: float = 0.1) -> Any:
    candidates = [
        *plain_candidates(experiment),
        *(transfer_candidate(experiment, "projection", f"s{i}", Path("x"))
          for i in range(len(transfers))),
        transfer_candidate(experiment, "projection", "s0", Path("x"), "norm-matched"),
    ]  # fmt: skip
    reached = {"linear probe": 0.4, "visual prompt tuning": 0.5}
    reached |= {f"projection of s{i}": value for i, value in enumerate(transfers)}
    reached["projection of norm-matched vectors"] = control
    made = Race(experiment, reached)
    choice = choose(made.plan, candidates, [1, 2, 4], 0, made.run_all, made.hits_of)
    return made, choice


def test_the_better_half_goes_on(experiment: Experiment) -> None:
    made, choice = race(experiment, [0.2, 0.6, 0.3, 0.7, 0.1])
    transfers = [[name for name in rung if "of s" in name] for rung in made.raced]
    assert transfers == [
        [f"projection of s{i}" for i in range(5)],
        ["projection of s1", "projection of s2", "projection of s3"],
        ["projection of s1", "projection of s3"],
    ]
    always = {"linear probe", "visual prompt tuning", "projection of norm-matched vectors"}
    assert all(always <= set(rung) for rung in made.raced)
    assert choice.candidate.label == "projection of s3"
    assert choice.plain.label == "visual prompt tuning"
    assert choice.told["against_control"]["difference"] == pytest.approx(0.6)
    assert "projection of s3" in sentence(choice.told)


def test_a_transfer_must_beat_plain_tuning_by_more_than_one_standard_error(
    experiment: Experiment,
) -> None:
    """One row of 100 more: the difference is 0.01, and so is its standard error."""
    hits = torch.arange(100) < 51
    assert paired_difference(hits, torch.arange(100) < 50) == pytest.approx((0.01, 0.01))
    _, same = race(experiment, [0.51])
    assert same.told["difference"] == pytest.approx(same.told["error"])
    assert same.candidate.label == "visual prompt tuning"
    assert "not above one standard error" in sentence(same.told)
    _, better = race(experiment, [0.53])
    assert better.candidate.label == "projection of s0"
    _, worse = race(experiment, [0.2])
    assert worse.candidate.label == "visual prompt tuning"
    with pytest.raises(ConfigError, match=r"raise task\.validation_fraction"):
        paired_difference(hits[:1], hits[:1])


def test_probes_are_a_quarter_and_a_half_as_long() -> None:
    assert [lengths_of(rounds) for rounds in (1, 2, 4, 12)] == [[1], [1], [1, 2], [3, 6]]


def test_clients_that_share_nothing_but_heads_are_alone(experiment: Experiment) -> None:
    local = experiment.model_copy(update={"strategy": {"name": "local-heads"}})
    linear, tuning = plain_candidates(local)
    assert whole_settings(linear, local, {})["strategy.name"] == "local-only"
    assert "strategy.name" not in whole_settings(tuning, local, {})
    frozen = transfer_candidate(local, "frozen", "s", Path("x"))
    assert whole_settings(frozen, local, {})["strategy.name"] == "local-only"
    assert "strategy.name" not in whole_settings(frozen, experiment, {})
    with pytest.raises(ConfigError, match="--kind x: choose from frozen"):
        transfer_candidate(local, "x", "s", Path("x"))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    stream = torch.Generator().manual_seed(0)
    for name, rows in (("a", 10), ("b", 1000)):
        prompt = torch.randn(4, 12, generator=stream)
        save_entry(
            BankEntry(name, prompt, "toy", name, "CC0-1.0", examples=rows), tmp_path / "bank"
        )
    return tmp_path / "bank"


@pytest.fixture
def brief(vit_folder: Path) -> list[str]:
    sets = {
        "backbone.path": str(vit_folder),
        "task.examples": 100,
        "train.local_steps": 1,
        "federation.rounds": 2,
        "adapter.prompt.visual": 3,
        "adapter.transfer.length": 4,
        "adapter.transfer.concentrated": 2,
    }
    return [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]


def test_probes_choose_on_validation_rows_and_records_say_so(
    bank: Path, brief: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["transfer", str(bank), VISION, "--kind", "auto", "--shortlist", "1"]
    two = ["--set", "partition.clients=2", "--set", "strategy.name=local-heads"]
    app([*command, *brief, *two, "--out", str(out)], standalone_mode=False)
    found = json.loads((out / "selection.json").read_text())
    assert [told["client"] for told in found["clients"]] == [0, 1]
    labels = {probe["label"] for probe in found["clients"][0]["rungs"][0]["probes"]}
    first = found["ranks"]["0"][0]
    assert labels == {
        "linear probe",
        "visual prompt tuning",
        *(f"{kind} of {first}" for kind in ("frozen", "projection", "attention")),
        "projection of unrelated vectors",
        "projection of norm-matched vectors",
    }
    for record in (out / "choosing").rglob("record.json"):
        assert json.loads(record.read_text())["task"]["evaluated_on"] == "validation"
    final = [json.loads(file.read_text()) for file in out.glob("*/record.json")]
    assert {record["task"]["evaluated_on"] for record in final} == {"test"}
    chosen = {told["chosen"] for told in found["clients"]}
    assert all(any(record["label"].startswith(label) for record in final) for label in chosen)
    assert found["sentences"][0] in " ".join(capsys.readouterr().err.split())
    assert "Client 1: 1 round," in (out / "selection.html").read_text(encoding="utf-8")


def test_a_kind_that_is_given_is_not_probed(bank: Path, brief: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["transfer", str(bank), VISION, "--kind", "projection", *brief]
    app([*command, "--source", "a", "--out", str(out)], standalone_mode=False)
    labels = {json.loads(f.read_text())["label"] for f in out.rglob("record.json")}
    assert labels == {"linear probe", "visual prompt tuning", "projection of a"}
    assert json.loads((out / "selection.json").read_text())["sentences"] == [
        "projection of a: as asked for."
    ]


def test_mistakes_are_told_before_anything_runs(bank: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--kind deep: choose from frozen"):
        app(["transfer", str(bank), VISION, "--kind", "deep", *out], standalone_mode=False)
    with pytest.raises(ConfigError, match="--source c: choose from a, b"):
        app(["transfer", str(bank), VISION, "--source", "c", *out], standalone_mode=False)
    lora = ["transfer", str(bank), "experiments/digits.toml", *out]
    with pytest.raises(ConfigError, match="set it to 'prompt'"):
        app(lora, standalone_mode=False)
