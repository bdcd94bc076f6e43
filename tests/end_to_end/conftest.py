"""A small untrained open_clip model, and a set of two-coloured images that it can learn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

NAME = "whole-towers"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, load_weights=False)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "m.safetensors"
    )
    return folder / "m.safetensors"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Images of two colours with captions that name them, every fifth caption of another image."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    names, rows = list(COLOURS), ["image,caption,known_noise"]
    for number in range(120):
        upper, lower = generator.integers(0, 4, 2)
        pixels = np.zeros((32, 32, 3), np.int64)
        pixels[:16], pixels[16:] = COLOURS[names[upper]], COLOURS[names[lower]]
        pixels += generator.integers(-15, 15, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        is_noisy = number % 5 == 0
        if is_noisy:
            upper, lower = (upper + 1) % 4, (lower + 2) % 4
        rows.append(f"{number}.png,{names[upper]} above {names[lower]},{is_noisy}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder
