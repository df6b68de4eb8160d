"""Compression on the wire: fewer bits a number, and what was lost is made up for later.

Numbers are cut into blocks of 64; a block travels as its largest magnitude (bfloat16) and one small
signed integer a number, both rounded to the nearest: int8 has 8.25 bits a number and an error of at
most 1/253 of the block's largest magnitude, int4 has 4.25 bits and 1/13.
bfloat16 has the range of float32, so that this holds for small numbers as for large ones. float16
is IEEE half precision; what is beyond its 65504 is cut to that. NaN and infinity stay what they
are, or turn their block into NaN, so that the receiver can refuse them.

Uploads are increments over what the client was sent. Error feedback (Seide et al. 2014; Karimireddy
et al., arXiv 1901.09847): the client adds what its last upload lost before it compresses the next.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import UpdateRefusedError

Format = Literal["float32", "float16", "int8", "int4"]
BLOCK = 64
_SCALE_BYTES = 2
_LARGEST_HALF = 65504.0
_SMALLEST_SCALE = 2.0**-126  # the smallest normal number; a block of zeros needs some scale


@dataclass(frozen=True)
class _Codec:
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.Size], Tensor]


def encode(tensor: Tensor, form: Format) -> Tensor:
    """Return the tensor as it travels: itself, in half precision, or as bytes (n,) uint8."""
    return _CODECS[form].encode(tensor)


def decode(encoded: Tensor, form: Format, shape: torch.Size) -> Tensor:
    """Return the float32 tensor (shape) that `encoded` stands for.

    Raises:
        UpdateRefusedError: it has another type or size than a tensor of this shape has.
    """
    return _CODECS[form].decode(encoded, shape)


def encoded_bytes(numbers: int, form: Format) -> int:
    """Return how many bytes that many numbers of one tensor take."""
    blocks = math.ceil(numbers / BLOCK)
    sizes = {
        "float32": 4 * numbers,
        "float16": 2 * numbers,
        "int8": blocks * (_SCALE_BYTES + BLOCK),
        "int4": blocks * (_SCALE_BYTES + BLOCK // 2),
    }
    return sizes[form]


def _checked(encoded: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if encoded.dtype != dtype:
        raise UpdateRefusedError(f"has dtype {encoded.dtype}, not {dtype}")
    if encoded.shape != shape:
        raise UpdateRefusedError(f"has shape {tuple(encoded.shape)}, not {tuple(shape)}")
    return encoded


def _half(tensor: Tensor) -> Tensor:
    # What is infinite must not become a number.
    cut = tensor.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return torch.where(tensor.isfinite(), cut, tensor).to(torch.float16)


def _to_blocks(tensor: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (scales (b, 1) bfloat16, codes (b, 64) int8 in -levels..levels)."""
    flat = tensor.reshape(-1)
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scales = largest.clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    # Rounding takes less than 1/255 from a scale, so that no code goes beyond the levels.
    codes = (blocks / scales.float() * levels).round()
    return scales, codes.to(torch.int8)


def _from_blocks(scales: Tensor, codes: Tensor, levels: int, shape: torch.Size) -> Tensor:
    flat = (codes.float() * (scales.float() / levels)).reshape(-1)
    return flat[: shape.numel()].reshape(shape).contiguous()


def _encode_int8(tensor: Tensor) -> Tensor:
    scales, codes = _to_blocks(tensor, 127)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=1).reshape(-1)


def _decode_int8(encoded: Tensor, shape: torch.Size) -> Tensor:
    rows = _rows(encoded, "int8", shape)
    scales = rows[:, :_SCALE_BYTES].contiguous().view(torch.bfloat16)
    return _from_blocks(scales, rows[:, _SCALE_BYTES:].contiguous().view(torch.int8), 127, shape)


def _encode_int4(tensor: Tensor) -> Tensor:
    scales, codes = _to_blocks(tensor, 7)
    nibbles = (codes + 8).to(torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return torch.cat([scales.view(torch.uint8), packed], dim=1).reshape(-1)


def _decode_int4(encoded: Tensor, shape: torch.Size) -> Tensor:
    rows = _rows(encoded, "int4", shape)
    scales = rows[:, :_SCALE_BYTES].contiguous().view(torch.bfloat16)
    packed = rows[:, _SCALE_BYTES:]
    codes = torch.stack([packed & 15, packed >> 4], dim=2).reshape(len(rows), BLOCK)
    return _from_blocks(scales, codes.to(torch.int8) - 8, 7, shape)


def _rows(encoded: Tensor, form: Format, shape: torch.Size) -> Tensor:
    size = torch.Size([encoded_bytes(shape.numel(), form)])
    blocks = max(1, math.ceil(shape.numel() / BLOCK))
    return _checked(encoded, torch.uint8, size).reshape(blocks, -1)


_CODECS: Mapping[Format, _Codec] = {
    "float32": _Codec(
        lambda tensor: tensor, lambda encoded, shape: _checked(encoded, torch.float32, shape)
    ),
    "float16": _Codec(
        _half, lambda encoded, shape: _checked(encoded, torch.float16, shape).float()
    ),
    "int8": _Codec(_encode_int8, _decode_int8),
    "int4": _Codec(_encode_int4, _decode_int4),
}
