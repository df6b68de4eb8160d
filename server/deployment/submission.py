"""Runs on a deployment: pack the experiment into Flower's bundle, submit it, follow it, fetch it.

The bundle is two files of imports and the experiment as text: code and weights are installed where
clients run. The bundle says which code it belongs to, and other code refuses it.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from common.config import Experiment
from common.errors import ConfigError, FedcopraError
from common.installed_code import code_digest
from server.deployment.certificates import CA_CERTIFICATE
from server.deployment.flower_cli import FlowerCli, Superlink, UnreachableError

RESULTS, CERTIFICATES = "results", "certificates"
_POLL_SECONDS = 3.0
# A SuperLink that is restarted, or on the far side of a bad line, is given so long to answer again.
_PATIENCE_SECONDS = 300.0
_ROUND = re.compile(r"round \d+: .*")  # as the ServerApp logs it
_PYPROJECT = """\
[project]
name = "fedcopra-run"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedcopra"

[tool.flwr.app.components]
serverapp = "server_side:app"
clientapp = "client_side:app"

[tool.flwr.app.config]
experiment = {experiment}
code = {code}
share_nodes = false
out = "results"
"""
# Flower looks for an assignment before it submits.
_SIDES = {
    "server_side.py": "import server.app\n\napp = server.app.app\n",
    "client_side.py": "import clients.app\n\napp = clients.app.app\n",
}


def connected(address: str, folder: Path, *, insecure: bool) -> Superlink:
    """Return the SuperLink of the deployment whose files are in `folder`.

    Raises:
        ConfigError: there is no CA certificate.
    """
    ca = folder / CERTIFICATES / CA_CERTIFICATE
    if insecure:
        return Superlink(address, None)
    if not ca.is_file():
        raise ConfigError(
            f"{ca} is missing: make certs makes it, or name the deployment's folder by --deployment"
        )
    return Superlink(address, ca.absolute())


def write_bundle(experiment: Experiment, folder: Path) -> None:
    """Write the files of Flower's app into `folder`."""
    text = json.dumps(experiment.model_dump_json())  # a JSON string is a TOML string
    config = _PYPROJECT.format(experiment=text, code=json.dumps(code_digest()))
    (folder / "pyproject.toml").write_text(config, encoding="utf-8")
    for name, content in _SIDES.items():
        (folder / name).write_text(content, encoding="utf-8")


def run_on_deployment(
    experiment: Experiment,
    superlink: Superlink,
    results: Path,
    out: Path,
    say: Callable[[str], None],
) -> int:
    """Submit the experiment, wait for its end, and copy what it left to `out`; return Flower's id.

    `results` is the folder that the ServerApp writes into, as seen from here.

    Raises:
        FedcopraError: the run was refused, failed, was stopped, or left nothing in `results`.
    """
    with TemporaryDirectory() as scratch, FlowerCli(superlink, Path(scratch)) as flower:
        bundle = Path(scratch) / "fedcopra-run"
        bundle.mkdir()
        write_bundle(experiment, bundle)
        run = flower.submit(bundle)
        say(f"run {run} submitted to {superlink.address}")
        try:
            status = _follow(flower, run, say)
        except KeyboardInterrupt:
            flower.stop(run)
            raise
        if status != "finished:completed":
            raise FedcopraError(f"run {run} ended as {status}: {flower.last_words(run)}")
    found = results / f"run-{run}"
    if not found.is_dir():
        raise FedcopraError(
            f"run {run} completed, but {found} is not there; name the folder that the ServerApp "
            "writes into by --results"
        )
    shutil.copytree(found, out)
    return run


def _follow(flower: FlowerCli, run: int, say: Callable[[str], None]) -> str:
    """Wait for the end of a run and return how it ended; tell of every round.

    Raises:
        UnreachableError: the SuperLink has not answered for minutes.
    """
    status, told, answered = "", 0, time.monotonic()
    while not status.startswith("finished"):
        time.sleep(_POLL_SECONDS)
        try:
            found = flower.status(run)
            lines = flower.log(run)
        except UnreachableError:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
            found, lines = "the SuperLink does not answer", []
        else:
            answered = time.monotonic()
        if found != status:
            say(found)
        status = found
        rounds = [said.group() for line in lines if (said := _ROUND.search(line))]
        for line in rounds[told:]:
            say(line)
        told = max(told, len(rounds))
    return status
