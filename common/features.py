"""Features: rows of a task as the tensors that a backbone takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.backbones import Preprocessor
from common.tasks import Split, open_picture


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and the labels (n,)."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    past_stem: bool = False


@dataclass(frozen=True)
class Features:
    """Preprocessed rows, on the CPU.

    Texts: `input_ids`, `attention_mask` (and `token_type_ids`), each (n, longest), int64. Images:
    `pixel_values` (n, channels, height, width), uint8: scaled and normalised batch by batch, which
    keeps a shard four times smaller. Past the stem of a model (`common.stem`) both are its hidden
    states, (n, tokens, width).
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    past_stem: bool = False

    def select(self, rows: Tensor) -> "Features":
        """Return the rows at these positions."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[rows])

    def room_for(self, count: int) -> "Features":
        """Return features of this form for `count` rows, whose values mean nothing yet."""
        inputs = {
            name: torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype)
            for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=torch.empty(count, dtype=torch.int64))

    def put(self, rows: Tensor, found: "Features") -> None:
        """Write features of this form to these positions."""
        for name, tensor in self.inputs.items():
            tensor[rows] = found.inputs[name]
        self.labels[rows] = found.labels

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """Return the rows at these positions, on `device`; texts cropped to the longest."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        if "attention_mask" in inputs:
            longest = int(inputs["attention_mask"].sum(dim=1).max())
            inputs = {name: tensor[:, :longest] for name, tensor in inputs.items()}
        if self.mean is not None and self.std is not None:
            pixels = inputs["pixel_values"].to(device, torch.float32) / 255
            inputs["pixel_values"] = (pixels - self.mean.to(device)) / self.std.to(device)
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        return Batch(moved, self.labels[rows].to(device), self.past_stem)

    def batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all rows, `size` at a time, in order."""
        for positions in self.positions(size):
            yield self.batch(positions, device)

    def positions(self, size: int) -> Iterator[Tensor]:
        """Yield the positions of all rows, `size` at a time, in order."""
        for start in range(0, len(self), size):
            yield torch.arange(start, min(start + size, len(self)))


def extract_features(preprocessor: Preprocessor, split: Split) -> Features:
    """Preprocess a split: tokenise texts, resize pictures."""
    return _EXTRACTORS[preprocessor.kind](preprocessor, split)


def _text_features(preprocessor: Preprocessor, split: Split) -> Features:
    inputs: list[Any] = list(split.inputs)
    texts = [parts if len(parts) > 1 else parts[0] for parts in inputs]
    # Longest in the shard: batches are cropped to their own longest row.
    encoded = preprocessor.tool(
        texts,
        padding=True,
        truncation=True,
        max_length=preprocessor.max_length,
        return_tensors="pt",
    )
    return Features(dict(encoded), torch.from_numpy(split.labels))


def _image_features(preprocessor: Preprocessor, split: Split) -> Features:
    processor = preprocessor.tool
    mode = "L" if preprocessor.channels == 1 else "RGB"
    pictures: list[Any] = list(split.inputs)
    pixels = np.stack(
        [np.asarray(_framed(open_picture(p).convert(mode), preprocessor)) for p in pictures]
    )
    pixels = pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    stored = torch.from_numpy(np.ascontiguousarray(pixels))
    return Features({"pixel_values": stored}, torch.from_numpy(split.labels), mean, std)


def _framed(picture: Image.Image, preprocessor: Preprocessor) -> Image.Image:
    """Return the picture at the model's size: stretched, or its centre where the processor says so.

    A processor that names a `shortest_edge` keeps the proportions and crops, as CLIP's does.
    """
    height, width = preprocessor.picture_size
    edge, resample = preprocessor.tool.size.get("shortest_edge"), preprocessor.tool.resample
    if not edge:
        return picture.resize((width, height), resample)
    whole = [edge * side // min(picture.size) for side in picture.size]
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    return picture.resize((whole[0], whole[1]), resample).crop(
        (left, top, left + width, top + height)
    )


def shortest_first(features: Features) -> Features:
    """Order texts by length, so that batches carry little padding; pictures stay as they are."""
    if "attention_mask" not in features.inputs:
        return features
    order = features.inputs["attention_mask"].sum(dim=1).argsort(stable=True)
    return features.select(order)


def as_tensors(features: Features) -> dict[str, Tensor]:
    """Return preprocessed rows as named tensors, to be stored; see `from_tensors`."""
    inputs = {_INPUT + name: tensor for name, tensor in features.inputs.items()}
    others = {"labels": features.labels, "mean": features.mean, "std": features.std}
    return inputs | {name: tensor for name, tensor in others.items() if tensor is not None}


def from_tensors(tensors: Mapping[str, Tensor]) -> Features:
    """Return the rows that `as_tensors` has named."""
    inputs = {
        name.removeprefix(_INPUT): tensor
        for name, tensor in tensors.items()
        if name.startswith(_INPUT)
    }
    return Features(inputs, tensors["labels"], tensors.get("mean"), tensors.get("std"))


_INPUT = "input."
_EXTRACTORS = {"text": _text_features, "image": _image_features}
