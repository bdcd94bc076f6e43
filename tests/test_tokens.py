from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from nc_audit import tokens
from nc_audit.embed import EmbeddingStore
from nc_audit.encoders.tfidf import MAX_WORDS, Tfidf

CAPTIONS = [
    f"{one} {two} beside a {three}"
    for one in ("red", "blue")
    for two in ("car", "house")
    for three in ("lake", "road", "tree")
]
IDS = [f"c{at:02d}" for at in range(len(CAPTIONS))]


class Cells:
    """Four cells of an image, each with its mean colour; fewer images than a batch are fine."""

    spec, digest, dim, input_size = "cells", "cells-digest", 3, (8, 8)

    def __init__(self) -> None:
        self.asked = 0

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1)

    def tokens(self, batch: torch.Tensor) -> torch.Tensor:
        self.asked += len(batch)
        means = torch.nn.functional.avg_pool2d(batch.float(), 4)
        return means.flatten(2).transpose(1, 2) / 255


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def store(tmp_path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path)


def test_words_of_a_caption_then_zeros_and_a_second_time_from_the_store(store):
    encoder = Tfidf(0).fit(CAPTIONS, "x")
    found = tokens.caption_tokens(encoder, IDS, CAPTIONS, store)
    assert found.shape[:2] == (len(CAPTIONS), MAX_WORDS)
    assert (found[:, :5].abs().sum(2) > 0).all(), "every caption has five words"
    assert (found[:, 5:] == 0).all()
    assert torch.equal(found[0, 2:4], found[1, 2:4]), "the same word has the same vector"
    assert not torch.equal(found[0, 4], found[1, 4])
    again = tokens.caption_tokens(encoder, IDS[::-1], CAPTIONS[::-1], store)
    assert again.shape == found.shape


def test_patches_of_images_with_zeros_for_one_that_cannot_be_decoded(store):
    encoder = Cells()
    ids = [f"i{at}" for at in range(7)]
    data = [png(at) for at in range(6)] + [b"no image"]
    found = tokens.image_tokens(encoder, ids, data.__getitem__, store, batch_size=2)
    assert found.shape[:2] == (7, 4)
    assert (found[6] == 0).all()
    assert (found[:6].abs().sum(2) > 0).all()
    asked = encoder.asked
    again = tokens.image_tokens(encoder, ids, data.__getitem__, store, batch_size=3)
    assert torch.equal(again, found)
    assert encoder.asked == asked, "the second time comes from the store"


def test_only_some_encoders_have_them():
    assert tokens.has_tokens(Cells())
    assert tokens.has_tokens(Tfidf(0).fit(CAPTIONS, "x"))
    assert not tokens.has_tokens(Tfidf(0))
