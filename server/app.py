"""Flower's ServerApp, for `flwr run .`: the same experiment through Flower's own command."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Experiment, experiment_from_flat
from common.installed_code import refuse_other_code
from server.checkpoints import Checkpoints
from server.evaluation import Evaluator
from server.flower_strategy import find_clients, run_federation, share_nodes
from server.folders import REPORT, appearing_whole
from server.holdings import check_shards
from server.record import build_record, write_run
from server.reporting.report import write_report
from server.reporting.wording import round_line
from server.simulation import Finished
from strategies import resolve

app = ServerApp()
_log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config and write its record where `out` says.

    `share_nodes` lets Flower's nodes play several clients each, for a simulation of any size.
    `experiment` is a whole one as JSON, and `code` the digest of the code that it was submitted
    with, as `fedcopra run` writes them. `out` is a folder on the machine of the SuperLink; relative
    paths start where that was started. A run that was cut off goes on where it was when it is
    submitted again.
    """
    config: dict[str, Any] = dict(context.run_config)
    if code := str(config.pop("code", "")):
        refuse_other_code(code, "the server")
    sharing = bool(config.pop("share_nodes"))
    find_nodes = share_nodes if sharing else _find_every_client
    folder = Path(str(config.pop("out"))) / f"run-{context.run_id}"
    text = str(config.pop("experiment", ""))
    experiment = Experiment.model_validate_json(text) if text else experiment_from_flat(config)
    resolve(experiment)
    check_shards(experiment)
    checkpoints = Checkpoints(folder.absolute().parent, experiment)
    with appearing_whole(folder.absolute()) as unfinished:
        evaluator = Evaluator(experiment)
        nodes = find_nodes(grid, experiment.partition.clients)
        outcomes = run_federation(
            grid,
            experiment,
            evaluator,
            nodes,
            _log_round,
            remembering=not sharing,
            checkpoints=checkpoints,
        )
        finished = Finished(experiment, outcomes, evaluator)
        record = build_record(finished, experiment.strategy_name)
        write_run(unfinished, record, outcomes)
        write_report([unfinished], unfinished / REPORT)
    checkpoints.remove()
    _log.info("record and report: %s", folder.absolute() / REPORT)


def _find_every_client(grid: Grid, wanted: int) -> dict[int, int]:
    return find_clients(grid, wanted, timeout=600.0)


def _log_round(row: Mapping[str, Any]) -> None:
    _log.info("%s", round_line(row))
