"""Sources that carry no language: what a transfer must beat before it is said to transfer anything.

The released prompts' norms follow the size of their data sets (Spearman 0.97 over 13), and a vector
of large norm is hardly changed by the layers of a vision model: a good source may be good for its
norm alone. Shuffling rows is no control: no function of the prompt of a ViT depends on their order.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from common.nemesis import vector_norms
from common.prompt_transfer import uniform


def unrelated(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Return U(-v, v), v = √(3/d): rows of norm 1 on average, as VPT's for 16x16 patches at 768."""
    return uniform(prompt.shape, float((3 / prompt.shape[-1]) ** 0.5), generator)


def untrained(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Return N(0, 0.02²), what soft prompts of text start as: a source that learned nothing."""
    return 0.02 * torch.randn(prompt.shape, generator=generator)


def norm_matched(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Return random directions with the norms of the prompt, row by row."""
    drawn = torch.randn(prompt.shape, generator=generator)
    return vector_norms(prompt)[..., None] * functional.normalize(drawn, dim=-1)


def signs_flipped(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Return the prompt with a random sign on each entry: norms and sizes of entries stay."""
    return prompt * (2 * torch.randint(0, 2, prompt.shape, generator=generator) - 1)


def coordinates_shuffled(prompt: Tensor, generator: torch.Generator) -> Tensor:
    """Return the prompt with its coordinates permuted, for all rows alike.

    Norms and angles between rows stay, and so all that rows are to each other; what they are to
    the model is gone.
    """
    return prompt[..., torch.randperm(prompt.shape[-1], generator=generator)]


CONTROLS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "unrelated": unrelated,
    "untrained": untrained,
    "norm-matched": norm_matched,
    "signs-flipped": signs_flipped,
    "coordinates-shuffled": coordinates_shuffled,
}
