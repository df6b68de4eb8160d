"""Tensors kept on disk for the next process: Flower starts one for every message of a deployment.

Where `FEDCOPRA_CACHE` names a folder, what is costly to make again is written there once, and read
memory-mapped from then on; otherwise nothing is kept. A file's name is a digest of all that decides
its content, so nothing there is ever out of date.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.installed_code import code_digest

FOLDER = "FEDCOPRA_CACHE"
# Those that deal, tokenise and resize.
_LIBRARIES = ("flwr-datasets", "datasets", "numpy", "transformers", "tokenizers", "pillow")


def kept_or_made(
    decided_by: Iterable[str | bytes], make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return the tensors that `decided_by`, this code and its libraries lead to."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return make()
    versions = [f"{library} {version(library)}" for library in _LIBRARIES]
    state = hashlib.sha256(f"{code_digest()} {versions}".encode())
    for part in decided_by:
        content = part.encode() if isinstance(part, str) else part
        # With its length, so that no two lists of parts read alike.
        state.update(f"{len(content)}:".encode() + content)
    file = Path(folder) / f"{state.hexdigest()}.safetensors"
    with suppress(OSError, SafetensorError):  # not there, or cut off by a full disk: made again
        found: dict[str, Tensor] = load_file(file)
        return found
    made = make()
    with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.stem}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, unfinished)
        unfinished.rename(file)
    return made
