"""How far the served delta is from the exact mean of the clients' deltas, layer by layer.

Beside it, what averaging the factors apart would have missed on the same updates: their weighted
covariance `Σ w_k s_k (B_k - B̄)(A_k - Ā)`. Where that is small, exactness has little to win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.lowrank import Span, Term, adapted_modules
from common.residuals import residual_name
from common.tails import padded
from strategies.base import Served, Setting, Update, data_weights, model_of

_Summands = list[tuple[float, Term]]


@dataclass(frozen=True)
class RelativeNorms:
    """Frobenius norms relative to that of the exact mean: over all modules, and in each."""

    total: float
    modules: Mapping[str, float]


@dataclass(frozen=True)
class AggregationError:
    """`error`: `‖ΔW_served - Σ w_k ΔW_k‖ / ‖Σ w_k ΔW_k‖`; `covariance` of the factors likewise."""

    error: RelativeNorms
    covariance: RelativeNorms


def aggregation_error(
    served: Sequence[Served], updates: Sequence[Update], setting: Setting
) -> AggregationError | None:
    """Measure the errors of a round, `w_k = n_k/Σn`, in float64; float32 factors leave about 1e-7.

    Deltas are the whole of what was added to the pretrained weights, residuals included. None
    where there is no single served model, or no delta yet.
    """
    if len(served) != 1:
        return None
    model = served[0]
    weights = data_weights(updates)
    shares = [w * u.client.scale for w, u in zip(weights, updates, strict=True)]
    states = [padded(model_of(u.tensors), max(u.client.rank for u in updates)) for u in updates]
    errors, covariances, exact = {}, {}, {}
    for module in adapted_modules(model.tensors):
        terms = [Term.of(state, module) for state in states]
        means: _Summands = list(zip(shares, terms, strict=True))
        mine: _Summands = [(setting.scale(model.rank), Term.of(model.tensors, module))]
        minus: _Summands = [(-c, term) for c, term in means]
        # The base is the same for all clients of a round.
        name = residual_name(module)
        after, before = model.tensors.get(name), updates[0].sent.get(name)
        exact[module] = _norm(means, before)
        errors[module] = _norm([*mine, *minus], _difference(after, before))
        covariances[module] = _norm(_centred(weights, shares, terms), None)
    whole = _root_of_squares(exact)
    if whole == 0:
        return None
    return AggregationError(_relative(errors, exact, whole), _relative(covariances, exact, whole))


def _centred(weights: Sequence[float], shares: Sequence[float], terms: Sequence[Term]) -> _Summands:
    mean_B = sum((w * t.B.double() for w, t in zip(weights, terms, strict=True)), torch.zeros(()))
    mean_A = sum((w * t.A.double() for w, t in zip(weights, terms, strict=True)), torch.zeros(()))
    return [(c, Term(t.B - mean_B, t.A - mean_A)) for c, t in zip(shares, terms, strict=True)]


def _difference(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    if after is None or before is None:
        return after if before is None else -before
    return after.double() - before.double()


def _norm(summands: _Summands, dense: Tensor | None) -> float:
    """Return the Frobenius norm of `Σ c_j B_j A_j + dense`, without a full matrix where it can."""
    first = summands[0][1]
    if dense is None and sum(t.rank for _, t in summands) < min(first.B.shape[0], first.A.shape[1]):
        return Span([term for _, term in summands]).norm([c for c, _ in summands])
    total = torch.zeros(()) if dense is None else dense.double()
    for coefficient, term in summands:
        total = total + coefficient * term.B.double() @ term.A.double()
    return float(torch.linalg.matrix_norm(total))


def _relative(
    norms: Mapping[str, float], exact: Mapping[str, float], whole: float
) -> RelativeNorms:
    modules = {m: norm / exact[m] for m, norm in norms.items() if exact[m] > 0}
    return RelativeNorms(_root_of_squares(norms) / whole, modules)


def _root_of_squares(norms: Mapping[str, float]) -> float:
    return float(sum(norm**2 for norm in norms.values()) ** 0.5)
