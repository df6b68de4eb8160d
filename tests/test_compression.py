"""Fewer bits on the wire: what one number loses, what many rounds lose, and what a run loses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from clients.app import app as client_app
from clients.upload import compressed
from common.compression import BLOCK, Format, decode, encode, encoded_bytes
from common.config import Experiment
from common.errors import UpdateRefusedError
from common.memory import under
from common.messages import recall, unpack_instruction
from common.returns import read_update
from common.tensors import digest
from server.evaluation import Evaluator
from server.flower_strategy import Outcomes, find_clients, run_federation
from server.local_grid import LocalGrid

Build = Callable[..., Experiment]

FORMS: tuple[Format, ...] = ("float32", "float16", "int8", "int4")
FEWER: tuple[Format, ...] = FORMS[1:]
# Half a step, relative to the largest of the block.
STEP: dict[Format, float] = {"int8": 1 / 253, "int4": 1 / 13}


def errors_by_block(tensor: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return the largest error and the largest magnitude of every block."""
    lost = tensor.double() - decode(encode(tensor, form), form, tensor.shape).double()
    parts = []
    for values in (lost, tensor.double()):
        flat = values.reshape(-1).abs()
        parts.append(functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK).amax(dim=1))
    return parts[0], parts[1]


@st.composite
def tensors(draw: Any, smallest: int = -30, largest: int = 30) -> Tensor:
    """Draw a tensor of some shape, whose numbers span some orders of magnitude."""
    shape = draw(st.lists(st.integers(1, 15), max_size=3))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low, high = sorted(draw(st.tuples(*[st.integers(smallest, largest)] * 2)))
    exponents = low + (high - low) * torch.rand(shape, generator=stream, dtype=torch.float64)
    signs = torch.randint(-1, 2, shape, generator=stream)
    return (signs * 10**exponents).float()


# --- one tensor -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "int4"])
@settings(deadline=None)
@given(tensor=tensors())
def test_a_number_loses_half_a_step_of_its_block_at_most(form: Format, tensor: Tensor) -> None:
    """Be they as small as 1e-30 or as large as 1e30."""
    errors, largest = errors_by_block(tensor, form)
    assert bool((errors <= STEP[form] * largest).all())


@settings(deadline=None)
@given(tensor=tensors(smallest=-9, largest=4))
def test_half_precision_keeps_eleven_bits(tensor: Tensor) -> None:
    found = decode(encode(tensor, "float16"), "float16", tensor.shape)
    error = (found - tensor).abs()
    assert bool((error <= torch.clamp(2.0**-11 * tensor.abs(), min=2.0**-25)).all())


@settings(deadline=None)
@given(tensor=tensors())
def test_float32_travels_as_it_is(tensor: Tensor) -> None:
    assert torch.equal(decode(encode(tensor, "float32"), "float32", tensor.shape), tensor)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(tensor=tensors())
def test_sizes_are_as_said(form: Format, tensor: Tensor) -> None:
    encoded = encode(tensor, form)
    assert encoded.numel() * encoded.element_size() == encoded_bytes(tensor.numel(), form)
    assert decode(encoded, form, tensor.shape).dtype == torch.float32


@pytest.mark.parametrize(
    ("numbers", "sizes"),
    [(64, (256, 128, 66, 34)), (65, (260, 130, 132, 68)), (1, (4, 2, 66, 34))],
)
def test_sizes_by_hand(numbers: int, sizes: tuple[int, ...]) -> None:
    """A block is 2 bytes of scale and 64 numbers of 8 or 4 bits; the last one is padded."""
    assert tuple(encoded_bytes(numbers, form) for form in FORMS) == sizes


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form: Format) -> None:
    zeros = torch.zeros(3, 50)
    assert torch.equal(decode(encode(zeros, form), form, zeros.shape), zeros)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_block_does_not_feel_its_neighbour(form: Format) -> None:
    quiet, loud = 1e-30 * torch.ones(BLOCK), 1e30 * torch.ones(BLOCK)
    both = torch.cat([loud, quiet, loud])
    alone = decode(encode(quiet, form), form, quiet.shape)
    assert torch.equal(decode(encode(both, form), form, both.shape)[BLOCK : 2 * BLOCK], alone)
    torch.testing.assert_close(alone, quiet, rtol=0.01, atol=0)


