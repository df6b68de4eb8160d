"""How far the served delta is from the exact mean of the clients' deltas."""

from collections.abc import Sequence

from common.adapters import residual_name
from common.lowrank import Span, Term, adapted_modules
from common.tensors import Tensors
from strategies.base import Served, Setting, Update, data_weights


def aggregation_error(
    served: Sequence[Served], updates: Sequence[Update], setting: Setting
) -> float | None:
    """Return `‖ΔW_served - Σ w_k ΔW_k‖_F / ‖Σ w_k ΔW_k‖_F` over all modules, `w_k = n_k/Σn`.

    Measured on the factors, without a dense matrix, in float64; float32 factors leave about 1e-7.
    None where there is no single served model, or no delta yet.
    """
    if len(served) != 1:
        return None
    model = served[0]
    scale = setting.scale(model.rank)
    weights = data_weights(updates)
    shares = [w * u.client.scale for w, u in zip(weights, updates, strict=True)]
    difference, exact = 0.0, 0.0
    for module in adapted_modules(model.tensors):
        mine = [(scale, Term.of(model.tensors, module)), *_residual(1.0, model.tensors, module)]
        means = [(c, Term.of(u.tensors, module)) for c, u in zip(shares, updates, strict=True)]
        for weight, update in zip(weights, updates, strict=True):
            means += _residual(weight, update.tensors, module)
        span = Span([term for _, term in mine + means])
        coefficients = [c for c, _ in means]
        difference += span.norm([*(c for c, _ in mine), *(-c for c in coefficients)]) ** 2
        exact += span.norm([*(0.0 for _ in mine), *coefficients]) ** 2
    return float((difference / exact) ** 0.5) if exact > 0 else None


def _residual(weight: float, tensors: Tensors, module: str) -> list[tuple[float, Term]]:
    name = residual_name(module)
    return [(weight, Term.dense(tensors[name]))] if name in tensors else []
