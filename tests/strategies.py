"""Hypothesis strategies: logits, losses, unit embeddings, pair indices, scores, probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, width=32)


@st.composite
def logits(draw: Any, min_candidates: int = 2, bound: float = 30.0, square: bool = False) -> Tensor:
    """Float64 logits, shape [B, M] (or [B, B]), B and M up to 7."""
    rows = draw(st.integers(2 if square else 1, 7))
    columns = rows if square else draw(st.integers(min_candidates, 7))
    return torch.from_numpy(draw(arrays(np.float64, (rows, columns), elements=_floats(-bound, bound))))


@st.composite
def losses(draw: Any, high: float = 3.0) -> Tensor:
    """Relative losses, float64, shape [B], 0..high."""
    return torch.tensor(draw(st.lists(_floats(0, high), min_size=1, max_size=30)), dtype=torch.float64)


thresholds = _floats(0.0625, 4.0)


def unit_vectors(num: int, dims: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit vectors, shape [num, dims]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(num, dims, generator=generator, dtype=torch.float64), dim=1
    ).to(dtype)


@st.composite
def pair_indices(
    draw: Any, max_images: int = 12, max_captions: int = 15, max_pairs: int = 30
) -> tuple[Tensor, Tensor, int, int]:
    """Distinct pairs as (image_N, caption_N, num_images, num_captions), sorted, at least two of each side."""
    images, captions = draw(st.integers(2, max_images)), draw(st.integers(2, max_captions))
    found = draw(
        st.sets(
            st.tuples(st.integers(0, images - 1), st.integers(0, captions - 1)),
            min_size=2,
            max_size=max_pairs,
        )
    )
    ordered = sorted(found)
    image, caption = (torch.tensor(side) for side in zip(*ordered, strict=True))
    return image, caption, images, captions


@st.composite
def scores(draw: Any, min_size: int = 1, max_size: int = 60) -> Tensor:
    """Scores with many ties, float64, shape [N]."""
    values = st.one_of(st.integers(-5, 5).map(float), _floats(-5, 5))
    return torch.tensor(draw(st.lists(values, min_size=min_size, max_size=max_size)), dtype=torch.float64)


probabilities = st.lists(
    st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), _floats(0, 1)), min_size=1, max_size=60
).map(lambda values: np.array(values, np.float64))