def test_half_precision_cuts_what_is_too_large_for_it() -> None:
    huge = torch.tensor([1e30, -1e6, 3.0])
    found = decode(encode(huge, "float16"), "float16", huge.shape)
    assert found.tolist() == [65504.0, -65504.0, 3.0]


def test_the_bytes_are_the_same_on_every_machine() -> None:
    """The scale as bfloat16, little-endian, then the numbers; of int4 the even ones are low."""
    block = torch.zeros(BLOCK)
    block[:4] = torch.tensor([1.0, -0.5, -1.0, 0.25])
    scale = [0x80, 0x3F]  # 1.0
    assert encode(block, "int8")[:6].tolist() == [*scale, 127, 256 - 64, 256 - 127, 32]
    low_and_high = [(8 + 7) | (8 - 4) << 4, (8 - 7) | (8 + 2) << 4]
    assert encode(block, "int4")[:4].tolist() == [*scale, *low_and_high]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(form: Format, bad: float) -> None:
    """Clients that diverge must be refused, and not come in with a large number."""
    tensor = torch.ones(2, 70)
    tensor[1, 3] = bad
    with pytest.raises(UpdateRefusedError, match=r"x holds \d+ numbers that are NaN"):
        read_update({"x": encode(tensor, form)}, [{"x": tensor.shape}], {}, form)


@pytest.mark.parametrize("form", FORMS)
def test_another_size_or_type_is_refused(form: Format) -> None:
    tensor = torch.ones(3, 50)
    encoded = encode(tensor, form)
    flat = encoded.reshape(-1)
    for wrong, says in (
        (flat[:-1], "has shape"),
        (torch.cat([flat, flat[:1]]), "has shape"),
        (encoded.to(torch.float64), "has dtype torch.float64, not"),
        (encoded.to(torch.int8), "has dtype torch.int8, not"),
    ):
        with pytest.raises(UpdateRefusedError, match=says):
            decode(wrong, form, tensor.shape)
    for other in FORMS:
        if other != form:
            with pytest.raises(UpdateRefusedError, match=r"has (dtype|shape)"):
                decode(encoded, other, tensor.shape)


# --- many rounds ----------------------------------------------------------------------------------


