"""The same experiment through Flower's own command."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from common.config import Experiment, experiment_from_flat, load_experiment
from strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
APP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]


def flattened(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def experiment_keys() -> set[str]:
    """Every key that an experiment file may have but lists of tables, which Flower cannot hold."""
    keys = {key for key in dotted_keys(Experiment) if key != "strategy"}
    options = {
        f"strategy.{name}.{key}"
        for name, method in STRATEGIES.items()
        for key in method.options.model_fields
    }
    return (keys | options | {"strategy.name"}) - {"task.members", "task.shifts"}


def dotted_keys(table: type[BaseModel]) -> Iterator[str]:
    for key, field in table.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{key}.{deeper}" for deeper in dotted_keys(inner))
        else:
            yield key


def test_flower_s_config_lists_every_key_of_an_experiment() -> None:
    own = {"out", "share_nodes"}
    assert set(flattened(APP["config"])) - own == experiment_keys()


def test_flower_s_config_is_the_digits_experiment() -> None:
    flat = flattened(APP["config"])
    del flat["out"], flat["share_nodes"]
    assert experiment_from_flat(flat) == load_experiment(ROOT / "experiments" / "digits.toml")


@pytest.mark.slow
@pytest.mark.ray
def test_flwr_run_gives_the_digest_of_fedcopra_simulate(tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    shutil.copytree(
        ROOT, tmp_path / "app", ignore=shutil.ignore_patterns(".venv", ".git", "runs", ".*cache*")
    )
    environment = {
        **os.environ,
        # Flower starts its own commands by name.
        "PATH": f"{flwr.parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39491",
        "FLWR_LOCAL_CONTROL_API_PORT": "39493",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    brief = {"federation.rounds": 2, "train.local_steps": 2, "federation.workers": 0}
    config = " ".join(f"{key}={value}" for key, value in brief.items())
    try:
        subprocess.run(
            [flwr, "run", ".", "--stream", "-c", f"{config} out='{tmp_path}/out'"],
            cwd=tmp_path / "app",
            env=environment,
            check=True,
            timeout=300,
            capture_output=True,
        )
    finally:
        subprocess.run(["pkill", "-f", "flower-superlink.*39491"], check=False)
    [record] = (tmp_path / "out").glob("*/record.json")
    sets = [argument for key, value in brief.items() for argument in ("--set", f"{key}={value}")]
    fedcopra = Path(sys.executable).with_name("fedcopra")
    digits = ROOT / "experiments" / "digits.toml"
    subprocess.run(
        [fedcopra, "simulate", digits, *sets, "--out", tmp_path / "own"], check=True, timeout=300
    )
    own = json.loads((tmp_path / "own" / "record.json").read_text())
    assert json.loads(record.read_text())["digest"] == own["digest"]
    assert (record.parent / "report.html").is_file()
