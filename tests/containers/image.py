"""What is promised of an image: who it runs as, its size, and nothing in it that should not be."""

import json
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any

MOST_BYTES = 1.6e9
# Of python:3.11-slim; the base that is there may be a larger stand-in.
OFFICIAL_BASE_BYTES = 0.13e9
_TOOLS = {"gcc", "cc", "g++", "c++", "clang", "ld", "make", "uv"}
_SECRET = re.compile(rb"\s*-----BEGIN [A-Z ]*PRIVATE KEY-----")
_SECRET_NAMES = {".env", ".netrc", ".npmrc", ".pypirc", "id_rsa", "id_ecdsa", "id_ed25519"}


def faults_of(image: str, base: str) -> list[str]:
    """Return all that is wrong with an image that was built on `base`."""
    found, below = inspected(image), inspected(base)
    own = found["Size"] - below["Size"]
    print(f"{image}: {found['Size'] / 1e9:.2f} GB, {own / 1e9:.2f} GB of it above {base}")
    faults = []
    if own + OFFICIAL_BASE_BYTES > MOST_BYTES:
        faults.append(f"with the official base it has more than {MOST_BYTES / 1e9} GB")
    if found["Config"]["User"] in ("", "0", "root"):
        faults.append(f"it runs as {found['Config']['User']!r}")
    history = said(["docker", "history", "--no-trunc", image])
    if "PRIVATE KEY" in history + json.dumps(found["Config"]):
        faults.append("a private key is in its history or settings")
    return [*faults, *sorted(faults_of_layers(image)), *sorted(faults_of_whole(image))]


def faults_of_layers(image: str) -> Iterator[str]:
    """Yield secrets, and files that everybody may write, in any layer.

    What one layer removes is still in the layer below.
    """
    with streamed(["docker", "save", image]) as saved:
        for member in saved:
            if not member.name.endswith((".tar", ".tgz")) and "blobs/" not in member.name:
                continue
            layer = saved.extractfile(member)
            if layer is None or not member.size:
                continue
            with tarfile.open(fileobj=layer, mode="r|*") as files:
                yield from (fault for file in files if (fault := fault_of(file, files)))


def fault_of(file: tarfile.TarInfo, files: tarfile.TarFile) -> str:
    """Say what is wrong with a file of a layer, or nothing."""
    writable = bool(file.mode & stat.S_IWOTH) and (file.isfile() or file.isdir())
    if writable and not (file.isdir() and file.mode & stat.S_ISVTX):
        return f"{file.name}: everybody may write it"
    if PurePath(file.name).name in _SECRET_NAMES:
        return f"{file.name}: its name is that of a secret"
    content = files.extractfile(file) if file.isreg() and file.size < 100_000 else None
    if content is not None and _SECRET.match(content.read(200)):
        return f"{file.name}: a private key"
    return ""


def faults_of_whole(image: str) -> Iterator[str]:
    """Yield compilers and installers in what a container sees."""
    container = said(["docker", "create", image, "true"]).strip()
    try:
        with streamed(["docker", "export", container]) as files:
            for file in files:
                place = PurePath(file.name)
                if place.parent.name == "bin" and (
                    place.name in _TOOLS or "python/bin/pip" in file.name
                ):
                    yield f"{file.name}: a compiler or installer"
    finally:
        said(["docker", "rm", container])


@contextmanager
def streamed(command: Sequence[str]) -> Iterator[tarfile.TarFile]:
    """Give the archive that a command writes, as it comes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        source: IO[bytes] | None = process.stdout
        with tarfile.open(fileobj=source, mode="r|") as archive:
            yield archive
        while source is not None and source.read(1 << 20):
            pass  # to its end, so that the command does too


def inspected(image: str) -> Any:
    """Return what the engine says of an image."""
    [found] = json.loads(said(["docker", "image", "inspect", image]))
    return found


def said(command: Sequence[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
