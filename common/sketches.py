"""Sketches of a client's delta, for merges that only ever see sums of them (FedASK).

arXiv 2507.09990: with one random Ω (n, q) for all, the client sends `Y = s·B·(A·Ω)` (m, q); the
server orthonormalises the weighted sum, `Q = qr(Σ p_k Y_k)` (m, q), and the client answers with the
projection `P = s·Aᵀ·(Bᵀ·Q)` (n, q). Both are linear in the delta: sums are all that is needed.
"""

import torch
from torch import Tensor

from common.lowrank import Term, adapted_modules
from common.seeds import torch_generator
from common.tensors import Tensors

_SKETCH, _BASIS, _PROJECTION = ".sketch.weight", ".basis.weight", ".projection.weight"


def sketch_name(module: str) -> str:
    """Return the name of a module's sketch (m, q)."""
    return module + _SKETCH


def basis_name(module: str) -> str:
    """Return the name of a module's orthonormal basis (m, q)."""
    return module + _BASIS


def projection_name(module: str) -> str:
    """Return the name of a module's projection (n, q)."""
    return module + _PROJECTION


def sketches(factors: Tensors, scale: float, width: int, seed: int) -> dict[str, Tensor]:
    """Return the sketch of every module; `seed` is that of the round, the same for all clients."""
    made = {}
    for module in adapted_modules(factors):
        term = Term.of(factors, module)
        stream = torch_generator(seed, "sketch", module)
        Omega = torch.randn(term.A.shape[1], width, generator=stream, dtype=torch.float64)
        made[sketch_name(module)] = (scale * term.B.double() @ (term.A.double() @ Omega)).float()
    return made


def projections(factors: Tensors, scale: float, bases: Tensors) -> dict[str, Tensor]:
    """Return the projection of every module on the server's basis."""
    made = {}
    for module in adapted_modules(factors):
        term = Term.of(factors, module)
        Q = bases[basis_name(module)].double()
        made[projection_name(module)] = (
            scale * term.A.double().T @ (term.B.double().T @ Q)
        ).float()
    return made
