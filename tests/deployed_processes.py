"""A deployment of processes on this machine: SuperLink and SuperNodes over TLS, with keys."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from server.deployment.certificates import SERVER_SECRET, make_certificates, site_keys
from server.deployment.flower_cli import Superlink
from server.deployment.registration import register

ROOT = Path(__file__).parent.parent
SITES = ("site-1", "site-2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(address: str, patience: float = 90.0) -> None:
    """Wait until something answers at HOST:PORT."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with socket.socket() as tried:
            if not tried.connect_ex((host, int(port))):
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {address}")


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it has started: Flower starts some in sessions of their own."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass
class Deployment:
    """A SuperLink with its files below `folder`, and the processes that were started."""

    folder: Path
    port: int = field(default_factory=free_port)
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_certificates(self.keys, [], SITES)
        self.results.mkdir()

    @property
    def keys(self) -> Path:
        return self.folder / "certificates"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def superlink(self) -> Superlink:
        return Superlink(f"127.0.0.1:{self.port}", self.keys / "ca.crt")

    def start_server(self) -> None:
        """Start the SuperLink, and what runs ServerApps beside it, as in the containers."""
        self.start_superlink()
        self._start_server_app()

    def start_superlink(self) -> None:
        """Start it, wait until it answers, and register the sites' keys."""
        self._start(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.keys / "ca.crt")),
            *("--ssl-certfile", str(self.keys / "server.pem")),
            *("--ssl-keyfile", str(self.keys / "server.key")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--database", str(self.folder / "state.db")),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(self.keys / SERVER_SECRET)),
        )
        wait_for(self.superlink.address)
        register(self.superlink, self.keys / "registered")

    def _start_server_app(self) -> None:
        self._start(
            "server-app",
            "flower-superexec",
            *("--runtime-api-address", self.superlink.address),
            *("--root-certificates", str(self.keys / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.keys / SERVER_SECRET)),
        )

    def start_node(
        self,
        site: str,
        partition: int,
        *,
        key: Path | None = None,
        ca: Path | None = None,
        has_key: bool = True,
        superlink: str = "",
        name: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a SuperNode with the site's key, with another key or CA, or with none.

        `name` is what it runs as beside a node of the same site.
        """
        shown = str(key or site_keys(self.keys, site).private)
        return self._start(
            name or site,
            "flower-supernode",
            *("--root-certificates", str(ca or self.keys / "ca.crt")),
            *("--superlink", superlink or self.superlink.address),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f"partition-id={partition}"),
            *(("--auth-supernode-private-key", shown) if has_key else ()),
            environment=environment or {},
        )

    def terminate(self, name: str, patience: float = 60.0) -> None:
        """Ask one process to end, as an administrator does."""
        self.running[name].terminate()
        self.running[name].wait(timeout=patience)

    def kill(self, name: str) -> None:
        """Let a process and all that it has started die at once, as in a power cut."""
        for process in family(self.running[name].pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.running[name].wait(timeout=60)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def stop(self) -> None:
        """End all processes and theirs, sites first."""
        for name in sorted(self.running, key=lambda name: name in ("server-app", "superlink")):
            children = family(self.running[name].pid)
            with suppress(subprocess.TimeoutExpired):
                self.terminate(name, patience=20)
            for process in children:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _start(
        self, name: str, command: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        assert name not in self.running or self.running[name].poll() is not None, f"{name} runs"
        log = (self.folder / f"{name}.log").open("ab")
        self.running[name] = subprocess.Popen(
            [str(Path(sys.executable).with_name(command)), *arguments],
            cwd=self.folder,
            env={**self._environment(name), **(environment or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        return self.running[name]

    def _environment(self, name: str) -> Mapping[str, str]:
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            # Flower starts its own commands by name.
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.folder / "flower" / name),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "FEDCOPRA_CACHE": str(self.folder / "cache"),
        }
