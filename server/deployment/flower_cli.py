"""Flower's command line, through which runs are submitted and followed, and sites registered."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common.errors import FedcopraError

_UNREACHABLE = "Connection to the SuperLink is unavailable"


class UnreachableError(FedcopraError):
    """The SuperLink does not answer: it may be starting again, or be cut off for a while."""


def failure(said: str) -> FedcopraError:
    """Return the error that fits what Flower's command line said."""
    return (UnreachableError if _UNREACHABLE in said else FedcopraError)(said)


@dataclass(frozen=True)
class Superlink:
    """Where runs are submitted to.

    Attributes:
        address: host and port of its control API.
        ca: the certificate that it must be signed by; None is plain HTTP.
    """

    address: str
    ca: Path | None


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and what it printed."""

    code: int
    output: str
    error: str

    @property
    def in_short(self) -> str:
        """Return the end of what it printed, on one line."""
        return " ".join((self.output + " " + self.error).split())[-400:] or f"exit {self.code}"


class FlowerCli:
    """Flower's command line, with a home of its own: exit codes say little, JSON says more.

    To be used in a `with` statement, at whose end its process ends.
    """

    connection = "deployed"

    def __init__(self, superlink: Superlink, scratch: Path) -> None:
        self._home = scratch / "flower"
        self._home.mkdir()
        lines = [f"[superlink.{self.connection}]", f'address = "{superlink.address}"']
        if superlink.ca is None:
            lines.append("insecure = true")
        else:
            lines.append(f"root-certificates = {json.dumps(str(superlink.ca))}")
        (self._home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "server.deployment.flower_process"],
            env={**os.environ, "FLWR_HOME": str(self._home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def submit(self, bundle: Path) -> int:
        """Return the id of the new run."""
        answer = self._ask("run", str(bundle), self.connection)
        return int(answer["run-id"])

    def status(self, run: int) -> str:
        """Return `pending`, `starting`, `running`, or `finished:` and how."""
        answer = self._ask("ls", self.connection, "--run-id", str(run))
        return str(answer["runs"][0]["status"])

    def stop(self, run: int) -> None:
        """Stop a run."""
        self.call("stop", str(run), self.connection)

    def log(self, run: int) -> list[str]:
        """Return the lines that the ServerApp has logged so far."""
        return self.call("log", str(run), self.connection, "--show").output.splitlines()

    def last_words(self, run: int) -> str:
        """Return the line of the log that names the error, or the last one."""
        lines = [line.strip() for line in self.log(run) if line.strip()]
        named = [line for line in lines if "Error" in line]
        return (named or lines or ["its log is empty"])[-1]

    def _ask(self, command: str, *arguments: str) -> Mapping[str, Any]:
        done = self.call(command, *arguments, "--format", "json")
        try:
            answer: Mapping[str, Any] = json.loads(done.output)
        except json.JSONDecodeError:
            raise failure(f"flwr {command}: {done.in_short}") from None
        if not answer.get("success"):
            why = str(answer.get("error-message") or done.in_short)
            raise failure(f"flwr {command}: {' '.join(why.split())}")
        return answer

    def call(self, *arguments: str) -> Said:
        """Run `flwr` with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise FedcopraError("Flower's command line does not start; try: flwr --help") from None
        answer = self._process.stdout.readline()
        if not answer:
            raise FedcopraError(f"flwr {arguments[0]} ended without an answer")
        return Said(*json.loads(answer))
