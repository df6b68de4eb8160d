"""Simulation: many runs over one warm pool of clients.

All runs of a comparison share one Flower simulation, so that Ray starts once and every actor
loads the backbone once. Several runs are in flight at a time: while the server merges and
evaluates one, the clients of another train. What a run computes depends on none of this.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from clients.app import app as client_app
from common.backbones import choose_device
from common.config import Experiment
from common.shards import deal_shards
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, run_federation
from server.local_grid import LocalGrid

# (index of the run, its row of the record)
OnProgress = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Finished:
    """One run: its experiment and what it left."""

    experiment: Experiment
    outcomes: Outcomes
    evaluator: Evaluator


def simulate(experiments: Sequence[Experiment], on_progress: OnProgress) -> list[Finished]:
    """Run all experiments, on Ray actors or, with `federation.workers = 0`, in this process.

    All must name the same number of workers and the same device.

    Raises:
        FedcopraError: what only shows once data and models are loaded.
    """
    workers = {experiment.federation.workers for experiment in experiments}
    if len(workers) != 1:
        raise ValueError(f"runs of one simulation share their workers, but these want {workers}")
    engine = _on_ray if workers.pop() else _in_process
    clients = max(experiment.partition.clients for experiment in experiments)
    evaluators = _evaluators(experiments)

    def run(grid: Grid, index: int) -> Finished:
        experiment, evaluator = experiments[index], evaluators[index]
        outcomes = run_federation(
            grid, experiment, evaluator, functools.partial(on_progress, index)
        )
        return Finished(experiment, outcomes, evaluator)

    return engine(run, experiments, clients)


def _evaluators(experiments: Sequence[Experiment]) -> list[Evaluator]:
    """Make one evaluator for all runs that differ only in strategy, schedule or training."""
    made: dict[Any, Evaluator] = {}
    for experiment in experiments:
        # Shards that cannot be dealt are a mistake to tell before any client starts.
        deal_shards(experiment.task, experiment.partition, experiment.federation.seed)
        key = _evaluation_key(experiment)
        if key not in made:
            made[key] = Evaluator(experiment)
    return [made[_evaluation_key(experiment)] for experiment in experiments]


def _evaluation_key(experiment: Experiment) -> Any:
    train = experiment.train
    return (
        experiment.task,
        experiment.backbone,
        experiment.adapter,
        experiment.federation.seed,
        train.device,
        train.precision,
    )


_Run = Callable[[Grid, int], Finished]


def _in_process(run: _Run, experiments: Sequence[Experiment], clients: int) -> list[Finished]:
    _quiet_flower()
    grid = LocalGrid(client_app, clients)
    return [run(grid, index) for index in range(len(experiments))]


def _on_ray(run: _Run, experiments: Sequence[Experiment], clients: int) -> list[Finished]:
    _quiet_flower()
    workers = experiments[0].federation.workers
    finished: list[Finished] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        # One run more than there are workers keeps these busy while the server merges.
        with ThreadPoolExecutor(max_workers=workers + 1) as in_flight:
            jobs = [in_flight.submit(run, grid, index) for index in range(len(experiments))]
            try:
                finished.extend(job.result() for job in jobs)
            finally:
                # After a mistake, start none of the others.
                in_flight.shutdown(wait=False, cancel_futures=True)

    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_config={
            "init_args": {
                "num_cpus": workers,
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": "ERROR",
            },
            "client_resources": {
                "num_cpus": 1,
                "num_gpus": _gpu_share(experiments[0].train.device, workers),
            },
        },
    )
    return finished


def _gpu_share(device: str, workers: int) -> float:
    """Return the share of a GPU that each actor gets: all of them fit on what there is."""
    import torch

    on_gpu = choose_device(device).type == "cuda"
    return min(1.0, torch.cuda.device_count() / workers) if on_gpu else 0.0


def _quiet_flower() -> None:
    """Leave the terminal to our own progress; errors of clients stand in the record."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
