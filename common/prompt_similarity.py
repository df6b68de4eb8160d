"""How alike two soft prompts are: by their vectors, and by the neurons that they activate.

Prompts P and Q are (l, d). The measures are those of Su et al. (NAACL 2022), and the cosine of mean
vectors of SPoT (arXiv 2110.07904). They compare a prompt row by row, so that a row which means
nothing must be dropped before: see `common.prompt_bank`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.tensors import Tensors


def concat_closeness(P: Tensor, Q: Tensor) -> float:
    """Return `E_concat = 1/(1 + ‖P - Q‖_F)`."""
    return 1 / (1 + float(torch.linalg.vector_norm(P - Q)))


def mean_closeness(P: Tensor, Q: Tensor) -> float:
    """Return `E_avg = 1/(1 + (1/l²) Σ_ij ‖p_i - q_j‖)`."""
    # By differences: the expansion by inner products would lose the digits of near rows.
    distances = torch.cdist(P, Q, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 / (1 + float(distances.mean()))


def concat_cosine(P: Tensor, Q: Tensor) -> float:
    """Return `C_concat = cos(vec P, vec Q)`; 0 where one of them is zero."""
    return float(functional.cosine_similarity(P.flatten(), Q.flatten(), dim=0))


def mean_cosine(P: Tensor, Q: Tensor) -> float:
    """Return `C_avg = (1/l²) Σ_ij cos(p_i, q_j)`; a zero row counts 0."""
    return float((functional.normalize(P, dim=1) @ functional.normalize(Q, dim=1).T).mean())


def cosine_of_means(P: Tensor, Q: Tensor) -> float:
    """Return `cos(mean_i p_i, mean_j q_j)`; 0 where one of them is zero."""
    return float(functional.cosine_similarity(P.mean(dim=0), Q.mean(dim=0), dim=0))


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "concat-closeness": concat_closeness,
    "mean-closeness": mean_closeness,
    "concat-cosine": concat_cosine,
    "mean-cosine": mean_cosine,
    "cosine-of-means": cosine_of_means,
}


def similarity(P: Tensor, Q: Tensor, measure: str = "cosine-of-means") -> float:
    """Return the measure of two prompts (l, d), in float64.

    Raises:
        ConfigError: there is no such measure, or the prompts are not of one shape.
    """
    if measure not in SIMILARITIES:
        choices = ", ".join(SIMILARITIES)
        raise ConfigError(f"similarity {measure!r} is not known; choose one of {choices}")
    if P.ndim != 2 or P.shape != Q.shape:
        raise ConfigError(
            f"prompts of shapes {tuple(P.shape)} and {tuple(Q.shape)} cannot be compared; both "
            "must have the same vectors and width"
        )
    return SIMILARITIES[measure](P.double(), Q.double())


def activation_overlap(first: Tensor, second: Tensor) -> float:
    """Return `ON = |A ∩ B| / √(|A|·|B|)`, the cosine of which neurons two prompts activate.

    Both are bool, (neurons,), of the same neurons. Where one activates none, the overlap is 0.

    Raises:
        ConfigError: they are not of the same neurons, or not bool.
    """
    if first.shape != second.shape or not first.dtype == second.dtype == torch.bool:
        raise ConfigError(
            f"neurons of shapes {tuple(first.shape)} and {tuple(second.shape)}, {first.dtype} and "
            f"{second.dtype}, cannot be compared; they must be bool, of the same neurons"
        )
    active = float(first.sum()) * float(second.sum())
    return float((first & second).sum()) / active**0.5 if active else 0.0


def similarity_map(
    prompts: Tensors, measure: Callable[[Tensor, Tensor], float] = similarity
) -> tuple[tuple[str, ...], Tensor]:
    """Return the names, and the measure of every pair, (n, n) float64, in their order.

    Of neurons in place of prompts with `activation_overlap`; both measures are symmetric.
    """
    names = tuple(prompts)
    found = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            found[i, j] = found[j, i] = measure(prompts[one], prompts[other])
    return names, found


def group_means(
    names: Sequence[str], similarities: Tensor, groups: Mapping[str, str]
) -> tuple[float, float]:
    """Return the mean similarity of different prompts (of one group, of different groups).

    NaN where there is no such pair.
    """
    alike = torch.tensor([[groups[a] == groups[b] for b in names] for a in names])
    pairs = torch.ones_like(alike).tril(diagonal=-1)
    return (
        float(similarities[alike & pairs].mean()),
        float(similarities[~alike & pairs].mean()),
    )
