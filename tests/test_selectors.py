"""fedcopra selectors: how well ways to choose a source rank what its transfer gives."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import Experiment
from common.errors import ConfigError
from common.prompt_bank import BankEntry, load_bank, save_entry
from server.analysis.selectors import Tried, judge_selectors, probe_of, tried_sources
from server.cli import app
from server.plans import PlannedRun

VISION = "experiments/vision-client.toml"
WIDTH = 16
# By source: rows, norm of its vectors, score on its own task.
SOURCES: Mapping[str, tuple[int, float, float]] = {
    "a": (100, 1.0, 0.9),
    "b": (300, 2.0, 0.8),
    "c": (200, 4.0, 0.7),
}


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    stream = torch.Generator().manual_seed(0)
    for name, (rows, norm, score) in SOURCES.items():
        drawn = torch.nn.functional.normalize(torch.randn(4, WIDTH, generator=stream), dim=1)
        entry = BankEntry(name, norm * drawn, "toy", name, "MIT", examples=rows, score=score)
        save_entry(entry, tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def transfer_of(
    digits_experiment: Callable[..., Experiment], bank: Path
) -> Callable[[str], Experiment]:
    def build(source: str) -> Experiment:
        return digits_experiment(
            task__probe_examples=0,
            partition__clients=1,
            federation__rounds=8,
            strategy__name="promptfl",
            adapter={
                "kind": "prompt",
                "prompt": {"length": 0},
                "transfer": {
                    "kind": "projection",
                    "sources": [str(bank / f"{source}.safetensors")],
                },
            },
        )

    return build


def probed(accuracies: Mapping[str, tuple[float, float]]) -> Any:
    """Return what stands in for probes: accuracy and loss by source; and the runs it was given."""
    made: list[PlannedRun] = []

    def run_all(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
        made.extend(runs)
        return [
            {
                "final": dict(zip(("accuracy", "loss"), accuracies[run.label[-1]], strict=True)),
                "rounds": [{"seconds": {"wall": 2.0}}],
            }
            for run in runs
        ]

    return run_all, made


def row(found: Mapping[str, Any], selector: str) -> Mapping[str, Any]:
    rows: Sequence[Mapping[str, Any]] = found["comparisons"][0]["selectors"]
    return next(r for r in rows if r["selector"] == selector)


def test_every_selector_by_hand(bank: Path, transfer_of: Callable[[str], Experiment]) -> None:
    """The outcomes are a .3, b .5, c .4, as the rows rank them; norms get two of three pairs."""
    experiments = {source: transfer_of(source) for source in SOURCES}
    accuracies = {0: {"a": 0.2, "b": 0.5, "c": 0.5}, 1: {"a": 0.4, "b": 0.5, "c": 0.3}}
    tried = Tried("x", "projection", dict.fromkeys((0, 1), experiments), accuracies)
    # Of the two best by accuracy the loss prefers c.
    run_all, made = probed({"a": (0.1, 1.0), "b": (0.6, 0.9), "c": (0.6, 0.8)})
    found = judge_selectors(load_bank(bank), [tried], run_all)
    assert found["comparisons"][0]["outcomes"] == pytest.approx({"b": 0.5, "c": 0.4, "a": 0.3})
    assert row(found, "rows")["kendall"] == 1
    assert row(found, "rows")["regret"] == 0
    assert row(found, "norm")["kendall"] == pytest.approx(1 / 3)
    assert row(found, "norm")["regret"] == pytest.approx(0.1)
    assert row(found, "own score")["kendall"] == pytest.approx(-1 / 3)
    assert row(found, "own score")["chosen"] == {0: "a", 1: "a"}
    assert row(found, "probe")["chosen"] == {0: "c", 1: "c"}
    assert row(found, "probe")["seconds"] == pytest.approx(6)
    assert row(found, "random")["regret"] == pytest.approx(0.1)
    # Seed 0 ranks a below two that are alike; seed 1 has b, a, c: two pairs of three, of which
    # one is a tie, against each other.
    assert row(found, "another seed")["kendall"] == pytest.approx(0)
    assert row(found, "another seed")["regret"] == pytest.approx((0 + 0) / 2)
    of_prompts = 3 * 4 * WIDTH * 4
    sizes = {name: row(found, name)["bytes"] for name in ("rows", "gap", "prior", "probe")}
    assert sizes == {"rows": 24, "gap": of_prompts, "prior": of_prompts + 24, "probe": of_prompts}
    assert {"gap", "prior"} <= {r["selector"] for r in found["overall"]}
    # Probes: a quarter as long, and never on test rows.
    assert {run.experiment.federation.rounds for run in made} == {2}
    assert {run.experiment.task.evaluate_on for run in made} == {"validation"}
    assert {run.cell for run in made} == {"choosing/x"}


def test_what_is_not_known_of_every_source_selects_nothing(
    bank: Path, transfer_of: Callable[[str], Experiment]
) -> None:
    drawn = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    save_entry(BankEntry("d", drawn, "toy", "d", "MIT"), bank)
    names = [*SOURCES, "d"]
    tried = Tried(
        "x",
        "projection",
        {0: {name: transfer_of(name) for name in names}},
        {0: dict.fromkeys(names, 0.5)},
    )
    run_all, _ = probed(dict.fromkeys(names, (0.5, 1.0)))
    found = judge_selectors(load_bank(bank), [tried], run_all)
    assert [r["selector"] for r in found["overall"]] == ["norm", "gap", "probe", "random"]
    assert row(found, "norm")["spearman"] is None  # all outcomes are alike
    with pytest.raises(ConfigError, match="two comparisons are called x"):
        judge_selectors(load_bank(bank), [tried, tried], run_all)


def test_a_probe_trains_on_no_validation_row(transfer_of: Callable[[str], Experiment]) -> None:
    task = transfer_of("a").task.model_copy(update={"include_validation": True})
    whole = transfer_of("a").model_copy(update={"task": task})
    assert not probe_of(whole).task.include_validation


def test_the_command_reads_a_comparison_and_refuses_parts(
    bank: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {
        "backbone.path": str(vit_folder),
        "task.examples": 100,
        "train.local_steps": 1,
        "federation.rounds": 1,
        "federation.evaluate_every": 1,
        "adapter.prompt.visual": 0,
        "adapter.transfer.kind": "projection",
        "adapter.transfer.sources": ",".join(f'["{bank}/{name}.safetensors"]' for name in SOURCES),
    }
    brief = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    runs = tmp_path / "every-source"
    command = ["compare", VISION, "--strategies", "promptfl", "--seeds", "0,1", *brief]
    app([*command, "--out", str(runs)], standalone_mode=False)
    out = tmp_path / "selectors"
    app(["selectors", str(bank), str(runs), "--out", str(out)], standalone_mode=False)
    found = json.loads((out / "selectors.json").read_text())
    means = json.loads((runs / "comparison.json").read_text())["summary"]
    [comparison] = found["comparisons"]
    assert (comparison["comparison"], comparison["task"]) == ("every-source", "digits")
    assert sorted(comparison["outcomes"].values()) == pytest.approx(
        sorted(row["accuracy"]["mean"] for row in means)
    )
    probes = [json.loads(file.read_text()) for file in (out / "choosing").rglob("record.json")]
    assert len(probes) == len(SOURCES) * 2
    assert {probe["task"]["evaluated_on"] for probe in probes} == {"validation"}
    assert "another seed" in (out / "report.html").read_text(encoding="utf-8")
    assert "3 sources" in capsys.readouterr().err
    entries = load_bank(bank)
    with pytest.raises(ConfigError, match="--kind frozen: the sources were transferred by proj"):
        tried_sources(runs, entries, "frozen")
    del entries["c"]
    with pytest.raises(ConfigError, match="at seed 0 c is in the bank, or was transferred"):
        tried_sources(runs, entries)
    file = next(runs.rglob("record.json"))
    record = json.loads(file.read_text())
    record["task"]["evaluated_on"] = "validation"
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="has no accuracy of one model on test rows"):
        tried_sources(runs, load_bank(bank))
