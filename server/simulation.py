"""Simulation: many runs over one warm pool of clients.

All runs of a comparison share one Flower simulation, so that Ray starts once and every actor
loads the backbone once. Several runs are in flight at a time: while the server merges and
evaluates one, the clients of another train. What a run computes depends on none of this, as long
as no client is lost to a timeout; a client process that dies ends the whole simulation.
"""

import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Context, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from clients.app import app as client_app
from common.backbones import choose_device
from common.config import Experiment, Federation
from common.errors import ConfigError, FedcopraError
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, find_clients, run_federation
from server.holdings import check_shards
from server.local_grid import LocalGrid

# (index of the run, its row of the record)
OnProgress = Callable[[int, Mapping[str, Any]], None]
# (index of the run, what it left)
OnFinished = Callable[[int, "Finished"], None]


@dataclass(frozen=True)
class Finished:
    """One run: its experiment and what it left."""

    experiment: Experiment
    outcomes: Outcomes
    evaluator: Evaluator


def keep(index: int, finished: "Finished") -> None:
    """Do nothing when a run ends: `simulate` returns them all."""


def simulate(
    experiments: Sequence[Experiment], on_progress: OnProgress, on_finished: OnFinished = keep
) -> list[Finished]:
    """Run all experiments, on Ray actors or, with `federation.workers = 0`, in this process.

    `on_finished` is told of every run as it ends, from the thread that ran it. All must name the
    same number of workers and the same device.

    Raises:
        FedcopraError: what only shows once data and models are loaded.
    """
    workers = sorted({experiment.federation.workers for experiment in experiments})
    clusters = sorted({experiment.federation.ray_address for experiment in experiments})
    devices = sorted({experiment.train.device for experiment in experiments})
    if len(workers) > 1 or len(devices) > 1 or len(clusters) > 1:
        raise ConfigError(
            "all runs of a comparison share the same clients: give one federation.workers, not "
            f"{workers}, one train.device, not {devices}, and one federation.ray_address, not "
            f"{clusters}"
        )
    if clusters[0] and not workers[0]:
        raise ConfigError(
            f"federation.ray_address = {clusters[0]!r}: federation.workers = 0 runs clients in "
            "this process; say how many of them the cluster holds at a time"
        )
    engine = _on_ray if workers[0] else _in_process
    clients = max(experiment.partition.clients for experiment in experiments)
    evaluators = _evaluators(experiments)

    def run(grid: Grid, nodes: Mapping[int, int], index: int) -> Finished:
        experiment, evaluator = experiments[index], evaluators[index]
        outcomes = run_federation(
            grid, experiment, evaluator, nodes, functools.partial(on_progress, index)
        )
        finished = Finished(experiment, outcomes, evaluator)
        on_finished(index, finished)
        return finished

    return engine(run, experiments, clients)


def _evaluators(experiments: Sequence[Experiment]) -> list[Evaluator]:
    """Make one evaluator for all runs that differ only in strategy, schedule or training."""
    made: dict[Any, Evaluator] = {}
    for experiment in experiments:
        # Shards that cannot be dealt are a mistake to tell before any client starts.
        check_shards(experiment)
        key = _evaluation_key(experiment)
        if key not in made:
            made[key] = Evaluator(experiment)
        made[key].check(experiment)
    return [made[_evaluation_key(experiment)] for experiment in experiments]


def _evaluation_key(experiment: Experiment) -> Any:
    train = experiment.train
    return (
        experiment.task,
        experiment.backbone,
        experiment.adapter,
        train.device,
        train.precision,
    )


_Run = Callable[[Grid, Mapping[int, int], int], Finished]


def _lanes(nodes: Mapping[int, int], clients: int, count: int) -> queue.SimpleQueue[dict[int, int]]:
    """Deal the nodes out into lanes, each with a node, and so a memory, for every client.

    Runs in flight together never share a lane: a node answers one message at a time, and what a
    client remembers of one run is not overwritten by another.
    """
    lanes: queue.SimpleQueue[dict[int, int]] = queue.SimpleQueue()
    for lane in range(count):
        lanes.put({client: nodes[lane * clients + client] for client in range(clients)})
    return lanes


