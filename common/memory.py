"""What a client remembers from one exchange to the next, so that only what is new has to travel."""

from dataclasses import dataclass, field

from common.tensors import Tensors


@dataclass(frozen=True)
class Memory:
    """A client's memory of a run.

    Attributes:
        parcel: the number of the last parcel that the client unpacked; 0 for none.
        held: the model as of that parcel, residuals included, and without what is the client's own.
        own: what never leaves the client: kept parts under `kept/`, its control variates under
            `control/`, what compression lost under `lost/`, what it has yet to project under
            `pending/`.
    """

    parcel: int = 0
    held: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors with `prefix` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
