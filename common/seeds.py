"""Child seeds: every random stream of a run is a function of the seed and of what it is for.

No stream depends on the order in which work happens to be done, so a run gives the same numbers
on one worker or on many. Nothing here touches a global random state.
"""

import hashlib

import numpy as np
import torch


def child_seed(seed: int, *path: str | int) -> int:
    """Return the seed (63 bits) of the stream called `path` under `seed`.

    >>> child_seed(0, "client", 3, "round", 1) == child_seed(0, "client", 3, "round", 1)
    True
    """
    name = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU generator for the stream called `path` under `seed`."""
    return torch.Generator().manual_seed(child_seed(seed, *path))


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return a NumPy generator for the stream called `path` under `seed`."""
    return np.random.default_rng(child_seed(seed, *path))
