"""Residuals: what a method has added to the frozen base, and who has missed how much of it.

The pretrained weights are never written to, be they float or 4-bit. What is added to the base of
a module gathers beside it in `<module>.residual.weight` (out, in), float32, so that nothing is
rounded to the grid of a quantised base. The server's state also keeps the latest changes as
factors, under `base.<version>/`. A client that has missed some is sent these, or the residual
itself where that is smaller; both add up in the same order and so give the same bits.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from common.lowrank import Term, adapted_modules, factor_names, named_factors
from common.tensors import Tensors

_RESIDUAL, _CHANGE = ".residual.weight", "base."


def residual_name(module: str) -> str:
    """Return the name of the residual of `module`."""
    return module + _RESIDUAL


def is_residual(name: str) -> bool:
    """Say whether `name` is a residual."""
    return name.endswith(_RESIDUAL)


def is_change(name: str) -> bool:
    """Say whether `name` is a factor of a change of the base."""
    return name.startswith(_CHANGE) and "/" in name


def base_version(state: Tensors) -> int:
    """Return how many changes the base of this state has seen."""
    return max(_versions(state), default=0)


def change_base(state: Tensors, change: Mapping[str, Term]) -> dict[str, Tensor]:
    """Return the state with `B·A` added to the base of every module of `change`, a version on.

    Changes that together are no smaller than the residual are forgotten, the oldest first: a
    client that has missed them is sent the residual.
    """
    version = base_version(state) + 1
    changed = dict(state)
    for module, term in change.items():
        factors = named_factors(module, term)
        changed |= {f"{_CHANGE}{version}/{name}": tensor for name, tensor in factors.items()}
    _add(changed, version)
    forgotten, size, limit = (
        set[str](),
        0,
        _size((n, t) for n, t in changed.items() if is_residual(n)),
    )
    for old in sorted(_versions(changed), reverse=True):
        names = _names_of(changed, old)
        size += _size((name, changed[name]) for name in names)
        if old < version and size >= limit:
            forgotten |= names
    return {name: tensor for name, tensor in changed.items() if name not in forgotten}


def missed(state: Tensors, version: int) -> dict[str, Tensor]:
    """Return what takes a client from `version` of the base to that of `state`, the smaller way."""
    newest = base_version(state)
    residuals = {name: tensor for name, tensor in state.items() if is_residual(name)}
    wanted = set(range(version + 1, newest + 1))
    if not wanted <= _versions(state):
        return residuals
    changes = {n: state[n] for v in sorted(wanted) for n in sorted(_names_of(state, v))}
    return changes if _size(changes.items()) < _size(residuals.items()) else residuals


def caught_up(held: Tensors, received: Tensors) -> dict[str, Tensor]:
    """Return the residuals of a client that held some and was sent what it had missed."""
    residuals = {name: tensor for name, tensor in held.items() if is_residual(name)}
    residuals |= {name: tensor for name, tensor in received.items() if is_residual(name)}
    growing = residuals | {name: tensor for name, tensor in received.items() if is_change(name)}
    for version in sorted(_versions(growing)):
        _add(growing, version)
    return {name: tensor for name, tensor in growing.items() if is_residual(name)}


def _add(state: dict[str, Tensor], version: int) -> None:
    """Add the factors of one version to the residuals: in float32, as every client does it."""
    prefix = f"{_CHANGE}{version}/"
    factors = {n.removeprefix(prefix): state[n] for n in _names_of(state, version)}
    for module in adapted_modules(factors):
        name_B, name_A = factor_names(module)
        change = factors[name_B] @ factors[name_A]
        before = state.get(residual_name(module))
        state[residual_name(module)] = change if before is None else before + change


def _versions(state: Tensors) -> set[int]:
    return {int(name.partition("/")[0].removeprefix(_CHANGE)) for name in state if is_change(name)}


def _names_of(state: Tensors, version: int) -> set[str]:
    return {name for name in state if name.startswith(f"{_CHANGE}{version}/")}


def _size(tensors: Iterable[tuple[str, Tensor]]) -> int:
    return sum(tensor.numel() for _, tensor in tensors)
