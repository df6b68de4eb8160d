"""Similarities of soft prompts: values by hand, and what must not change them."""

import pytest
import torch

from common.errors import ConfigError
from common.prompt_similarity import (
    SIMILARITIES,
    activation_overlap,
    group_means,
    similarity,
    similarity_map,
)

P = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
Q = torch.tensor([[1.0, 1.0], [1.0, -1.0]])


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("concat-cosine", 0.0),
        ("mean-cosine", 0.3535533906),  # (1 + 1 + 1 - 1)/(4·√2)
        ("cosine-of-means", 0.7071067812),
        ("concat-closeness", 0.2898979486),  # 1/(1 + √6)
        ("mean-closeness", 0.4330847293),  # 1/(1 + (3 + √5)/4)
    ],
)
def test_by_hand(measure: str, expected: float) -> None:
    assert similarity(P, Q, measure) == pytest.approx(expected, abs=1e-9)
    assert similarity(Q, P, measure) == pytest.approx(expected, abs=1e-9)


def test_a_prompt_is_like_itself() -> None:
    prompt = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for measure in ("concat-cosine", "cosine-of-means", "concat-closeness"):
        assert similarity(prompt, prompt, measure) == pytest.approx(1.0, abs=1e-12)
    # These two also compare different rows of the one prompt.
    assert similarity(prompt, prompt, "mean-cosine") < 1
    assert similarity(prompt, prompt, "mean-closeness") < 1


@pytest.mark.parametrize("measure", ["mean-cosine", "cosine-of-means", "mean-closeness"])
def test_the_order_of_rows_counts_only_where_rows_are_paired(measure: str) -> None:
    stream = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 6, 4, generator=stream)
    turned = other[torch.randperm(6, generator=stream)]
    assert similarity(one, turned, measure) == pytest.approx(similarity(one, other, measure))
    assert similarity(one, turned, "concat-cosine") != similarity(one, other, "concat-cosine")


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 2\) and \(3, 2\)"):
        similarity(P, torch.ones(3, 2))
    with pytest.raises(ConfigError, match=f"'cosine'.*{', '.join(SIMILARITIES)}"):
        similarity(P, Q, "cosine")
    with pytest.raises(ConfigError, match="bool"):
        activation_overlap(torch.ones(3), torch.ones(3, dtype=torch.bool))


def bits(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_overlap_of_neurons_is_a_cosine_not_a_share() -> None:
    assert activation_overlap(bits("11001"), bits("10011")) == pytest.approx(2 / 3, abs=1e-12)
    # |A ∩ B| / √(|A||B|) and not |A ∩ B| / |A ∪ B|, which is 1/4 here.
    assert activation_overlap(bits("1111"), bits("1000")) == pytest.approx(0.5)
    assert activation_overlap(bits("0000"), bits("1000")) == 0.0


def test_a_map_has_every_pair_once_and_groups_leave_the_diagonal_out() -> None:
    prompts = {"a": P, "b": 3 * P, "c": Q}
    names, found = similarity_map(prompts)
    assert names == ("a", "b", "c")
    torch.testing.assert_close(
        found, torch.tensor([[1, 1, 0.5**0.5], [1, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]]).double()
    )
    inside, across = group_means(names, found, {"a": "one", "b": "one", "c": "two"})
    assert (inside, across) == pytest.approx((1.0, 0.5**0.5))
    _, overlaps = similarity_map({"x": bits("110"), "y": bits("011")}, activation_overlap)
    assert overlaps.tolist() == [[pytest.approx(1), 0.5], [0.5, pytest.approx(1)]]
