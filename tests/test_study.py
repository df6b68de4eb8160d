"""Studies: every run is kept when it ends, and a study that was stopped goes on from there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config import Experiment
from server.environment import git_state, installed_versions
from server.folders import RECORD, continued
from server.plans import PlannedRun
from server.study import finished_runs, make_runs

Build = Callable[..., Experiment]


class StoppedError(Exception):
    """Stands for Ctrl-C."""


def planned(build: Build) -> list[PlannedRun]:
    return [
        PlannedRun(name, build(strategy__name=name, federation__seed=seed))
        for name in ("fedavg", "ffa-lora")
        for seed in (0, 1)
    ]


def stop_at(run: int) -> Callable[[int, Mapping[str, Any]], None]:
    def on_progress(index: int, row: Mapping[str, Any]) -> None:
        if index == run:
            raise StoppedError

    return on_progress


def test_a_stopped_study_goes_on_and_ends_as_if_never_stopped(
    digits_experiment: Build, tmp_path: Path
) -> None:
    runs = planned(digits_experiment)
    with continued(tmp_path / "whole") as folder:
        through = make_runs(runs, folder, lambda index, row: None)
    with pytest.raises(StoppedError), continued(tmp_path / "parts") as folder:
        make_runs(runs, folder, stop_at(2))
    assert not (tmp_path / "parts").exists()
    assert sorted(finished_runs(runs, tmp_path / ".parts.unfinished")) == [0, 1]
    made: list[int] = []
    with continued(tmp_path / "parts") as folder:
        records = make_runs(runs, folder, lambda index, row: made.append(index))
    assert sorted(set(made)) == [2, 3]
    assert [record["digest"] for record in records] == [record["digest"] for record in through]
    assert len(list((tmp_path / "parts").rglob(RECORD))) == 4


def test_a_run_of_another_experiment_or_version_is_made_again(
    digits_experiment: Build, tmp_path: Path
) -> None:
    [run, *_] = planned(digits_experiment)
    make_runs([run], tmp_path, lambda index, row: None)
    assert finished_runs([run], tmp_path)
    longer = PlannedRun(run.label, digits_experiment(federation__rounds=3))
    assert longer.folder == run.folder
    assert not finished_runs([longer], tmp_path)
    file = tmp_path / run.folder / RECORD
    record = json.loads(file.read_text())
    record["environment"]["versions"]["torch"] = "0.1"
    file.write_text(json.dumps(record))
    assert not finished_runs([run], tmp_path)
    record["environment"] |= {"versions": installed_versions(), "git": {"commit": "another"}}
    file.write_text(json.dumps(record))
    assert not finished_runs([run], tmp_path)
    record["environment"]["git"] = git_state()
    file.write_text(json.dumps(record))
    assert finished_runs([run], tmp_path)
    [record] = make_runs([longer], tmp_path, lambda index, row: None)
    assert len(record["rounds"]) == 3


def test_a_study_stopped_before_its_first_run_ended_leaves_nothing(
    digits_experiment: Build, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError), continued(tmp_path / "study") as folder:
        make_runs(planned(digits_experiment), folder, stop_at(0))
    assert not list(tmp_path.iterdir())
