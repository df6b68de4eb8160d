"""A Ray cluster: runs on two nodes end where they end in this process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from deployed_processes import free_port, wait_for

from common.config import Experiment
from common.errors import ConfigError
from server.simulation import simulate

Build = Callable[..., Experiment]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a head with one CPU, which a second node of one CPU has joined."""
    address = f"127.0.0.1:{free_port()}"
    # A folder of its own, or its address would stay behind for whoever starts Ray next; a short
    # one, for the sockets in it.
    with TemporaryDirectory(prefix="ray-") as folder:
        nodes = [start_node("--head", "--port", address.partition(":")[2], "--temp-dir", folder)]
        try:
            wait_for(address)
            nodes.append(start_node("--address", address))
            yield address
        finally:
            for node in nodes:  # not by `ray stop`, which ends everybody's
                os.killpg(node.pid, signal.SIGTERM)
                node.wait(timeout=60)


def start_node(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(RAY), "start", *arguments, "--num-cpus", "1", "--disable-usage-stats", "--block"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_gives_the_digest_of_one_process(digits_experiment: Build, cluster: str) -> None:
    here = digits_experiment()
    there = digits_experiment(federation__workers=2, federation__ray_address=cluster)
    [alone], [shared] = (simulate([one], lambda *_: None) for one in (here, there))
    assert shared.outcomes.digest == alone.outcomes.digest


def test_an_address_without_workers_is_refused(digits_experiment: Build) -> None:
    experiment = digits_experiment(federation__ray_address="127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"workers = 0 runs clients in this process"):
        simulate([experiment], lambda *_: None)


def test_runs_of_one_comparison_share_one_cluster(digits_experiment: Build) -> None:
    here = digits_experiment(federation__workers=1)
    there = digits_experiment(federation__workers=1, federation__ray_address="127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"one federation\.ray_address"):
        simulate([here, there], lambda *_: None)


@pytest.mark.parametrize("device", ["cuda:7", "cuda"])
def test_a_gpu_that_is_not_there_is_named(digits_experiment: Build, device: str) -> None:
    import torch

    if torch.cuda.device_count() > 7 or (torch.cuda.is_available() and device == "cuda"):
        pytest.skip("this machine has the GPU that is asked for")
    with pytest.raises(ConfigError, match=rf"{device}.*torch finds"):
        simulate([digits_experiment(train__device=device)], lambda *_: None)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps"])
def test_a_device_of_no_known_form_is_refused(digits_experiment: Build, device: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.device"):
        digits_experiment(train__device=device)
