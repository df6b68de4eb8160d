"""The whole way on a real engine: build, up, run, compare, join, down.

`python tests/containers/run.py` needs a Docker engine and `docker compose` or `docker-compose`. It
changes nothing outside a folder of its own and the project's containers, networks and images, and
ends with exit code 1 at the first thing that is not as it should be. `--image` takes an image that
is there already; else the environment says of the build what `docker build` has to know: `TORCH`,
`TORCH_INDEX`, `BUILD_NETWORK`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from image import faults_of, said

ROOT = Path(__file__).parents[2]
PROJECT = "fedcopra-test"
THIRD = "hospital-3"
BASE = "python:3.11-slim"
EXPERIMENT = "experiments/digits.toml"
SHORT = ("--set", "federation.rounds=2", "--set", "train.local_steps=5")
FEDCOPRA = [sys.executable, "-W", "ignore", "-c", "from server.cli import main; main()"]


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description="Run the digits experiment in containers.")
    parser.add_argument("--image", default="", help="an image to use instead of building one")
    parser.add_argument("--control-port", type=int, default=18000)
    parser.add_argument("--fleet-port", type=int, default=18443)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedcopra-containers-") as scratch:
        place = Path(scratch) / "fedcopra"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*cache*", ".venv", "runs"))
        image = given.image or build(place)
        faults = faults_of(image, BASE)
        expect(not faults, "the image is not as promised:\n" + "\n".join(faults[:20]))
        print("the image holds what is promised: user, size, permissions, no secrets, no compiler")
        there = Deployed(place, image, given.control_port, given.fleet_port)
        there.fedcopra("certs")
        check_files(there)
        with up(there):
            check_gateway(there)
            compare(there, clients=2)
            with third_site(there):
                compare(there, clients=3)
            compare_on_ray(there)
        left = leftovers()
        expect(not left, f"down left behind: {left}")
    print("all is as it should be")


@dataclass(frozen=True)
class Deployed:
    """A copy of the project, whose compose file runs."""

    place: Path
    image: str
    control_port: int
    fleet_port: int

    @property
    def superlink(self) -> str:
        """Return where runs are submitted."""
        return f"127.0.0.1:{self.control_port}"

    def compose(self, *arguments: str, folder: Path | None = None, project: str = PROJECT) -> None:
        """Run compose, of either generation."""
        run([*compose_command(), "-p", project, *arguments], folder or self.place, self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """Return what the compose file is told."""
        return {
            "FEDCOPRA_IMAGE": self.image,
            "FEDCOPRA_CONTROL_PORT": str(self.control_port),
            "FEDCOPRA_FLEET_PORT": str(self.fleet_port),
        }

    def fedcopra(self, *arguments: str) -> None:
        """Run our own command line, with the code of the copy."""
        run([*FEDCOPRA, *arguments], self.place)


def build(place: Path) -> str:
    """Build the image with what the environment says of wheels; return its name."""
    image = f"{PROJECT}:built"
    arguments = [
        f"--build-arg={name}={os.environ[name]}"
        for name in ("TORCH", "TORCH_INDEX")
        if name in os.environ
    ]
    network = ["--network", os.environ["BUILD_NETWORK"]] if "BUILD_NETWORK" in os.environ else []
    run(["docker", "build", "--quiet", *network, *arguments, "-t", image, "."], place)
    return image


def check_files(there: Deployed) -> None:
    """Compose takes its file, and its file with the GPUs over it."""
    there.compose("config", "--quiet")
    there.compose("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml", "config", "--quiet")


def compare(there: Deployed, clients: int) -> None:
    """Run the experiment on the sites and in a simulation; the digests must be the same."""
    settings = ("--set", f"partition.clients={clients}", *SHORT)
    deployed, simulated = f"deployed-by-{clients}", f"simulated-by-{clients}"
    at = ("--on", "deployment", "--superlink", there.superlink, "--out", deployed)
    there.fedcopra("run", EXPERIMENT, *at, *settings)
    here = ("--set", "federation.workers=0", "--out", simulated)
    there.fedcopra("simulate", EXPERIMENT, *settings, *here)
    digests = [digest(there.place / folder) for folder in (deployed, simulated)]
    expect(digests[0] == digests[1], f"digests differ: {digests}")
    seconds = json.loads((there.place / deployed / "record.json").read_text())["rounds"][-1]
    print(f"{clients} sites over TLS and the simulation agree: {digests[0][:16]}")
    print(f"seconds of the last round: {seconds['seconds']}")


def compare_on_ray(there: Deployed) -> None:
    """Simulate on a head and a worker; the digest is that of the simulation in one process."""
    there.compose("--profile", "ray", "up", "--detach", "--no-build", "ray-head", "ray-worker")
    settings = ("--set", "partition.clients=2", *SHORT, "--set", "federation.workers=2")
    cluster = ("--set", "federation.ray_address=ray-head:6379", "--out", "/app/results/on-ray")
    command = ("fedcopra", "simulate", f"/app/{EXPERIMENT}", *settings, *cluster)
    there.compose("exec", "-T", "ray-head", *command)
    found = digest(there.place / "deployed" / "results" / "on-ray")
    expect(found == digest(there.place / "simulated-by-2"), "the Ray cluster gave another digest")
    print("a Ray head and a worker agree with the simulation in one process")


@contextmanager
def up(there: Deployed) -> Iterator[None]:
    """Bring the services up, and down again with all that was made for them."""
    there.compose("up", "--detach", "--no-build")
    try:
        yield
    except BaseException:
        there.compose("logs", "--tail=60")
        raise
    finally:
        there.compose("--profile", "ray", "down", "--volumes", "--remove-orphans")


@contextmanager
def third_site(there: Deployed) -> Iterator[None]:
    """Let another site join, from a compose project of its own, through the published port."""
    host = said(
        ["docker", "network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}"]
    )
    server = f"{host.strip()}:{there.fleet_port}"
    there.fedcopra("site", "new", THIRD, "--server", server, "--superlink", there.superlink)
    folder, project = there.place / THIRD, f"{PROJECT}-{THIRD}"
    there.compose("up", "--detach", folder=folder, project=project)
    try:
        yield
    except BaseException:
        there.compose("logs", "--tail=40", folder=folder, project=project)
        raise
    finally:
        there.compose("down", "--volumes", folder=folder, project=project)


def check_gateway(there: Deployed) -> None:
    """Sites reach the fleet path, and nothing else."""
    import httpx

    ca = str(there.place / "deployed" / "certificates" / "ca.crt")
    deadline = time.monotonic() + 120
    while True:
        try:
            with httpx.Client(
                base_url=f"https://localhost:{there.fleet_port}", verify=ca
            ) as client:
                answers = {
                    path: client.post(path, content=b"").status_code
                    for path in ("/v1/fleet/", *_CLOSED)
                }
            break
        except httpx.TransportError:
            expect(time.monotonic() < deadline, "the gateway does not answer")
            time.sleep(1)
    print(f"the gateway answers {answers}")
    closed = {path: answers[path] for path in _CLOSED}
    expect(set(closed.values()) <= {400, 403, 404}, f"the gateway lets through {closed}")
    expect({answers["/v1/control/list-runs"], answers["/"]} == {403}, f"not refused: {closed}")
    expect(answers["/v1/fleet/"] != 403, "the gateway keeps the fleet path closed")


# Also ways around: dots, encoded dots, doubled slashes, capitals.
_CLOSED = (
    "/",
    "/v1/control/list-runs",
    "/v1/runtime/",
    "//v1/control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/V1/CONTROL/list-runs",
)


def leftovers() -> str:
    """Return what is left of the projects on the engine."""
    found = [
        said(
            ["docker", *kind, "--quiet", "--filter", f"label=com.docker.compose.project={project}"]
        )
        for project in (PROJECT, f"{PROJECT}-{THIRD}")
        for kind in (("container", "ls", "--all"), ("network", "ls"), ("volume", "ls"))
    ]
    return "".join(found).strip()


def compose_command() -> list[str]:
    """Return how compose is called here."""
    return ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def digest(folder: Path) -> str:
    """Return the digest in a run's record."""
    return str(json.loads((folder / "record.json").read_text(encoding="utf-8"))["digest"])


def run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command in a folder; show what it says."""
    shown = " ".join(command).replace(" ".join(FEDCOPRA), "fedcopra")
    print(f"$ {shown}", flush=True)
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **(environment or {})},
        check=True,
    )


def expect(holds: bool, otherwise: str) -> None:
    """End with exit code 1 unless it holds."""
    if not holds:
        sys.exit(otherwise)


if __name__ == "__main__":
    main()
