"""Name-wise arithmetic, digests, and the seeds from which every random stream follows."""

import numpy as np
import pytest
import torch

from common.errors import UpdateRefusedError
from common.seeds import child_seed, numpy_generator, torch_generator
from common.tensors import RunningMean, check_update, digest, only, part_of, weighted_mean

STATE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0], [4.0]])}


def test_a_weighted_mean_by_hand() -> None:
    other = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([[7.0], [8.0]])}
    mean = weighted_mean([(3, STATE), (1, other)])
    assert torch.equal(mean["a"], torch.tensor([2.0, 3.0]))
    assert torch.equal(mean["b"], torch.tensor([[4.0], [5.0]]))
    assert mean["a"].dtype == torch.float32


def test_a_name_is_averaged_over_those_that_hold_it() -> None:
    mean = weighted_mean([(1, STATE), (3, {"a": torch.tensor([5.0, 6.0])})])
    assert torch.equal(mean["a"], torch.tensor([4.0, 5.0]))
    assert torch.equal(mean["b"], STATE["b"])


def test_sums_run_in_float64() -> None:
    """In float32 the thousand ones beside 2^25 would vanish."""
    members = [{"x": torch.tensor([float(2**25)])}, *[{"x": torch.tensor([1.0])}] * 1000]
    mean = weighted_mean((1.0, member) for member in members)["x"]
    assert float(mean) == pytest.approx((2**25 + 1000) / 1001, rel=1e-7)


def test_the_mean_of_one_is_that_one_to_the_bit() -> None:
    one = {"x": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert digest(weighted_mean([(7, one)])) == digest(one)


def test_a_running_mean_is_the_mean_of_the_list_and_changes_no_member() -> None:
    stream = torch.Generator().manual_seed(0)
    members = [
        (weight, {"x": torch.randn(20, generator=stream), "y": torch.randn(2, 3, generator=stream)})
        for weight in (3.0, 1.0, 5.0)
    ]
    before = [digest(member) for _, member in members]
    running = RunningMean()
    for weight, member in members:
        running.add(weight, member)
    means = running.mean()
    assert digest(means) == digest(weighted_mean(members))
    assert [digest(member) for _, member in members] == before
    for name in ("x", "y"):
        stacked = torch.stack([member[name].double() for _, member in members])
        expected = torch.tensordot(torch.tensor([3.0, 1.0, 5.0]).double() / 9, stacked, dims=1)
        torch.testing.assert_close(means[name], expected.float(), rtol=1e-6, atol=0)


def test_the_mean_comes_back_in_the_dtype_that_went_in() -> None:
    for dtype in (torch.float32, torch.float64):
        assert weighted_mean([(2, {"x": torch.ones(2, dtype=dtype)})])["x"].dtype == dtype
    assert weighted_mean([]) == {}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit.layers.0.q.lora_A.weight", "lora_A"),
        ("vit.layers.0.q.lora_B.weight", "lora_B"),
        ("head.toy.lora_A.weight", "head"),
        ("vit.layers.0.q.residual.weight", "residual"),
        ("vit.layers.0.q.sketch.weight", "sketch"),
        ("surprise", ""),
    ],
)
def test_a_name_tells_what_part_a_tensor_is(name: str, part: str) -> None:
    assert part_of(name) == part


def test_only_keeps_what_is_named_in_order() -> None:
    assert list(only({"c": STATE["a"], **STATE}, ["b", "c", "nowhere"])) == ["c", "b"]


@pytest.mark.parametrize(
    "other",
    [
        {"a": STATE["a"], "c": STATE["b"]},
        {"a": STATE["a"]},
        {"a": STATE["a"], "b": STATE["b"].T},
        {"a": STATE["a"], "b": STATE["b"].double()},
        {"a": STATE["a"], "b": torch.tensor([[3.0], [4.0000005]])},
        {"a": STATE["b"].flatten(), "b": STATE["a"].unsqueeze(1)},
    ],
    ids=["name", "missing", "shape", "dtype", "last bit", "swapped"],
)
def test_a_digest_tells_any_difference(other: dict[str, torch.Tensor]) -> None:
    assert digest(other) != digest(STATE)


def test_a_digest_does_not_depend_on_order_or_memory() -> None:
    padded = torch.stack([STATE["b"].flatten(), torch.zeros(2)], dim=1)[:, :1]
    assert not padded.is_contiguous()
    assert digest({"b": padded, "a": STATE["a"].clone()}) == digest(STATE)


def test_a_digest_takes_every_shape_and_dtype() -> None:
    strange = [torch.tensor(1.0), torch.zeros(0, 3), torch.tensor([True]), torch.ones(2).bfloat16()]
    assert len({digest({"x": tensor}) for tensor in strange}) == len(strange)


def test_an_update_is_checked_in_whole() -> None:
    shapes = {name: tensor.shape for name, tensor in STATE.items()}
    check_update(STATE, shapes)
    for wrong, says in (
        ({"a": STATE["a"]}, "missing.* b"),
        ({**STATE, "z": STATE["a"]}, "unknown.* z"),
        ({**STATE, "b": STATE["b"].T}, r"b has shape \(1, 2\), not \(2, 1\)"),
        ({**STATE, "a": torch.tensor([1.0, float("nan")])}, "a holds 1 "),
        ({**STATE, "a": torch.tensor([float("inf")] * 2)}, "a holds 2 "),
    ):
        with pytest.raises(UpdateRefusedError, match=says):
            check_update(wrong, shapes)


# --- seeds ----------------------------------------------------------------------------------------


def test_child_seeds_are_the_same_on_every_machine() -> None:
    """Golden numbers: if these change, no old run can be repeated."""
    assert child_seed(0, "client", 3, "round", 1) == 4322718697756809047
    assert child_seed(1) == 3874038210105081456


def test_child_seeds_differ_in_every_part_of_the_path() -> None:
    paths = [(), (0,), (1,), ("0",), ("a",), ("a", 0), ("a", "b"), (0, 0), (10,)]
    seeds = {child_seed(seed, *path) for seed in (0, 1) for path in paths}
    assert len(seeds) == 2 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_apart_and_repeatable() -> None:
    one, again = torch_generator(0, "a"), torch_generator(0, "a")
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=again))
    assert not torch.equal(
        torch.rand(9, generator=torch_generator(0, "a")),
        torch.rand(9, generator=torch_generator(0, "b")),
    )
    assert numpy_generator(0, "a").random() == numpy_generator(0, "a").random()
    assert not np.isclose(numpy_generator(0, "a").random(), numpy_generator(1, "a").random())
