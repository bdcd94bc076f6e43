from __future__ import annotations

import pytest
import torch

from nc_audit.methods.mutual_information import GaussianDependence, trimmed_dependence


def drawn(num: int, rate: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image and caption vectors that share four latent directions; the first `rate` of them are mismatched."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latent = normal(num, 4)
    image = latent @ normal(4, 6) + 0.5 * normal(num, 6)
    noisy = torch.arange(num) < rate * num
    caption = torch.where(noisy[:, None], normal(num, 4), latent) @ normal(4, 5) + 0.5 * normal(num, 5)
    return image, caption, noisy


def separation(variation: torch.Tensor, noisy: torch.Tensor) -> float:
    """Share of clean-noisy pairs of pairs in which the clean one varies higher."""
    return (variation[~noisy][:, None] > variation[noisy][None, :]).double().mean().item()


def test_trimming_cleans_a_core_that_noise_has_spoilt():
    image, caption, noisy = drawn(1000, 0.7)
    everything = torch.ones(1000, dtype=torch.bool)
    found = [
        trimmed_dependence(image, caption, everything, 0.3, rounds, 0.05)[0].variation(image, caption)
        for rounds in (1, 4)
    ]
    spoilt, trimmed = (separation(variation, noisy) for variation in found)
    assert trimmed > spoilt + 0.01
    assert trimmed > 0.95


@pytest.mark.parametrize(("keep", "size"), [(0.3, 60), (0.0001, 1), (1.0, 200)])
def test_the_core_is_the_share_that_varies_highest(keep, size):
    image, caption, _ = drawn(200, 0.3)
    everything = torch.ones(200, dtype=torch.bool)
    first = GaussianDependence(image, caption, torch.ones(200), 0.3).variation(image, caption)
    _, core = trimmed_dependence(image, caption, everything, keep, 2, 0.3)
    assert core.sum() == size
    assert set(core.nonzero().squeeze(1).tolist()) == set(first.topk(size).indices.tolist())


def test_one_round_fits_on_the_given_core():
    image, caption, noisy = drawn(200, 0.3)
    fitted, core = trimmed_dependence(image, caption, ~noisy, 0.5, 1, 0.05)
    assert torch.equal(core, ~noisy)
    expected = GaussianDependence(image, caption, (~noisy).double(), 0.05)
    assert torch.equal(fitted.variation(image, caption), expected.variation(image, caption))


def test_novelty_is_zero_on_average_where_it_was_fitted():
    image, caption, _ = drawn(300, 0.0)
    fitted = GaussianDependence(image, caption, torch.ones(300), 0.0)
    for side in fitted.novelty(image, caption):
        assert side.mean().item() == pytest.approx(0.0, abs=1e-6)


def test_novelty_tells_an_odd_image_from_a_mismatch():
    image, caption, _ = drawn(300, 0.0)
    fitted = GaussianDependence(image, caption, torch.ones(300), 0.05)
    odd = 6 * image[:100]
    image_novelty, caption_novelty = fitted.novelty(odd, caption[:100])
    plain = fitted.novelty(image[:100], caption[:100].roll(1, 0))
    assert image_novelty.median() > 10 * plain[0].abs().median()
    assert torch.equal(caption_novelty, fitted.novelty(image[:100], caption[:100])[1])
    assert torch.equal(plain[1], caption_novelty.roll(1))
