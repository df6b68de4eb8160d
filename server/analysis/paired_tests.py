"""Whether one subject is better than another over several comparisons: signed-rank tests on pairs.

A comparison of a few seeds shows large differences only. The same two subjects on several tasks,
or with several numbers of rows, make a pair a comparison and seed: on all of these a signed-rank
test (Wilcoxon, 1945) asks whether differences lie around 0, whatever their distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.errors import ConfigError
from server.reporting.comparison import accuracy, by_label, holm
from server.reporting.report import read_records

SEPARATOR = " > "

METHOD = (
    "A pair is two subjects at one seed of one comparison, which share rows, shards and start; its "
    "difference is that of final accuracies. p: Wilcoxon's signed-rank test over all pairs, "
    "two-sided, equal pairs left out; exact where no differences are tied and there are few. "
    "p_holm: corrected for the number of questions asked here (Holm's step-down method). effect: "
    "the rank-biserial correlation, the share of ranks above 0 less that below: from -1 to +1. "
    "Seeds of one comparison share their task and rows, so that pairs are not independent of each "
    "other; by comparison: the same test with the mean over seeds as one value a comparison, which "
    "is the careful reading."
)

# By comparison, label and seed.
Accuracies = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Question:
    """Is `first` better than `second`?"""

    first: str
    second: str


def parse_questions(texts: Sequence[str]) -> list[Question]:
    """Read questions written `first > second`, by the labels of a comparison.

    Raises:
        ConfigError: there is none, or one is not written like that.
    """
    if not texts:
        raise ConfigError('nothing is asked: give --pair "FIRST > SECOND", labels of a comparison')
    questions = []
    for text in texts:
        first, found, second = text.partition(SEPARATOR)
        if not (found and first.strip() and second.strip()):
            raise ConfigError(f'--pair "{text}": write "FIRST > SECOND", labels of a comparison')
        questions.append(Question(first.strip(), second.strip()))
    return questions


def accuracies_of(folders: Sequence[Path]) -> dict[str, dict[str, dict[int, float]]]:
    """Return the final accuracies of finished comparisons, by folder name, label and seed.

    Raises:
        ConfigError: two folders have one name.
        DataError: there are no records.
    """
    names = [folder.resolve().name for folder in folders]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two comparisons are called {repeated[0]}; each must count once")
    return {
        name: {
            label: {
                member["seed"]: value
                for member in members
                if (value := accuracy(member)) is not None
            }
            for label, members in by_label(read_records(folder)).items()
        }
        for name, folder in zip(names, folders, strict=True)
    }


def signed_ranks(found: Accuracies, questions: Sequence[Question]) -> dict[str, Any]:
    """Return every question's differences and tests, for JSON.

    Raises:
        ConfigError: a comparison has no such label, or two of them have no seed in common.
    """
    answers = [_answer(found, question) for question in questions]
    for key in ("pairs", "by_comparison"):
        for answer, adjusted in zip(answers, holm([a[key]["p"] for a in answers]), strict=True):
            answer[key]["p_holm"] = adjusted
    return {"comparisons": list(found), "answers": answers, "method": METHOD}


def _answer(found: Accuracies, question: Question) -> dict[str, Any]:
    differences = {name: _differences(name, of, question) for name, of in found.items()}
    return {
        "first": question.first,
        "second": question.second,
        "differences": differences,
        "pairs": _tested([d for of in differences.values() for d in of.values()]),
        "by_comparison": _tested([fmean(of.values()) for of in differences.values()]),
    }


def _differences(
    name: str, of: Mapping[str, Mapping[int, float]], question: Question
) -> dict[int, float]:
    for label in (question.first, question.second):
        if label not in of:
            raise ConfigError(f"{name} has no subject {label!r}; choose from {'; '.join(of)}")
    first, second = of[question.first], of[question.second]
    if not (seeds := sorted(first.keys() & second.keys())):
        raise ConfigError(
            f"{name}: {question.first} and {question.second} have no seed with an accuracy in "
            "common"
        )
    return {seed: first[seed] - second[seed] for seed in seeds}


def _tested(differences: Sequence[float]) -> dict[str, Any]:
    # Accuracies are shares of rows: what is left of equal ones is rounding.
    values = np.round(np.array(differences, dtype=np.float64), 12)
    unequal = values[values != 0]
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "median": float(median(values.tolist())),
        "above": int((values > 0).sum()),
        "equal": int((values == 0).sum()),
        "below": int((values < 0).sum()),
        "effect": _rank_biserial(unequal),
        # Without an unequal pair there is nothing that speaks against 0.
        "p": float(stats.wilcoxon(unequal).pvalue) if len(unequal) else 1.0,
    }


def _rank_biserial(unequal: NDArray[np.float64]) -> float:
    """Return `(W₊ - W₋)/(W₊ + W₋)`, W the sums of the ranks of |d|; 0 without any."""
    if not len(unequal):
        return 0.0
    ranks = stats.rankdata(np.abs(unequal))
    return float((ranks * np.sign(unequal)).sum() / ranks.sum())
