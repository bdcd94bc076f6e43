from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def colour_of(name: str) -> tuple[int, int, int]:
    """A colour of its own for every path."""
    number = sum(ord(character) * 31**at for at, character in enumerate(name)) % (1 << 24)
    return number >> 16, number >> 8 & 255, number & 255


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., None]:
    """Draws small images of different colours at paths below tmp_path."""

    def drawn(*names: str, below: Path | None = None) -> None:
        for name in names:
            path = (below or tmp_path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3), colour_of(str(path))).save(path)

    return drawn


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes bytes, text or json below tmp_path."""

    def written(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            path.write_text(text, encoding="utf-8", newline="")
        return path

    return written
