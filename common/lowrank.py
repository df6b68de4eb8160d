"""Factored algebra of adapter deltas `ΔW = s·B·A`, never forming a full matrix.

Shapes: B is (m, r), A is (r, n), ΔW is (m, n). Everything is computed in float64: at rank r the
cost is a few per cent of a training step, and rounding then never decides a merge.
Source: copra-merge specification, section 7.1; Eckart-Young for the optimality of truncation.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from common.seeds import torch_generator
from common.tensors import Tensors

_A, _B = ".lora_A.weight", ".lora_B.weight"


def factor_names(module: str) -> tuple[str, str]:
    """Return the names of (B, A) of `module` in a `{name: tensor}` state."""
    return module + _B, module + _A


def adapted_modules(tensors: Iterable[str]) -> list[str]:
    """Return the modules that hold LoRA factors, sorted by name."""
    return sorted({name.removesuffix(_B) for name in tensors if name.endswith(_B)})


def is_factor(name: str) -> bool:
    """Say whether `name` is a LoRA factor (and not a head, say)."""
    return name.endswith((_A, _B))


def kaiming_start(rank: int, features: int, module: str, seed: int, restart: int = 0) -> Tensor:
    """Draw A (rank, features) as PEFT does: Kaiming-uniform with a = √5, so within ±1/√features.

    A function of the names and numbers alone, so that server and clients draw the same. `restart`
    counts how often a method has thrown its adapters away; 0 is the common start.
    """
    stream = torch_generator(seed, "lora_A", module, *([restart] if restart else []))
    draw = torch.rand(rank, features, generator=stream)
    return (2 * draw - 1) * float(features**-0.5)


@dataclass(frozen=True)
class Term:
    """One product `B·A` of a sum of low-rank matrices: B (m, r), A (r, n)."""

    B: Tensor
    A: Tensor

    @classmethod
    def of(cls, tensors: Tensors, module: str) -> "Term":
        """Read the factors of `module` from a state."""
        name_B, name_A = factor_names(module)
        return cls(tensors[name_B], tensors[name_A])

    @classmethod
    def dense(cls, matrix: Tensor) -> "Term":
        """Write a full (m, n) matrix as a term of rank n; for controls and small models."""
        return cls(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))

    @property
    def rank(self) -> int:
        """Return r, the inner dimension."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Directions:
    """K ways to move a model.

    Attributes:
        stacks: by module, B (m, R) and A (R, n): direction k is `B·diag(mixing[:, k])·A`.
        mixing: (R, K), the same for every module.
        entries: by name, the K changes (K, ...) of every other tensor that moves: heads.
    """

    stacks: Mapping[str, Term]
    mixing: Tensor
    entries: Tensors


def named_factors(module: str, term: Term) -> dict[str, Tensor]:
    """Return the factors of `module` under their names, float32 and contiguous."""
    name_B, name_A = factor_names(module)
    return {name_A: term.A.float().contiguous(), name_B: term.B.float().contiguous()}


