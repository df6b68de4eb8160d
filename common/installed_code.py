"""Which code runs here: server and clients of a deployment must have the same."""

import functools
import hashlib
from pathlib import Path

from common.errors import FedcopraError

_PACKAGES = ("clients", "common", "server", "strategies")


@functools.cache
def code_digest() -> str:
    """Return the SHA-256, shortened, of the names and contents of all installed modules."""
    root = Path(__file__).parents[1]
    state = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            state.update(f"{file.relative_to(root).as_posix()}\n".encode())
            state.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return state.hexdigest()[:16]


def refuse_other_code(wanted: str, where: str) -> None:
    """Raise `FedcopraError` unless the code here is the code that a run was submitted with."""
    if wanted != code_digest():
        raise FedcopraError(
            f"{where} has fedcopra's code {code_digest()}, the run was submitted with {wanted}; "
            "install the same version on the server, on every site and where runs are submitted"
        )
