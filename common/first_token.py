"""The last block of a classifier that reads one token computes what follows attention for it alone.

BERT's family classifies by the first token. What the last block makes of the other tokens reaches
nobody, though it is the larger part of that block: the output projection and the feed-forward half.
"""

from typing import Any

from torch import Tensor, nn

# `transformers` model types whose heads read `hidden[:, 0]` of blocks in `encoder.layer`, each of
# which adds its residual in `attention.output`.
_FIRST_TOKEN_MODELS = frozenset({"bert", "electra", "roberta", "xlm-roberta"})


def keep_first_token(encoder: Any) -> None:
    """Make the last block keep the first token only, (n, 1, width), once attention has seen all.

    Logits and gradients stay what they are, up to rounding. An encoder of another family is left
    alone: its head may read all tokens, or the last.
    """
    if encoder.config.model_type in _FIRST_TOKEN_MODELS:
        last: nn.Module = encoder.encoder.layer[-1]
        last.get_submodule("attention.output").register_forward_pre_hook(_first_tokens)


def _first_tokens(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor[:, :1] for tensor in inputs)
