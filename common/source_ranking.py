"""Which source prompt to try first on a vision task, and how good such a ranking is.

A score is higher for the better source. The gap to the client's own patches can be had before any
training; the task's likeness (task gap of Zhang et al., ICLR 2025) needs a trained prompt of the
target. Which weights the paper gives them is not known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.errors import ConfigError

Scores = Mapping[str, float]

GAP_FORMS: Mapping[str, Callable[[float], float]] = {
    "identity": lambda gap: gap,
    "log": math.log,
    "sinh": math.sinh,
}


def combined_scores(
    gaps: Scores,
    likeness: Scores | None = None,
    gap_weight: float = 1.0,
    likeness_weight: float = 1.0,
    form: str = "identity",
) -> dict[str, float]:
    """Return `λ_t·t_i - λ_m·g(MMD²_i)` of every source, t_i = 0 without likenesses.

    Args:
        gaps: the modality gap of each source, above 0 for `log`.
        likeness: the cosine of source and target prompt once what all sources share is removed.
        gap_weight: λ_m.
        likeness_weight: λ_t.
        form: g, a key of `GAP_FORMS`.

    Raises:
        ConfigError: there is no such form, a gap that it has no value for, or other sources.
    """
    if form not in GAP_FORMS:
        choices = ", ".join(GAP_FORMS)
        raise ConfigError(f"form {form!r} of the gap is not known; choose one of {choices}")
    if likeness is not None and likeness.keys() != gaps.keys():
        differing = sorted(likeness.keys() ^ gaps.keys())[0]
        raise ConfigError(f"{differing} has a gap or a likeness, and not the other")
    if form == "log" and (least := min(gaps, key=lambda name: gaps[name])) and gaps[least] <= 0:
        raise ConfigError(f"the gap of {least} is {gaps[least]:g}, which has no logarithm")
    return {
        name: likeness_weight * (likeness[name] if likeness else 0.0)
        - gap_weight * GAP_FORMS[form](gap)
        for name, gap in gaps.items()
    }


def prior_scores(gaps: Scores, examples: Scores, examples_weight: float = 1.0) -> dict[str, float]:
    """Return `-z(MMD²_i) + a·z(log n_i)`, n_i the rows a source was trained on; ours.

    z is the score less its mean, over its standard deviation; 0 where all are alike.

    Raises:
        ConfigError: other sources, or one without a row.
    """
    if gaps.keys() != examples.keys():
        differing = sorted(gaps.keys() ^ examples.keys())[0]
        raise ConfigError(f"{differing} has a gap or a number of examples, and not the other")
    if few := [name for name, count in examples.items() if count < 1]:
        raise ConfigError(f"{few[0]} was trained on {examples[few[0]]} rows")
    near = _standardised([-gap for gap in gaps.values()])
    many = _standardised([math.log(examples[name]) for name in gaps])
    return dict(zip(gaps, (near + examples_weight * many).tolist(), strict=True))


def _standardised(values: Sequence[float]) -> NDArray[np.float64]:
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    spread = float(centred.std())
    # What is left of equal values is rounding, and must not be blown up.
    scale = np.abs(values).max(initial=1.0)
    return centred / spread if spread > 1e-12 * scale else np.zeros_like(centred)


def best_first(scores: Scores) -> list[str]:
    """Return the sources, the best first; ties by name."""
    return sorted(scores, key=lambda name: (-scores[name], name))


@dataclass(frozen=True)
class RankingQuality:
    """How well scores rank sources.

    Attributes:
        kendall: τ-a, pairs in order less pairs out of order, over all pairs; a tie is neither.
        spearman: ρ, of ranks, ties sharing theirs; None where all scores or outcomes are alike.
        regret: outcome of the best source less that of the one with the highest score.
    """

    kendall: float
    spearman: float | None
    regret: float


def ranking_quality(scores: Scores, outcomes: Scores) -> RankingQuality:
    """Return how well `scores` rank sources whose `outcomes`, such as accuracies, are known.

    Raises:
        ConfigError: fewer than two sources, other sources, or a number that is not finite.
    """
    if len(scores) < 2 or scores.keys() != outcomes.keys():
        raise ConfigError(
            f"scores of {len(scores)} and outcomes of {len(outcomes)} sources must be of the same "
            "two sources at least"
        )
    names = sorted(scores)
    given = np.array([[scores[name], outcomes[name]] for name in names], dtype=np.float64).T
    if not np.isfinite(given).all():
        raise ConfigError("a score or an outcome is NaN or infinite")
    constant = (given == given[:, :1]).all(axis=1).any()
    rho = None if constant else float(stats.spearmanr(*given).statistic)
    # scipy has τ-b and τ-c, which correct for ties.
    first, second = np.triu_indices(len(names), k=1)
    agree = np.sign(given[:, first] - given[:, second]).prod(axis=0)
    chosen = best_first(scores)[0]
    return RankingQuality(float(agree.mean()), rho, max(outcomes.values()) - outcomes[chosen])