def meant_and_decoded(form: Format, rounds: int, *, feedback: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of what a client meant and of what the server read, over these rounds.

    One number of the block is large: beside it the others are too small for int4 to see.
    """
    stream = torch.Generator().manual_seed(0)
    meant, read = torch.zeros(2, 70, dtype=torch.float64), torch.zeros(2, 70, dtype=torch.float64)
    own: dict[str, Tensor] = {}
    for _ in range(rounds):
        held = torch.randn(2, 70, generator=stream)
        step = 0.03 + 0.001 * torch.randn(2, 70, generator=stream)
        step[:, ::60] = 1.0
        sent, kept = compressed({"x": held + step}, {"x": held}, own, form, feedback)
        own = dict(kept)
        (found,) = read_update(sent, [{"x": held.shape}], {"x": held}, form).values()
        meant += step.double()
        read += (found - held).double()
    return meant, read


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_with_feedback_the_sum_follows_the_sum(form: Format) -> None:
    """However many rounds, what is missing is what one round may lose."""
    for rounds in (1, 10, 100):
        meant, read = meant_and_decoded(form, rounds, feedback=True)
        assert float((meant - read).abs().max()) <= 1.2 * STEP[form]


def test_without_feedback_the_sum_drifts() -> None:
    meant, read = meant_and_decoded("int4", 100, feedback=False)
    drift = (meant - read)[:, 1:60]
    assert float(drift.min()) > 2.5  # 100 times 0.03, of which nothing has arrived


def test_what_is_owed_waits_for_a_tensor_that_is_not_sent_this_time() -> None:
    """Methods that alternate send A in one round and B in the next."""
    stream = torch.Generator().manual_seed(0)
    held = {name: torch.randn(20, generator=stream) for name in ("a", "b")}
    moved = {name: tensor + torch.randn(20, generator=stream) for name, tensor in held.items()}
    own: dict[str, Tensor] = {"kept/y": torch.ones(2), "control/z": torch.ones(1)}
    _, first = compressed({"a": moved["a"]}, held, own, "int4", True)
    _, second = compressed({"b": moved["b"]}, held, first, "int4", True)
    assert torch.equal(second["lost/a"], first["lost/a"])
    assert bool(second["lost/a"].any())
    assert second.keys() == {"kept/y", "control/z", "lost/a", "lost/b"}
    # A last upload without anything new brings what was owed.
    sent, _ = compressed({"a": held["a"]}, held, second, "int4", True)
    assert torch.equal(sent["a"], encode(second["lost/a"], "int4"))


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4)])
def test_what_is_owed_fits_a_factor_whose_rank_has_changed(before: int, now: int) -> None:
    """A client prunes its rank, and is sent the old one again if the update was lost."""
    lost = torch.full((before, 5), 0.5)
    sent, own = compressed(
        {"x": torch.zeros(now, 5)}, {"x": torch.zeros(4, 5)}, {"lost/x": lost}, "int8", True
    )
    found = decode(sent["x"], "int8", torch.Size((now, 5)))
    expected = torch.zeros(now, 5)
    expected[: min(before, now)] = 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 / 253)
    assert own["lost/x"].shape == (now, 5)


def test_in_float32_nothing_is_owed_and_nothing_is_changed() -> None:
    tensors = {"x": torch.randn(9, generator=torch.Generator().manual_seed(0))}
    own = {"lost/x": torch.ones(9), "kept/y": torch.ones(2)}
    sent, kept = compressed(tensors, {"x": torch.ones(9)}, own, "float32", True)
    assert digest(sent) == digest(tensors)
    assert kept.keys() == {"kept/y"}


# --- whole runs -----------------------------------------------------------------------------------


def run(experiment: Experiment, clients: Any = client_app) -> Outcomes:
    grid = LocalGrid(clients, experiment.partition.clients)
    nodes = find_clients(grid, experiment.partition.clients, timeout=1.0)
    return run_federation(grid, experiment, Evaluator(experiment), nodes, lambda _: None)


@pytest.mark.parametrize("form", FEWER)
def test_fewer_bits_up_are_cheaper_and_the_run_is_close(
    digits_experiment: Build, form: Format
) -> None:
    settings = {"federation__rounds": 4, "train__local_steps": 5}
    plain = run(digits_experiment(**settings))
    fewer = run(digits_experiment(**settings, wire__up=form))
    assert fewer.digest != plain.digest
    learned = plain.start.loss - plain.rounds[-1]["loss"]
    assert learned > 0.05
    for row, other in zip(plain.rounds, fewer.rounds, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], abs=0.1 * learned)
        up = other["bytes"]["up"]
        # Three clients; eight modules of 16x16 at rank 4; a head of 10x16 and 10.
        assert up["A"] == up["B"] == 3 * 8 * encoded_bytes(64, form)
        assert up["head"] == 3 * (encoded_bytes(160, form) + encoded_bytes(10, form))
        for kind in ("A", "B", "head"):
            assert other["bytes"]["down"].get(kind) == row["bytes"]["down"].get(kind)


def test_half_precision_down_costs_half_and_the_run_is_close(digits_experiment: Build) -> None:
    settings = {"federation__rounds": 4, "train__local_steps": 5}
    plain = run(digits_experiment(**settings))
    half = run(digits_experiment(**settings, wire__down="float16"))
    assert half.digest != plain.digest
    for row, other in zip(plain.rounds, half.rounds, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], abs=0.01)
        for kind in ("A", "B", "head"):
            assert 2 * other["bytes"]["down"].get(kind, 0) == row["bytes"]["down"].get(kind, 0)
            assert other["bytes"]["up"][kind] == row["bytes"]["up"][kind]


@pytest.mark.parametrize(("name", "owing"), [("fedavg", True), ("flora", False)])
def test_feedback_is_for_methods_whose_coordinates_last(
    digits_experiment: Build, name: str, owing: bool
) -> None:
    """Where adapters start afresh, what one round has lost has no meaning in the next."""
    owed: list[bool] = []

    def clients(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            plan, _ = unpack_instruction(message.content)
            owed.append(bool(under("lost/", recall(context.state, plan.client, plan.run).own)))
        return reply

    run(digits_experiment(strategy__name=name, wire__up="int4"), clients)
    assert owed == [owing] * 6
