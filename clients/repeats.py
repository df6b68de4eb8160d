"""Training that was done before: runs that differ on the server alone share their first round.

A comparison of ways to merge trains the same clients from the same start again for each of them;
with one round that is all there is. What training depends on is hashed, and what it led to kept.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from clients.training import LocalRun, Trained
from common.config import Experiment
from common.messages import Outcome
from common.rules import LocalRules
from common.tensors import Tensors, digest

_ROOM = 2**28  # bytes of trained tensors that a process keeps


@dataclass(frozen=True)
class Training:
    """What a client's training led to: the trained state, what it tells, what is said of it."""

    state: Tensors
    trained: Trained
    outcome: Outcome


class Kept:
    """Trainings by key; beyond `room` bytes the ones longest unused are forgotten."""

    def __init__(self, room: int) -> None:
        self._room, self._held = room, 0
        self._trainings: OrderedDict[str, Training] = OrderedDict()

    def get_or_make(self, key: str, make: Callable[[], Training]) -> Training:
        """Return what was kept under this key, marked as reused; else make it and keep it."""
        if key in self._trainings:
            self._trainings.move_to_end(key)
            known = self._trainings[key]
            return replace(known, outcome=replace(known.outcome, reused=True))
        made = make()
        state = {name: tensor.clone() for name, tensor in made.state.items()}
        self._trainings[key] = replace(made, state=state)
        self._held += _size(state)
        while self._held > self._room:
            _, oldest = self._trainings.popitem(last=False)
            self._held -= _size(oldest.state)
        return made


@functools.cache
def kept_trainings() -> Kept:
    """Return what this process keeps."""
    return Kept(_ROOM)


def training_key(
    experiment: Experiment, client: int, shards: tuple[int, ...], run: LocalRun, given: Tensors
) -> str:
    """Return a digest of all that training depends on; `given` is every tensor that went into it.

    Of the experiment that is what clients read, without what is switched off; a strategy speaks
    through `run` and `given`, and of its rules only those count that add to the loss.
    """
    in_use = {
        "copra": experiment.copra.enabled,
        "nemesis": experiment.nemesis.kind != "none",
        # Other harm is done to what comes out of training.
        "harm": experiment.harm.kind == "random-labels",
    }
    read = {"task", "partition", "backbone", "adapter", "train"}
    read |= {section for section, used in in_use.items() if used}
    sections = experiment.model_dump_json(include=read)
    seed, rules = experiment.federation.seed, run.rules
    in_the_loss = LocalRules(
        proximal=rules.proximal, tail_share=rules.tail_share, tail_penalty=rules.tail_penalty
    )
    loop = replace(run, rules=in_the_loss)
    said = f"{sections}|{client}|{shards}|{loop}|{seed}|{digest(given)}"
    return hashlib.sha256(said.encode()).hexdigest()


def _size(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
