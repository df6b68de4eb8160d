"""Records: all that decided a run and all that happened, in one folder of plain files.

A run's folder holds `record.json`, `served.safetensors`, `report.html` and, where clients sent all
that they trained, `updates.safetensors`: what some of them sent in the last round. It appears whole
or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import Experiment
from common.errors import ConfigError, DataError
from common.memory import under
from common.tensors import Tensors, only
from server.environment import describe_environment
from server.flower_strategy import Outcomes
from server.folders import FORMAT, RECORD, SERVED, UPDATES, write_json
from server.simulation import Finished
from strategies import STRATEGIES
from strategies.base import Client, Update


def build_record(finished: Finished, label: str) -> dict[str, Any]:
    """Return the record of a run; `label` is what reports call its method, without the seed."""
    experiment, outcomes = finished.experiment, finished.outcomes
    method = STRATEGIES[experiment.strategy_name]
    device = finished.evaluator.model.device
    return {
        "format": FORMAT,
        "label": label,
        "seed": experiment.federation.seed,
        "experiment": experiment.model_dump(mode="json"),
        "strategy": {
            "name": experiment.strategy_name,
            "summary": method.summary,
            "citation": method.citation,
            "control": method.control,
            "personalised": method.served == "personal" and not method.control,
        },
        "base": finished.evaluator.model.base_fingerprint,
        "environment": describe_environment(str(device)),
        "task": _describe_task(finished),
        "start": outcomes.start.as_record(),
        "digest": outcomes.digest,
        "rounds": outcomes.rounds,
        "updates": [
            {**asdict(update.client), "num_examples": update.num_examples}
            for update in outcomes.updates
        ],
        "final": {
            key: outcomes.rounds[-1][key]
            for key in ("accuracy", "loss", "own_accuracy", "own_loss", "tasks", "shifts")
            if key in outcomes.rounds[-1]
        },
    }


def _describe_task(finished: Finished) -> dict[str, Any]:
    experiment, tasks = finished.experiment, finished.evaluator.tasks
    holdings = finished.outcomes.holdings
    # Rows at sites are not among the server's.
    held = sum(sum(holding.label_counts) for holding in holdings if experiment.task.at_sites)
    return {
        "name": " + ".join(task.name for task in tasks),
        "kind": tasks[0].kind,
        "metric": "accuracy",
        "evaluated_on": experiment.task.evaluate_on,
        "tasks": [task.name for task in tasks] if len(tasks) > 1 else None,
        "labels": list(tasks[0].labels) if len(tasks) == 1 else None,
        "sizes": {
            split: sum(len(getattr(task, split)) for task in tasks) + held * (split == "train")
            for split in ("train", "validation", "probe", "test")
        },
        "clients": [
            {
                "client": holding.client,
                "num_examples": sum(holding.label_counts),
                "task": holding.task.name,
                "rank": experiment.adapter.rank_of(holding.client),
                "label_counts": list(holding.label_counts),
            }
            for holding in holdings
            if holding.client in experiment.members
        ],
    }


def write_run(folder: Path, record: Mapping[str, Any], outcomes: Outcomes) -> None:
    """Write record, served tensors and the last updates into `folder`, which must exist."""
    write_json(folder / RECORD, record)
    served = outcomes.served
    _save(
        {f"model.{i}/" if len(served) > 1 else "": m.tensors for i, m in enumerate(served)},
        folder / SERVED,
    )
    if outcomes.updates:
        found: dict[str, Tensors] = {}
        for update in outcomes.updates:
            # Without what belongs to the round alone, as the scores of a judge.
            found[_returned(update.client.client)] = only(update.tensors, set(update.sent))
            found[_sent(update.client.client)] = update.sent
        _save(found, folder / UPDATES)


def _save(tensors: Mapping[str, Tensors], file: Path) -> None:
    # Cloned: models of several clients may share a tensor, which the format refuses.
    named = {prefix + n: t.clone() for prefix, found in tensors.items() for n, t in found.items()}
    save_file(named, file)


def _returned(client: int) -> str:
    return f"client.{client}/returned/"


def _sent(client: int) -> str:
    return f"client.{client}/sent/"


def read_run(folder: Path) -> tuple[dict[str, Any], Experiment, dict[str, Tensor]]:
    """Return record, experiment and served tensors of a run.

    Raises:
        ConfigError: there is no run in the folder.
        DataError: the record cannot be read.
    """
    if not (folder / RECORD).is_file():
        raise ConfigError(f"{folder} is no run: there is no {RECORD} in it")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        experiment = Experiment.model_validate_json(json.dumps(record["experiment"]))
        return record, experiment, load_file(folder / SERVED)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{folder} cannot be read: {error!r}") from None


def read_updates(folder: Path, record: Mapping[str, Any]) -> list[Update]:
    """Return what clients sent in the last round, as far as the run kept it; in client order.

    Raises:
        DataError: the record speaks of updates, and their file cannot be read.
    """
    if not record.get("updates"):
        return []
    try:
        tensors = load_file(folder / UPDATES)
        return [
            Update(
                Client(row["client"], row["task"], row["rank"], row["scale"]),
                row["num_examples"],
                under(_returned(row["client"]), tensors),
                under(_sent(row["client"]), tensors),
            )
            for row in record["updates"]
        ]
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{folder / UPDATES} cannot be read: {error!r}") from None
