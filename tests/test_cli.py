"""The command line: mistakes are one line and exit code 2, and leave nothing behind."""

import json
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from server import cli
from server.plans import ONE_CELL, plan_runs, subjects_of

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "experiments" / "digits.toml")
TEXT = str(ROOT / "experiments" / "text.toml")
HERE = ("--set", "federation.workers=0")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedcopra", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "nowhere.toml"], ["nowhere.toml"]),
        (["simulate", DIGITS, "--set", "strategy.name=fedav"], ["'fedav'", "fedavg, ffa-lora"]),
        (["simulate", DIGITS, "--set", "train.lr=1"], ["train.lr", "learning_rate"]),
        (["simulate", DIGITS, "--set", "federation.rounds=0"], ["federation.rounds", "0"]),
        (["simulate", DIGITS, "--set", "task.name=digit"], ["'digit'", "digits"]),
        (["simulate", DIGITS, "--set", "task.path=/no/such"], ["/no/such"]),
        (["simulate", DIGITS, "--set", "adapter.rank=65"], ["65", "64x64"]),
        (
            ["simulate", DIGITS, "--set", "partition.kind=iid", "--set", "partition.clients=5000"],
            ["5000", "empty shard"],
        ),
        (["simulate", DIGITS, "--set", "backbone.name=minilm"], ["minilm", "image"]),
        (["simulate", DIGITS, "--bogus"], ["--bogus"]),
        (["compare", DIGITS, "--seeds", "0,x"], ["--seeds", "'x'"]),
        (["compare", DIGITS, "--set", "federation.seed=1,2"], ["federation.seed", "--seeds"]),
        (["compare", DIGITS, "--strategies", "fedavg,fedavg"], ["more than once"]),
        (["report", "nowhere"], ["nowhere", "record.json"]),
        (["export", "nowhere", "adapter"], ["nowhere", "record.json"]),
        (["list", "clients"], ["clients", "strategies, tasks, backbones"]),
        (["bogus"], ["bogus"]),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    says: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = HERE if arguments[0] in ("simulate", "compare") else ()
    assert call(monkeypatch, *arguments, *extra) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fedcopra: ")
    assert "\n" not in said
    for part in says:
        assert part in said
    runs = tmp_path / "runs"
    assert not runs.exists() or not any(runs.iterdir())
    assert not (tmp_path / "adapter").exists()


def test_a_label_outside_the_list_is_told_with_file_and_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 7}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "labels.json").write_text('["x", "y"]')
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "simulate", TEXT, "--set", f"task.path={tmp_path}", *HERE) == 2
    said = capsys.readouterr().err
    for part in ("train.jsonl", "row 1", "label 7", "x, y"):
        assert part in said


def test_a_run_folder_that_exists_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep me")
    assert call(monkeypatch, "simulate", DIGITS, "--out", str(tmp_path / "mine"), *HERE) == 2
    assert "exists" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "note.txt"]


def test_a_comparison_is_strategies_by_settings_by_seeds() -> None:
    subjects = subjects_of(
        ["fedavg", "ffa-lora+train.learning_rate=2e-2"], {"copra.enabled": [True, False]}
    )
    runs = plan_runs(Path(DIGITS), subjects, ONE_CELL, [0, 1])
    assert list(dict.fromkeys(run.label for run in runs)) == [
        "fedavg · copra.enabled=true",
        "fedavg · copra.enabled=false",
        "ffa-lora · copra.enabled=true · train.learning_rate=0.02",
        "ffa-lora · copra.enabled=false · train.learning_rate=0.02",
    ]
    assert [run.experiment.federation.seed for run in runs] == [0, 1] * 4
    assert {run.experiment.train.learning_rate for run in runs[4:]} == {0.02}
    assert len({run.folder for run in runs}) == len(runs)


def test_a_setting_of_one_strategy_is_checked_too() -> None:
    subjects = subjects_of(["fedavg+train.lr=1"], {})
    with pytest.raises(ConfigError, match=r"train\.lr"):
        plan_runs(Path(DIGITS), subjects, ONE_CELL, [0])


def test_lists_can_be_read_by_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list", "strategies", "--json") == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert {"fedavg", "ffa-lora", "flexlora", "copra-merge"} <= set(names)