@dataclass(frozen=True)
class SVD:
    """A factored matrix `U·diag(S)·Vᵀ`: U (m, k), S (k,) descending, V (n, k), all float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def truncated(self, rank: int) -> "SVD":
        """Return the best approximation of rank at most `rank` (Eckart-Young)."""
        return SVD(self.U[:, :rank], self.S[:rank], self.V[:, :rank])

    def dense(self) -> Tensor:
        """Return the full (m, n) matrix; for oracles and tests."""
        return (self.U * self.S) @ self.V.T


def kept_energy(svds: Iterable[SVD], rank: int) -> float:
    """Return the share of the squared Frobenius norm, over all, in the first `rank` directions."""
    return kept_share((svd.S for svd in svds), rank)


def kept_share(spectra: Iterable[Tensor], rank: int) -> float:
    """Return `kept_energy` of matrices of which only the singular values are still there."""
    kept, total = 0.0, 0.0
    for S in spectra:
        kept += float(S[:rank].square().sum())
        total += float(S.square().sum())
    return kept / total if total > 0 else 1.0


def best_of_dense(matrix: Tensor, rank: int) -> tuple[SVD, float]:
    """Return the best approximation of a full (m, n) matrix, and the squared norm of the whole.

    By the leading eigenvectors of the smaller Gram matrix, which is several times faster than a
    full SVD; what it finds is within about 1e-8 of the largest singular value.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).double()
    size = len(wide)
    try:
        _, vectors = scipy.linalg.eigh(
            (wide @ wide.T).numpy(), subset_by_index=[max(0, size - rank), size - 1], driver="evx"
        )
        leading = torch.from_numpy(vectors).flip(1)
    except scipy.linalg.LinAlgError:  # inverse iteration may fail where values lie close together
        leading = _thin_svd(wide)[0][:, :rank]
    X, S, Yh = _thin_svd(leading.T @ wide)
    left, right = leading @ X, Yh.T
    return _signed(right, S, left) if tall else _signed(left, S, right), float(wide.square().sum())


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ; by LAPACK's slow and sure driver where torch's does not converge."""
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        found = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        U, S, Vh = (torch.from_numpy(part) for part in found)
    return U, S, Vh


def _signed(U: Tensor, S: Tensor, V: Tensor) -> SVD:
    """Turn signs so that the entry of largest magnitude of every left vector is positive."""
    largest = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(U.gather(0, largest) < 0, -1.0, 1.0)
    return SVD(U * signs, S, V * signs)


# From so many times the rank on, the leading directions alone are faster to find.
_FEW = 4


class Span:
    """The common column and row space of several terms.

    One QR of the stacked factors serves every coefficient vector: with `[B_j] = Q_P·T_P` and
    `[A_jᵀ] = Q_Q·T_Q`, the sum `Σ_j B_j·diag(c_j)·A_j` is `Q_P·C(c)·Q_Qᵀ` with the small core
    `C(c) = Σ_j T_P,j·diag(c_j)·T_Q,jᵀ`.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise ValueError("a span needs at least one term")
        self._ranks = [term.rank for term in terms]
        self._P = _Orthonormal(torch.cat([t.B.double() for t in terms], dim=1))
        self._Q = _Orthonormal(torch.cat([t.A.double().T for t in terms], dim=1))

    def core(self, coefficients: Sequence[float | Tensor]) -> Tensor:
        """Return `C(c)`; a coefficient is a number, or a (r_j,) tensor: one for each direction."""
        columns = [
            torch.as_tensor(c, dtype=torch.float64).expand(rank)
            for c, rank in zip(coefficients, self._ranks, strict=True)
        ]
        return (self._P.triangle * torch.cat(columns)) @ self._Q.triangle.T

    def svd(self, coefficients: Sequence[float | Tensor]) -> SVD:
        """Return the exact SVD of `Σ_j B_j·diag(c_j)·A_j`.

        The entry of largest magnitude of every left singular vector is positive, so that the same
        matrix always gives the same factors.
        """
        X, S, Yh = _thin_svd(self.core(coefficients))
        return _signed(self._P.times(X), S, self._Q.times(Yh.T))

    def best(self, coefficients: Sequence[float | Tensor], rank: int) -> tuple[SVD, float]:
        """Return the best approximation of that rank, and the squared norm of the whole sum.

        Where few of many directions are wanted, by `best_of_dense` on the core.
        """
        core = self.core(coefficients)
        if min(core.shape) < _FEW * rank:
            X, S, Yh = _thin_svd(core)
            found = SVD(X, S, Yh.T).truncated(rank)
        else:
            found, _ = best_of_dense(core, rank)
        energy = float(core.square().sum())
        return _signed(self._P.times(found.U), found.S, self._Q.times(found.V)), energy

    def gram(self, mixing: Tensor) -> Tensor:
        """Return (K, K): inner products of `Σ_j B_j·diag(c_jk)·A_j`, for mixing (Σ r_j, K)."""
        P, Q = self._P.triangle, self._Q.triangle
        return mixing.T @ ((P.T @ P) * (Q.T @ Q)) @ mixing

    def norm(self, coefficients: Sequence[float | Tensor]) -> float:
        """Return the Frobenius norm of `Σ_j B_j·diag(c_j)·A_j`."""
        return float(torch.linalg.matrix_norm(self.core(coefficients)))


class _Orthonormal:
    """The QR of a matrix (m, n), its Q kept as reflections: it is never wanted as a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        found, self._scales = torch.geqrf(matrix)
        self._size = min(matrix.shape)
        self.triangle = found[: self._size].triu()
        self._reflections = found[:, : self._size]

    def times(self, matrix: Tensor) -> Tensor:
        """Return `Q·X` (m, k) for X (min(m, n), k)."""
        missing = len(self._reflections) - len(matrix)
        padded = functional.pad(matrix, (0, 0, 0, missing))
        product: Tensor = torch.ormqr(self._reflections, self._scales, padded)
        return product


class RunningSum:
    """`Σ_j c_j·B_j·A_j` over terms that come one at a time; for one module.

    Exact without `limit`: all terms are kept. With it at most `limit` directions and one term are
    held, in float32: what no longer fits is truncated to the best `limit`, and `dropped` bounds
    the Frobenius norm of all that the sum has lost, roundings included.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._terms: list[tuple[float, Term]] = []
        self.dropped = 0.0

    def add(self, coefficient: float, term: Term) -> None:
        """Add `coefficient·B·A`."""
        self._terms.append((coefficient, term))
        if self._limit and len(self._terms) > 1:
            self._compress()

    def svd(self, factor: float = 1.0) -> SVD:
        """Return the SVD of `factor` times the sum."""
        span = Span([term for _, term in self._terms])
        return span.svd([factor * coefficient for coefficient, _ in self._terms])

    def _compress(self) -> None:
        whole = self.svd()
        kept = whole.truncated(self._limit)
        tail = float(whole.S[self._limit :].norm())
        # Two factors rounded to float32, each to half a unit in the last place.
        self.dropped += tail + float(kept.S.norm()) * 2**-23
        self._terms = [(1.0, Term((kept.U * kept.S).float(), kept.V.T.float().contiguous()))]


def balanced_factors(svd: SVD, scale: float) -> Term:
    """Split an SVD evenly into (B, A) with `scale·B·A = U·S·Vᵀ` and `BᵀB = AAᵀ` (γ = ½)."""
    root = (svd.S / scale).sqrt()
    return Term(svd.U * root, root[:, None] * svd.V.T)


def orthonormal_factors(svd: SVD, scale: float, length: float = 1.0) -> Term:
    """Put the singular values into B: `scale·B·A = U·S·Vᵀ`, rows of A orthogonal, all of `length`.

    A row of A as PEFT draws it has length 1/√3 on average.
    """
    return Term(svd.U * (svd.S / (scale * length)), length * svd.V.T)


# How the singular values of a merged delta are split over B and A. `lora` leaves A with rows as
# long as those of a fresh adapter on average, 1/√3, and so a learning rate with what it meant.
GAUGES: Mapping[str, Callable[[SVD, float], Term]] = {
    "balanced": balanced_factors,
    "lora": functools.partial(orthonormal_factors, length=3**-0.5),
}
