from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nc_audit.encoders import patches
from nc_audit.encoders.patches import BLOCKS, SIZE, PatchEncoder, Patches


def _texture(kind: int, seed: int) -> np.ndarray:
    """Stripes, spots, blocks or noise, in four colours, turned and shifted at random."""
    random = np.random.default_rng([kind, seed])
    y, x = np.mgrid[:SIZE, :SIZE] + random.integers(0, 50)
    wave = [
        np.sin(x / 3.0),
        np.sin(x / 4.0) * np.sin(y / 4.0),
        np.sign(np.sin(x / 9.0) * np.sin(y / 9.0)),
        random.standard_normal((SIZE, SIZE)),
    ][kind]
    colour = np.array([[1, 0.6, 0.4], [0.4, 1, 0.6], [0.5, 0.5, 1], [0.8, 0.8, 0.8]])[kind]
    image = 128 + 50 * wave[:, :, None] * colour + random.normal(0, 12, (SIZE, SIZE, 3))
    return np.rot90(image.clip(0, 255).astype(np.uint8), random.integers(4)).copy()


def _images(each: int) -> tuple[Tensor, Tensor]:
    pixels = np.stack([_texture(kind, seed) for seed in range(each) for kind in range(4)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.arange(4 * each) % 4


def _fitted(images: Tensor) -> PatchEncoder:
    learner = Patches(0)
    return learner.encoder(learner.learn(images)[0], "set")


@pytest.fixture(scope="module")
def fitted():
    images, kinds = _images(8)
    return _fitted(images), images, kinds


def test_images_of_one_kind_lie_together(fitted):
    encoder, images, kinds = fitted
    vectors = encoder.encode(images)
    assert vectors.shape == (32, encoder.dim)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(32))
    cosines = (vectors @ vectors.T).fill_diagonal_(-2)
    assert (kinds[cosines.argmax(1)] == kinds).float().mean() > 0.95


def test_learning_gives_the_vectors_that_encoding_would():
    images, _ = _images(8)
    learner = Patches(0)
    learnt, vectors = learner.learn(images)
    torch.testing.assert_close(learner.encoder(learnt, "set").encode(images), vectors, rtol=0, atol=2e-4)


def test_fitting_and_encoding_are_deterministic(fitted):
    encoder, images, _ = fitted
    again = _fitted(images)
    assert torch.equal(again.encode(images), encoder.encode(images))
    assert again.digest == encoder.digest == Patches(0).digest_for("set")
    assert len({encoder.digest, Patches(1).digest_for("set"), Patches(0).digest_for("other")}) == 3


def test_fisher_vectors_do_not_change_when_the_image_is_turned_or_mirrored(fitted):
    encoder, images, _ = fitted
    for turned in (
        images.rot90(1, (2, 3)),
        images.rot90(2, (2, 3)),
        images.flip(3),
        images.flip(2).rot90(1, (2, 3)),
    ):
        for block, one, other in zip(
            BLOCKS,
            patches._all_blocks(images[:6], encoder.learnt),
            patches._all_blocks(turned[:6], encoder.learnt),
            strict=False,
        ):
            cosine = (one * other).sum(1)
            assert cosine.min() > 0.999, block.name


def test_turned_descriptors_are_descriptors_of_turned_images():
    image = _images(1)[0][:1].float() / 255
    for block in BLOCKS:
        orders = patches._turned(block)
        found = patches._descriptors(block, image)
        side = round(found.shape[1] ** 0.5)
        for at, (mirrored, quarter) in enumerate((m, q) for m in (False, True) for q in range(4)):
            turned = (image.flip(3) if mirrored else image).rot90(quarter, (2, 3))
            other = patches._descriptors(block, turned)
            places = torch.arange(side * side).reshape(side, side)
            places = (places.flip(1) if mirrored else places).rot90(quarter, (0, 1)).reshape(-1)
            torch.testing.assert_close(found[:, places][:, :, orders[at]], other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_sets(count):
    images, _ = _images(1)
    encoder = _fitted(images[:count])
    vectors = encoder.encode(images)
    assert 1 <= encoder.dim <= max(1, count)
    assert torch.isfinite(vectors).all()


def test_images_without_any_structure():
    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    images[2:] = 255
    vectors = _fitted(images).encode(images)
    assert torch.isfinite(vectors).all()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_the_sample_is_spread_over_all_images():
    learner = Patches(0)
    assert learner.sample(3) == [0, 1, 2]
    chosen = learner.sample(10_000)
    assert len(set(chosen)) == len(chosen) == patches.NUM_SAMPLED
    assert chosen[0] == 0
    assert chosen[-1] > 9_990


def test_an_image_of_any_shape_becomes_bytes():
    for size in ((300, 20), (1, 1), (SIZE, SIZE)):
        pixels = Patches(0).preprocess(Image.new("RGB", size, (255, 0, 9)))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, SIZE, SIZE)
        assert pixels[:, 5, 5].tolist() == [255, 0, 9]


def test_shares_of_components_are_a_softmax_without_denormal_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    found = 30 * torch.randn(2, 50, 6, generator=generator)
    mean, variance = torch.randn(5, 6, generator=generator), torch.rand(5, 6, generator=generator) + 0.1
    prior = torch.rand(5, generator=generator)
    shares = patches._responsibilities(found, mean, variance, prior)
    gap = (found[:, :, None].double() - mean.double()).square() / variance.double()
    logits = prior.double().log() - (gap + variance.double().log()).sum(3) / 2
    assert (logits.amax(2, keepdim=True) - logits).amax() > 1000
    torch.testing.assert_close(shares.double(), logits.softmax(2), rtol=1e-3, atol=1e-9)
    assert shares.amin() > 0.1 * np.exp(-patches.LEAST_NATS)
