"""The whole way on a real engine: build, up, run, compare, down. `python tests/containers/run.py`

Needs a Docker engine and `docker compose` or `docker-compose`; changes nothing outside a folder of
its own and the project's containers, networks and images. Ends with exit code 1 at the first thing
that is not as it should be. `--image` uses an image that is there already.
"""

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = "fedcopra-test"
DIGITS = ("--set", "partition.clients=2", "--set", "federation.rounds=2")
MOST_BYTES = 1.6e9
FEDCOPRA = [sys.executable, "-W", "ignore", "-c", "from server.cli import main; main()"]


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description="Run the digits experiment in containers.")
    parser.add_argument("--image", default="", help="an image to use instead of building one")
    parser.add_argument("--control-port", default="18000")
    parser.add_argument("--fleet-port", default="18443")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedcopra-containers-") as scratch:
        place = Path(scratch) / "fedcopra"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*cache*", ".venv", "runs"))
        image = given.image or build(place)
        check_image(image)
        environment = {
            "FEDCOPRA_IMAGE": image,
            "FEDCOPRA_CONTROL_PORT": given.control_port,
            "FEDCOPRA_FLEET_PORT": given.fleet_port,
        }
        run([*FEDCOPRA, "certs"], place)
        with up(place, environment):
            check_gateway(place, int(given.fleet_port))
            superlink = f"127.0.0.1:{given.control_port}"
            deployed, simulated = place / "deployed-run", place / "simulated-run"
            at = ("--superlink", superlink, "--out", str(deployed))
            experiment = "experiments/digits.toml"
            run(
                [*FEDCOPRA, "run", experiment, "--on", "deployment", *DIGITS, *at],
                place,
            )
            here = ("--set", "federation.workers=0", "--out", str(simulated))
            run([*FEDCOPRA, "simulate", experiment, *DIGITS, *here], place)
            digests = [digest(deployed), digest(simulated)]
            expect(digests[0] == digests[1], f"digests differ: {digests}")
            print(f"two sites over TLS and the simulation agree: {digests[0][:16]}")
        left = leftovers()
        expect(not left, f"down left behind: {left}")
    print("all is as it should be")


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


def check_image(image: str) -> None:
    """Hold the image to what is promised: size, user, no secrets, nothing that all may write."""
    [found] = json.loads(said(["docker", "image", "inspect", image]))
    size = found["Size"]
    print(f"{image}: {size / 1e9:.2f} GB")
    expect(size <= MOST_BYTES, f"{size / 1e9:.2f} GB is above {MOST_BYTES / 1e9} GB")
    user = found["Config"]["User"]
    expect(user not in ("", "0", "root"), f"the image runs as {user!r}")
    spoken = json.dumps(found["Config"]) + said(["docker", "history", "--no-trunc", image])
    expect("PRIVATE KEY" not in spoken, "a private key is in the image's history")
    bad = [name for name, why in files_of(image) if why]
    expect(not bad, f"secrets, compilers or files that everybody may write: {bad[:10]}")


def files_of(image: str) -> Iterator[tuple[str, str]]:
    """Yield every file of the image, and what is wrong with it."""
    container = said(["docker", "create", image]).strip()
    try:
        with (
            subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as exported,
            tarfile.open(fileobj=exported.stdout, mode="r|") as files,
        ):
            for file in files:
                yield file.name, wrong_with(file)
    finally:
        run(["docker", "rm", container], ROOT)


def wrong_with(file: tarfile.TarInfo) -> str:
    """Say what is wrong with a file of the image, or nothing."""
    name = Path(file.name).name
    writable = bool(file.mode & stat.S_IWOTH) and not file.issym() and not file.isdev()
    if writable and not (file.isdir() and file.mode & stat.S_ISVTX):
        return "everybody may write it"
    if name in ("gcc", "cc", "g++", "clang", "make"):
        return "a compiler"
    if (
        name.endswith((".key", ".pem"))
        and "site-packages" not in file.name
        and ("ssl/certs" not in file.name and "share" not in file.name)
    ):
        return "a key or certificate"
    return ""


@contextmanager
def up(place: Path, environment: dict[str, str]) -> Iterator[None]:
    """Bring the services up, and down again with all that was made for them."""
    compose(place, environment, "up", "--detach", "--no-build")
    try:
        yield
    except BaseException:
        compose(place, environment, "logs", "--tail=60")
        raise
    finally:
        compose(place, environment, "down", "--volumes", "--remove-orphans")


def check_gateway(place: Path, port: int) -> None:
    """Sites reach the fleet path, and nothing else."""
    import httpx

    ca = str(place / "deployed" / "certificates" / "ca.crt")
    deadline = time.monotonic() + 120
    while True:
        try:
            with httpx.Client(base_url=f"https://localhost:{port}", verify=ca) as client:
                answers = {
                    path: client.post(path, content=b"").status_code
                    for path in ("/v1/fleet/", "/v1/control/list-runs", "/v1/runtime/", "/")
                }
            break
        except httpx.TransportError:
            expect(time.monotonic() < deadline, "the gateway does not answer")
            time.sleep(1)
    print(f"the gateway answers {answers}")
    closed = {path: code for path, code in answers.items() if path != "/v1/fleet/"}
    expect(set(closed.values()) == {403}, f"the gateway lets through {closed}")
    expect(answers["/v1/fleet/"] != 403, "the gateway keeps the fleet path closed")


def leftovers() -> str:
    """Return what is left of the project on the engine."""
    label = f"label=com.docker.compose.project={PROJECT}"
    return "".join(
        said(["docker", *kind, "ls", *everything, "--quiet", "--filter", label])
        for kind, everything in (
            (("container",), ("--all",)),
            (("network",), ()),
            (("volume",), ()),
        )
    ).strip()


def compose(place: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run compose, of either generation."""
    command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    run([*command, "-p", PROJECT, *arguments], place, environment)


def digest(folder: Path) -> str:
    """Return the digest in a run's record."""
    return str(json.loads((folder / "record.json").read_text(encoding="utf-8"))["digest"])


def run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command in a folder; show what it says."""
    shown = " ".join(command).replace(FEDCOPRA[-1], "fedcopra")
    print(f"$ {shown}", flush=True)
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **(environment or {})},
        check=True,
    )


def said(command: Sequence[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def expect(holds: bool, otherwise: str) -> None:
    """End with exit code 1 unless it holds."""
    if not holds:
        sys.exit(otherwise)


if __name__ == "__main__":
    main()
