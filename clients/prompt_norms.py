"""The norms of soft prompts in a client's loss (Nemesis, arXiv 2408.13979)."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from clients.training import LocalRun
from common.config import Experiment, Nemesis
from common.features import Batch, Features
from common.models import Model
from common.nemesis import SCHEDULES, choose_positions, nemesis_term, probe_positions
from common.prompted_clip import PromptedClip
from common.seeds import torch_generator
from common.tensors import Tensors, is_prompt, part_of

# Rows of its shard that a client asks about, where clients ask once a round.
PROBED_ROWS = 256


class NormPenalty:
    """The term that the norms of the prompts in training add to the loss of a batch.

    `weights` (M,), by the name of the prompt, are PAN's where the server has them from all clients;
    without, each step compares with the rows that the training forward itself got right: the
    unchanged prompt takes no second forward pass, and no picture is embedded again.

    Attributes:
        asked, chosen: by prompt, (M,): at how many steps PAN asked about each position, and weighed
            it.
    """

    def __init__(self, model: Model, run: LocalRun, nemesis: Nemesis, weights: Tensors) -> None:
        self._model, self._nemesis, self._weights = model, nemesis, weights
        self._prompts = _prompts_in_training(model, run)
        self._weight = SCHEDULES[nemesis.schedule](run.round - 1, run.rounds)
        self._stream = torch_generator(run.seed, "probed positions")
        self.asked: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return `w·[b·PUN + (1 - b)·PAN]`."""
        nemesis = self._nemesis
        return self._weight * nemesis_term(
            self._prompts,
            nemesis.strength,
            _PUN_SHARES.get(nemesis.kind, nemesis.blend),
            lambda: self._adaptive(batch, logits),
            nemesis.norm,
        )

    def _adaptive(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        if self._weights:
            return {n: self._weights[n].to(self._model.device) for n in self._prompts}
        hits = (logits.detach().argmax(dim=1) == batch.labels).sum()
        found = {}
        for name, prompt in self._prompts.items():
            probed = probe_positions(prompt.shape[-2], self._nemesis.probed, self._stream)
            chosen = _chosen(self._model, name, prompt, probed, self._nemesis.shrink, batch, hits)
            none = torch.zeros_like(chosen)
            asked = none.index_fill(0, probed.to(none.device), 1.0)
            self.asked[name] = self.asked.get(name, none) + asked
            self.chosen[name] = self.chosen.get(name, none) + chosen
            found[name] = self._nemesis.strength * chosen
        return found


def norm_penalty(
    model: Model, run: LocalRun, nemesis: Nemesis, weights: Tensors = MappingProxyType({})
) -> NormPenalty | None:
    """Return the term that the norms add to the loss, or None where nothing is asked for."""
    return None if nemesis.kind == "none" else NormPenalty(model, run, nemesis, weights)


_PUN_SHARES: Mapping[str, float] = {"pun": 1.0, "pan": 0.0}


def answers_of(
    model: Model, rows: Features, run: LocalRun, experiment: Experiment
) -> dict[str, Tensor]:
    """Return at how many batches shrinking each position helps, and of how many: `probed/...`.

    (2, M) a prompt, of the model as it was sent, on the first rows of the shard, always the same.
    """
    size = experiment.train.batch_size
    device, nemesis = model.device, experiment.nemesis
    batches = list(rows.select(torch.arange(min(len(rows), PROBED_ROWS))).batches(size, device))
    answers = {}
    for name, prompt in _prompts_in_training(model, run).items():
        everywhere = torch.arange(prompt.shape[-2])
        counts = torch.zeros(2, len(everywhere))
        for batch in batches:
            with torch.no_grad():
                hits = (model.logits(batch).argmax(dim=1) == batch.labels).sum()
            chosen = _chosen(model, name, prompt, everywhere, nemesis.shrink, batch, hits)
            counts += torch.stack([chosen.cpu(), torch.ones(len(everywhere))])
        answers[f"probed/{name}"] = counts
    return answers


def _prompts_in_training(model: Model, run: LocalRun) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.parameters().items()
        if is_prompt(name) and part_of(name) in run.trains
    }


def _chosen(
    model: Model,
    name: str,
    prompt: Tensor,
    probed: Tensor,
    shrink: float,
    batch: Batch,
    hits: Tensor,
) -> Tensor:
    """Return (M,): 1 at the probed positions whose shrinking gets more rows right, else 0."""
    if not isinstance(model, PromptedClip):
        raise TypeError(f"{type(model).__name__} cannot say what other prompts would do")
    if int(hits) == len(batch.labels):  # nothing gets more right than all
        return torch.zeros(prompt.shape[-2], device=prompt.device)
    return choose_positions(
        prompt,
        probed,
        shrink,
        hits,
        lambda copies: model.hits_of(batch, name, copies),
        at_once=len(probed),  # the model bounds what it computes at once
    ).float()
