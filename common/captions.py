"""The captions of a task's classes with learned vectors among their words, and CLIP's text tower.

`CLIPTextModel` takes token ids, and every caption whole. But the tower is causal: what becomes of a
token depends on the tokens up to it alone. So what all captions begin with is computed once and not
once a class; a caption that changes behind some token takes up the keys and values of what stands
before it; and of the last block only the token that is read is needed. What comes out is what the
stock tower gives, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.config import Prompt

# Of every block keys and values, each (n, heads, tokens, d/heads), that later tokens attend to.
Past = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Captions:
    """The captions of a task's classes, with room for M vectors in each.

    Attributes:
        words: (C, L, d), the words' embeddings; what stands in a slot means nothing.
        slots: (C, M), where the vectors go.
        ends: (C,), where the caption ends, and its state is read.
        shared: P, how many tokens all of them begin with; every end is behind these.
    """

    words: Tensor
    slots: Tensor
    ends: Tensor
    shared: int

    def states(
        self, tower: Any, contexts: Tensor, past: Past, start: int = 0
    ) -> tuple[Tensor, Past]:
        """Return the states (n, C, d) of the ends, and what the shared tokens leave behind.

        Args:
            tower: transformers' `CLIPTextModel`.
            contexts: (n, 1 or C, M, d), what goes into the slots.
            past: of the tokens before `start`, from an earlier call; or `no_past`, or `past_of`.
            start: at most P. The tokens before it are not looked at.
        """
        many, (classes, length, width) = len(contexts), self.words.shape
        room = self.slots[None, :, :, None].expand(many, -1, -1, width)
        words = self.words.expand(many, classes, length, width)
        filled = words.scatter(2, room, contexts.expand(many, classes, -1, -1))
        shared, own = filled[:, 0, start : self.shared], filled[:, :, self.shared :]
        return _states(tower, shared, own, self.ends - self.shared, start, past)


def caption_ids(
    tokenizer: Any, names: Sequence[str], prompt: Prompt
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of every class's caption, and the positions of its vectors.

    A caption is begin, context, name, ending, end, or as `class_at` says.
    """
    slot = tokenizer.eos_token_id  # any id: its embedding is replaced
    half = prompt.length // 2
    before = {"end": prompt.length, "middle": half, "front": 0}[prompt.class_at]
    ids, slots = [], []
    for name in names:
        words = tokenizer(name, add_special_tokens=False)["input_ids"]
        last = tokenizer(prompt.ending, add_special_tokens=False)["input_ids"]
        after = prompt.length - before
        body = [*[slot] * before, *words, *[slot] * after, *last]
        ids.append([tokenizer.bos_token_id, *body, tokenizer.eos_token_id])
        behind = 1 + before + len(words)
        slots.append([*range(1, 1 + before), *range(behind, behind + after)])
    return ids, slots


def shared_tokens(
    ids: Sequence[Sequence[int]], slots: Sequence[Sequence[int]], class_specific: bool
) -> int:
    """Return how many tokens all captions begin with, short of their ends.

    In the same slot stands the same vector, unless every class has a context of its own.
    """
    filled = [
        [
            token if place not in places else f"of {number}" if class_specific else "of all"
            for place, token in enumerate(row)
        ]
        for number, (row, places) in enumerate(zip(ids, slots, strict=True))
    ]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*filled, strict=False))
    return min(len(list(alike)), min(map(len, ids)) - 1)


def no_past(tower: Any, many: int) -> Past:
    """Return the `past` of `many` sets of captions before which nothing stands."""
    weight, heads = tower.final_layer_norm.weight, tower.config.num_attention_heads
    nothing = weight.new_zeros(many, heads, 0, len(weight) // heads)
    return [(nothing, nothing)] * len(tower.encoder.layers)


def past_of(tower: Any, prefix: Tensor, many: int) -> Past:
    """Return the `past` of `many` sets of captions before which a prefix (blocks, 2, T, d) stands.

    Its keys and values have no position and count as none: captions start where they always do.
    """
    heads = tower.config.num_attention_heads
    return [
        (split[:1].expand(many, -1, -1, -1), split[1:].expand(many, -1, -1, -1))
        for split in (_by_head(of_block, heads) for of_block in prefix)
    ]


def _states(
    tower: Any, shared: Tensor, own: Tensor, ends: Tensor, start: int, past: Past
) -> tuple[Tensor, Past]:
    """Return the states (n, C, d) of the ends, and `past` with the shared tokens behind.

    Args:
        tower: transformers' `CLIPTextModel`.
        shared: (n, P, d), embedded tokens with which the captions of all classes go on.
        own: (n, C, S, d), the tokens behind these, padded at the end.
        ends: (C,), the token of `own` that is read.
        start: the position of the first shared token.
        past: what all these tokens attend to beside.
    """
    many, classes, length, _ = own.shape
    here, before = shared.shape[1], past[0][0].shape[2]
    places = tower.embeddings.position_embedding.weight[start:]
    behind = own + places[here : here + length]
    hidden = torch.cat([shared + places[:here], behind.flatten(1, 2)], dim=1)
    # Every token sees the shared ones, and those of its own class, up to itself.
    keys = torch.arange(before + here + length, device=ends.device)
    of_shared = keys[: before + here] <= keys[before : before + here, None]
    of_own = keys <= keys[before + here :, None]
    of_ends = (keys <= (before + here + ends)[:, None]).repeat(many, 1)[:, None, None]
    read = here + length * torch.arange(classes, device=ends.device) + ends
    after = []
    for block, old in zip(tower.encoder.layers, past, strict=True):
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        heads = attention.num_heads
        new = [_by_head(layer(normed), heads) for layer in (attention.k_proj, attention.v_proj)]
        common = [
            torch.cat([o.to(n.dtype), n[:, :, :here]], dim=2) for o, n in zip(old, new, strict=True)
        ]
        each = [
            torch.cat([c.repeat_interleave(classes, 0), _by_class(n[:, :, here:], classes)], dim=2)
            for c, n in zip(common, new, strict=True)
        ]
        after.append((common[0], common[1]))
        if len(after) < len(past):
            queries = _by_head(attention.q_proj(normed), heads)
            first = _attended(queries[:, :, :here], common, of_shared)
            rest = _attended(_by_class(queries[:, :, here:], classes), each, of_own)
            found = torch.cat([first, _in_a_row(rest, classes)], dim=2)
        else:
            hidden = hidden[:, read]
            queries = _by_head(attention.q_proj(normed[:, read]), heads)
            found = _in_a_row(_attended(_by_class(queries, classes), each, of_ends), classes)
        hidden = hidden + attention.out_proj(found.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    states: Tensor = tower.final_layer_norm(hidden)
    return states, after


def _attended(queries: Tensor, keys_values: Sequence[Tensor], seen: Tensor) -> Tensor:
    keys, values = keys_values
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """Return (n, L, d) as (n, heads, L, d/heads)."""
    many, length, width = tokens.shape
    return tokens.reshape(many, length, heads, width // heads).transpose(1, 2)


def _by_class(row: Tensor, classes: int) -> Tensor:
    """Return (n, heads, C·S, w) as (n·C, heads, S, w)."""
    many, heads, length, width = row.shape
    each = row.reshape(many, heads, classes, length // classes, width)
    return each.transpose(1, 2).flatten(0, 1)


def _in_a_row(each: Tensor, classes: int) -> Tensor:
    """Return (n·C, heads, S, w) as (n, heads, C·S, w)."""
    row = each.reshape(len(each) // classes, classes, *each.shape[1:])
    return row.transpose(1, 2).flatten(2, 3)
