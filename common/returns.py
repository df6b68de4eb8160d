"""What a client's reply has to hold, and how to read it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.candidates import ERRORS, GAINS
from common.compression import Format, decode
from common.errors import UpdateRefusedError
from common.lowrank import adapted_modules, factor_names, is_factor
from common.rules import LocalRules
from common.sketches import projection_name, sketch_name
from common.tails import kept_directions
from common.tensors import Tensors, check_names, check_update, is_prompt, part_of

Shapes = Mapping[str, torch.Size]


def wanted_update(model: Tensors, trains: Sequence[str], rules: LocalRules) -> list[Shapes]:
    """Return the forms that an update may have, the usual one first.

    `model` is what the client was sent and `trains` the parts it was to train.
    """
    public = [part for part in trains if part not in rules.keeps]
    # Control variates are named after parts, and are no parts themselves.
    shapes = {n: t.shape for n, t in model.items() if part_of(n) in public}
    if rules.sketch:
        shapes = {n: shape for n, shape in shapes.items() if not is_factor(n)}
        shapes |= {
            sketch_name(module): torch.Size([model[factor_names(module)[0]].shape[0], rules.sketch])
            for module in adapted_modules(model)
        }
    if rules.control_variates:
        shapes |= {f"control/{name}": shape for name, shape in shapes.items()}
    if rules.probes:
        # Hits and trials of every position.
        shapes |= {
            f"probed/{n}": torch.Size([2, t.shape[-2]]) for n, t in model.items() if is_prompt(n)
        }
    return [shapes, _pruned(shapes, rules.tail_share)] if rules.tail_share < 1 else [shapes]


def wanted_projections(model: Tensors, rules: LocalRules) -> list[Shapes]:
    """Return the form of the projections that a client answers with."""
    return [
        {
            projection_name(module): torch.Size(
                [model[factor_names(module)[1]].shape[1], rules.sketch]
            )
            for module in adapted_modules(model)
        }
    ]


def wanted_scores(candidates: int) -> list[Shapes]:
    """Return the form of a judge's scores of this many candidates."""
    size = torch.Size([candidates])
    return [{GAINS: size, ERRORS: size}]


def _pruned(shapes: Shapes, share: float) -> Shapes:
    def cut(name: str, shape: torch.Size) -> torch.Size:
        axis = {"lora_A": 0, "lora_B": 1}[part_of(name)]
        sizes = list(shape)
        sizes[axis] = kept_directions(sizes[axis], share)
        return torch.Size(sizes)

    return {name: cut(name, s) if is_factor(name) else s for name, s in shapes.items()}


def read_update(
    received: Tensors, wanted: Sequence[Shapes], model: Tensors, form: Format
) -> dict[str, Tensor]:
    """Return the tensors that a reply stands for: increments over `model`, unless in float32.

    Raises:
        UpdateRefusedError: it has none of the forms wanted, or holds NaN.
    """
    refusals: list[UpdateRefusedError] = []
    for shapes in wanted:
        try:
            return _read(received, shapes, model, form)
        except UpdateRefusedError as error:
            refusals.append(error)
    raise refusals[0]


def _read(received: Tensors, shapes: Shapes, model: Tensors, form: Format) -> dict[str, Tensor]:
    check_names(received, shapes)
    decoded = {}
    for name, shape in shapes.items():
        try:
            decoded[name] = decode(received[name], form, shape)
        except UpdateRefusedError as error:
            raise UpdateRefusedError(f"{name} {error}") from None
        if form != "float32" and name in model:
            decoded[name] += model[name][tuple(slice(size) for size in shape)]
    check_update(decoded, shapes)
    return decoded
