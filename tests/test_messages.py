"""Messages: what goes in comes out, what is remembered, and how bytes are counted."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from torch import Tensor

from common.errors import UpdateRefusedError
from common.memory import Memory
from common.messages import (
    Outcome,
    Plan,
    add_bytes,
    count_bytes,
    kind_of,
    pack_identity,
    pack_instruction,
    pack_scores,
    pack_update,
    recall,
    remember,
    unpack_identity,
    unpack_instruction,
    unpack_scores,
    unpack_update,
)
from common.rules import NO_RULES, LocalRules
from common.tensors import digest

PLAN = Plan(
    experiment="{}",
    run="a run",
    client=3,
    shards=(3, 4),
    round=2,
    steps=5,
    trains=("lora_B", "head"),
    parcel=7,
    since=6,
    fresh=("lora_A",),
    restart=1,
    base="0123456789abcdef",
    rules=LocalRules(keeps=("lora_B",), proximal=0.1, sketch=4, steady=False),
)
TENSORS = {
    "enc.0.q.lora_A.weight": torch.arange(6.0).reshape(2, 3),
    "enc.0.q.residual.weight": torch.full((2, 2), 1 / 3, dtype=torch.float64),
    "head.toy.bias": torch.tensor([0.1, -2.0]).half(),
    "enc.0.q.lora_B.weight": torch.arange(5, dtype=torch.uint8),
    "control/head.toy.bias": torch.tensor(4.0),
}


def travelled(content: RecordDict) -> RecordDict:
    """Return a record as it comes out at the other end."""
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize("rules", [PLAN.rules, NO_RULES])
def test_an_instruction_arrives_as_it_was_sent(rules: LocalRules) -> None:
    plan = Plan(**{**PLAN.__dict__, "rules": rules})
    again, tensors = unpack_instruction(travelled(pack_instruction(plan, TENSORS)))
    assert again == plan
    assert hash(again) == hash(plan)
    assert digest(tensors) == digest(TENSORS)


def test_an_instruction_may_hold_no_tensor_at_all() -> None:
    """In round 1 clients draw everything themselves."""
    plan, tensors = unpack_instruction(travelled(pack_instruction(PLAN, {})))
    assert (plan, tensors) == (PLAN, {})


def test_an_update_arrives_as_it_was_sent() -> None:
    asked, chosen = {"prompt.text": [2, 1]}, {"prompt.text": [0, 1]}
    outcome = Outcome(3, num_examples=20, loss=0.5, seconds=1.5, asked=asked, chosen=chosen)
    again, tensors = unpack_update(travelled(pack_update(outcome, TENSORS)))
    assert again == outcome
    assert digest(tensors) == digest(TENSORS)
    tensors["head.toy.bias"].add_(1)  # what arrives is the receiver's own


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"outcome": ConfigRecord({"client": 1})}),
        RecordDict({"tensors": ArrayRecord()}),
    ],
)
def test_a_reply_of_another_form_is_refused(content: RecordDict) -> None:
    with pytest.raises(UpdateRefusedError, match="cannot be read"):
        unpack_update(content)


@pytest.mark.parametrize("examples", [0, -3])
def test_a_reply_without_examples_is_refused(examples: int) -> None:
    content = pack_update(Outcome(1, examples, 0.5, 1.0), TENSORS)
    with pytest.raises(UpdateRefusedError, match=f"num-examples = {examples}"):
        unpack_update(content)


def test_identities_and_scores_arrive() -> None:
    assert unpack_identity(travelled(pack_identity(5))) == 5
    assert unpack_scores(travelled(pack_scores(5, 0.25, 1.5))) == (5, 0.25, 1.5)


# --- what clients remember ------------------------------------------------------------------------


def same(first: Memory, second: Memory) -> bool:
    return (
        first.parcel == second.parcel
        and digest(first.held) == digest(second.held)
        and digest(first.own) == digest(second.own)
    )


def test_a_client_remembers_the_last_of_this_run_and_nobody_elses() -> None:
    """A node may play several clients, and outlives a run."""
    state = RecordDict()
    own: dict[str, Tensor] = {"kept/enc.0.q.lora_B.weight": torch.ones(2)}
    assert same(recall(state, 1, "a"), Memory())
    remember(state, 1, "a", Memory(4, TENSORS, own))
    remember(state, 2, "a", Memory(5, {}, {}))
    assert same(recall(travelled(state), 1, "a"), Memory(4, TENSORS, own))
    assert same(recall(state, 2, "a"), Memory(5, {}, {}))
    assert same(recall(state, 1, "b"), Memory())
    remember(state, 1, "a", Memory(6, own, {}))
    assert same(recall(state, 1, "a"), Memory(6, own, {}))
    remember(state, 1, "b", Memory(1, {}, {}))
    assert same(recall(state, 1, "a"), Memory())


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit.layers.0.q.lora_A.weight", "A"),
        ("vit.layers.0.q.lora_B.weight", "B"),
        ("head.toy.lora_A.weight", "head"),
        ("head.toy.bias", "head"),
        ("vit.layers.0.q.residual.weight", "residual"),
        ("base.12/vit.layers.0.q.lora_A.weight", "residual"),
        ("control/vit.layers.0.q.lora_A.weight", "control"),
        ("control/head.toy.bias", "control"),
        ("vit.layers.0.q.sketch.weight", "sketch"),
        ("vit.layers.0.q.basis.weight", "sketch"),
        ("vit.layers.0.q.projection.weight", "sketch"),
        ("surprise", "unknown"),
        ("vit.layers.0.bias", "unknown"),
    ],
)
def test_a_name_tells_what_its_bytes_are_counted_as(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_bytes_are_counted_on_the_serialised_form() -> None:
    content = pack_instruction(PLAN, TENSORS)
    counted = count_bytes(content)
    assert counted["total"] == len(recorddict_to_proto(content).SerializeToString())
    numbers = {"A": 6 * 4, "residual": 4 * 8, "head": 2 * 2, "B": 5, "control": 4}
    assert {k: n for k, n in counted.items() if k not in ("protocol", "total")} == numbers
    assert counted["protocol"] == counted["total"] - sum(numbers.values())
    assert counted["protocol"] > 0


def test_bytes_add_up_by_kind() -> None:
    assert add_bytes({"A": 1, "total": 5}, {"B": 2, "total": 7}) == {"A": 1, "B": 2, "total": 12}
