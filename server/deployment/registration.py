"""Registration: put the sites' public keys on a SuperLink's list; what is on it stays.

`python -m server.deployment.registration --superlink HOST:PORT --ca FILE FOLDER`
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import FedcopraError
from server.deployment.flower_cli import FlowerCli, Superlink, failure

_KNOWN_ALREADY = "already in use"


def register(superlink: Superlink, keys: Path) -> dict[str, str]:
    """Register every `NAME.pub` in `keys`; return by name `registered` or `known`.

    Raises:
        UnreachableError: the SuperLink does not answer.
        FedcopraError: the SuperLink refuses a key for another reason than that it knows it.
    """
    with TemporaryDirectory() as scratch, FlowerCli(superlink, Path(scratch)) as flower:
        return {file.stem: _register(flower, file) for file in sorted(keys.glob("*.pub"))}


def _register(flower: FlowerCli, key: Path) -> str:
    done = flower.call("supernode", "register", str(key), flower.connection, "--name", key.stem)
    if done.code and _KNOWN_ALREADY not in done.output + done.error:
        raise failure(f"site {key.stem} was not registered: {done.in_short}")
    return "known" if done.code else "registered"


def main() -> None:
    """Register what is in a folder, and say so."""
    parser = argparse.ArgumentParser(description="Register the public keys of sites.")
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("keys", type=Path)
    given = parser.parse_args()
    try:
        found = register(Superlink(given.superlink, given.ca), given.keys)
    except FedcopraError as error:
        sys.exit(f"fedcopra: {error}")
    for site, what in found.items():
        print(f"{site}: {what}")


if __name__ == "__main__":
    main()
