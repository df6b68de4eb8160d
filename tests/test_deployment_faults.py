"""What goes wrong in a deployment: sites die, are cut off or lie, and the SuperLink goes down."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deployed_processes import SITES, Deployment

from common.config import Experiment, load_experiment
from server.deployment.submission import run_on_deployment
from server.simulation import simulate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PATIENCE = 1200.0


def digits(rounds: int) -> Experiment:
    settings = {"partition.clients": 2, "federation.workers": 0, "train.local_steps": 3}
    return load_experiment(
        ROOT / "experiments" / "digits.toml", {**settings, "federation.rounds": rounds}
    )


def simulated_digest(experiment: Experiment) -> str:
    [finished] = simulate([experiment], lambda *_: None)
    return finished.outcomes.digest


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """A SuperLink without nodes."""
    (tmp_path / "deployed").mkdir()
    deployment = Deployment(tmp_path / "deployed")
    try:
        deployment.start_server()
        yield deployment
    finally:
        deployment.stop()


class Run:
    """A run that is followed in a thread of its own."""

    def __init__(self, deployment: Deployment, experiment: Experiment, out: Path) -> None:
        self.said: list[str] = []
        self._out = out
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._end: Future[int] = self._thread.submit(
            run_on_deployment,
            experiment,
            deployment.superlink,
            deployment.results,
            out,
            self.said.append,
        )

    def record(self) -> dict[str, Any]:
        """Wait for the end, and return the record."""
        self._end.result(timeout=PATIENCE)
        record: dict[str, Any] = json.loads((self._out / "record.json").read_text("utf-8"))
        return record

    def failed(self) -> str:
        """Wait for the end, which must be an error, and return what it says."""
        return str(self._end.exception(timeout=PATIENCE))

    def in_round(self, number: int) -> Callable[[], bool]:
        """Return whether the round before is over."""
        return lambda: any(line.startswith(f"round {number - 1}:") for line in self.said)

    @property
    def rounds(self) -> list[str]:
        return [line for line in self.said if line.startswith("round ")]


def until(holds: Callable[[], bool], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def trains(deployment: Deployment, site: str, times: int) -> Callable[[], bool]:
    """Return whether a site has been told to train so often."""
    return lambda: deployment.log(site).count("Receiving: train message") >= times


def test_a_site_that_dies_in_mid_round_is_named_and_comes_back(
    deployment: Deployment, tmp_path: Path
) -> None:
    for partition, site in enumerate(SITES):
        deployment.start_node(site, partition)
    run = Run(deployment, digits(rounds=5), tmp_path / "run")
    until(trains(deployment, "site-2", 2))
    deployment.kill("site-2")
    until(run.in_round(3))
    deployment.start_node("site-2", 1)
    rounds = run.record()["rounds"]
    fates = [[client["status"] for client in entry["clients"]] for entry in rounds]
    assert fates[0] == ["ok", "ok"]
    assert fates[1] == ["ok", "failed"]
    assert fates[-1] == ["ok", "ok"]
    assert "heartbeat" in rounds[1]["clients"][1]["reason"]
    assert rounds[1]["clients"][1]["weight"] == 0.0


def test_a_superlink_that_is_stopped_and_started_loses_nothing(
    deployment: Deployment, tmp_path: Path
) -> None:
    experiment = digits(rounds=3)
    for partition, site in enumerate(SITES):
        deployment.start_node(site, partition)
    run = Run(deployment, experiment, tmp_path / "run")
    until(trains(deployment, "site-1", 2))
    deployment.terminate("superlink")
    time.sleep(5)
    deployment.start_superlink()
    record = run.record()
    assert record["digest"] == simulated_digest(experiment)
    assert [client["status"] for client in record["rounds"][-1]["clients"]] == ["ok", "ok"]


def test_what_a_killed_superlink_has_cut_off_a_new_run_takes_to_the_same_end(
    deployment: Deployment, tmp_path: Path
) -> None:
    experiment = digits(rounds=4)
    for partition, site in enumerate(SITES):
        deployment.start_node(site, partition)
    cut = Run(deployment, experiment, tmp_path / "cut")
    until(cut.in_round(3))
    for part in ("server-app", "superlink"):  # a power cut at the server
        deployment.kill(part)
    deployment.start_server()
    assert "finished:failed" in cut.failed()
    again = Run(deployment, experiment, tmp_path / "again")
    record = again.record()
    assert len(again.rounds) < 4
    assert [entry["round"] for entry in record["rounds"]] == [1, 2, 3, 4]
    assert record["digest"] == simulated_digest(experiment)


LIAR = """\
from pathlib import Path

if b"flwr-clientapp" in Path("/proc/self/cmdline").read_bytes():
    import common.messages

    pack = common.messages.pack_update

    def pack_garbage(outcome, tensors):
        return pack(outcome, {name: tensor * float("nan") for name, tensor in tensors.items()})

    common.messages.pack_update = pack_garbage
"""


def test_a_site_that_returns_garbage_is_named_and_left_out(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Its code is the right one, as far as its digest says; what it returns is not."""
    (tmp_path / "liar").mkdir()
    (tmp_path / "liar" / "sitecustomize.py").write_text(LIAR, encoding="utf-8")
    deployment.start_node("site-1", 0)
    deployment.start_node("site-2", 1, environment={"PYTHONPATH": f"{tmp_path / 'liar'}:{ROOT}"})
    record = Run(deployment, digits(rounds=2), tmp_path / "run").record()
    for entry in record["rounds"]:
        honest, liar = entry["clients"]
        assert (honest["status"], honest["weight"]) == ("ok", 1.0)
        assert (liar["status"], liar["weight"]) == ("refused", 0.0)
        assert "finite" in liar["reason"]


def test_twenty_seconds_without_a_line_are_no_failure(
    deployment: Deployment, tmp_path: Path
) -> None:
    experiment = digits(rounds=3)
    line = Line(deployment.port)
    try:
        deployment.start_node("site-1", 0)
        deployment.start_node("site-2", 1, superlink=f"127.0.0.1:{line.port}")
        run = Run(deployment, experiment, tmp_path / "run")
        until(trains(deployment, "site-2", 2))
        line.cut()
        time.sleep(20)
        line.mend()
        record = run.record()
    finally:
        line.close()
    fates = [client["status"] for entry in record["rounds"] for client in entry["clients"]]
    assert fates == ["ok"] * 6
    assert record["digest"] == simulated_digest(experiment)


class Line:
    """A line to a port of this machine that can be cut: nothing arrives until it is mended.

    As with lost packets, connections neither break nor are refused; what was sent comes late.
    """

    def __init__(self, port: int) -> None:
        self._far = port
        self._open: list[socket.socket] = []
        self._whole = threading.Event()
        self._whole.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self.mend()
        for end in (self._listening, *self._open):
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._far))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._whole.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
