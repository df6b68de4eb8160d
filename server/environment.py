"""The process's environment: what is set before Flower and Ray are imported, what a record says."""

import importlib.metadata
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PRESET = {
    # No telemetry, no calls home, nothing installed behind the user's back.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # One thread a process: clients share the cores.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_RECORDED = ("flwr", "ray", "torch", "transformers", "peft", "numpy", "fedcopra")


def prepare_environment() -> None:
    """Set what Flower, Ray and the numeric libraries read when imported; the user's own stays."""
    for name, value in _PRESET.items():
        os.environ.setdefault(name, value)
    # PEFT imports it wherever it is installed, and on some processors it then warns of a kernel
    # that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, platform and git state, for the record."""
    return {
        "python": platform.python_version(),
        "versions": installed_versions(),
        "git": git_state(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
    }


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that a run's numbers may depend on."""
    return {name: _version(name) for name in _RECORDED}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Return the commit of the code that runs, or None if it is not in a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # In a wheel inside somebody's own repository, that repository's commit would mean nothing.
        git("ls-files", "--error-unmatch", str(Path(__file__)))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