def _in_process(run: _Run, experiments: Sequence[Experiment], clients: int) -> list[Finished]:
    _quiet_flower()
    grid = LocalGrid(client_app, clients)
    nodes = find_clients(grid, clients, timeout=0.0)
    return [run(grid, nodes, index) for index in range(len(experiments))]


def _on_ray(run: _Run, experiments: Sequence[Experiment], clients: int) -> list[Finished]:
    # It brings Flower's database and web server, which nothing but a simulation on Ray starts.
    from flwr.simulation import run_simulation

    _quiet_flower()
    workers = experiments[0].federation.workers
    finished: list[Finished] = []
    timeout = max(experiment.federation.timeout for experiment in experiments)
    # One run more than there are workers keeps these busy while the server merges.
    in_flight = min(workers + 1, len(experiments))
    server_app = ServerApp()
    stopped = threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        watched = cast(Grid, _WatchedGrid(grid, stopped))
        lanes = _lanes(find_clients(watched, clients * in_flight, timeout), clients, in_flight)

        def run_in_a_lane(index: int) -> Finished:
            nodes = lanes.get()
            try:
                return run(watched, nodes, index)
            finally:
                lanes.put(nodes)

        with ThreadPoolExecutor(max_workers=in_flight) as pool:
            jobs = [pool.submit(run_in_a_lane, index) for index in range(len(experiments))]
            try:
                finished.extend(job.result() for job in jobs)
            except BaseException:
                # After a mistake no other run needs to go on.
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    try:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=clients * in_flight,
            backend_config={
                "init_args": _ray_arguments(experiments[0].federation),
                "client_resources": {
                    "num_cpus": 1,
                    "num_gpus": _gpu_share(experiments[0].train.device, workers),
                },
            },
        )
    finally:
        # Ctrl-C, or a crash of the engine: let the threads that wait for replies end as well.
        stopped.set()
    return finished


def _ray_arguments(federation: Federation) -> dict[str, Any]:
    """Return what Ray is started with, or how a running cluster is joined: with all its CPUs."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if federation.ray_address:
        return {**quiet, "address": federation.ray_address}
    # "local": a cluster of this run's own, whatever Ray else runs on the machine, or once did.
    own = {"address": "local", "num_cpus": federation.workers, "include_dashboard": False}
    return {**quiet, **own}


class _WatchedGrid:
    """Flower's grid, but waiting ends when the simulation does, or when an actor has died.

    Flower's own loop would wait for the whole timeout, and it never restarts an actor: its share
    of the messages of every later round of every run would be lost.
    """

    def __init__(self, grid: Grid, stopped: threading.Event) -> None:
        self._grid, self._stopped = grid, stopped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and collect replies until all are there or `timeout` seconds have passed."""
        waiting = set(self._grid.push_messages(messages))
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(waiting):
                if reply.has_error() and reply.error.code == ErrorCode.UNKNOWN:
                    raise FedcopraError(
                        "a client process died, perhaps for want of memory; give fewer "
                        f"federation.workers ({' '.join(str(reply.error.reason).split())[:200]})"
                    )
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if waiting and self._stopped.wait(0.05):
                raise FedcopraError("the simulation was stopped")
        return replies


def _gpu_share(device: str, workers: int) -> float:
    """Return the share of a GPU that each actor gets: all of them fit on what there is."""
    import torch

    if choose_device(device).type != "cuda":
        return 0.0
    # An actor sits on one GPU: so many share the fullest one.
    sharing = math.ceil(workers / torch.cuda.device_count())
    return math.floor(10_000 / sharing) / 10_000


def _quiet_flower() -> None:
    """Leave the terminal to our own progress; errors of clients stand in the record."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
