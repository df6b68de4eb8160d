"""Pictures become what the model's own image processor would make of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, ViTImageProcessorPil

from common.backbones import Preprocessor
from common.features import extract_features
from common.tasks import Split

EDGE = 32
CONFIG = CLIPConfig(vision_config={"image_size": EDGE, "num_channels": 3})
# Wide, tall, square, already right, and sides that do not divide.
SIZES = [(50, 37), (37, 50), (32, 32), (33, 47), (20, 61), (91, 90), (64, 32)]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
    ),
    "vit": ViTImageProcessorPil(size={"height": EDGE, "width": EDGE}),
}


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_framed_and_normalised_as_by_the_models_processor(
    family: str, size: tuple[int, int]
) -> None:
    width, height = size
    stream = np.random.default_rng(0)
    picture = Image.fromarray(stream.integers(0, 255, (height, width, 3), dtype=np.uint8))
    processor = PROCESSORS[family]
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    preprocessor = Preprocessor("image", "folder", processor, 0, CONFIG)
    features = extract_features(preprocessor, Split([picture], np.zeros(1, dtype=np.int64)))
    found = features.batch(torch.arange(1), torch.device("cpu")).inputs["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
