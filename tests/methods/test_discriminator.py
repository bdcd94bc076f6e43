from __future__ import annotations

import math

import numpy as np
import oracles_chnr
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nc_audit.errors import ShapeError
from nc_audit.methods.discriminator import (
    Discriminator,
    discriminator_loss,
    draw_fakes,
    fakes_mask,
    gradient_penalty,
    joint_vectors,
    logistic_loss,
    mean_over_views,
)

NONE = torch.zeros(0, dtype=torch.long)
triples = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(num_inputs: int, seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(num_inputs, 6, 0.2).double().eval()


@given(triples, st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_fakes_equal_the_oracle(batch, given_pairs):
    image, caption, group = (list(side) for side in zip(*batch, strict=True))
    keys = torch.tensor(sorted(i * 5 + c for i, c in given_pairs), dtype=torch.long)
    mask = fakes_mask(torch.tensor(image), torch.tensor(caption), torch.tensor(group), keys, 5)
    assert np.array_equal(mask.numpy(), oracles_chnr.fakes_mask(image, caption, group, given_pairs))


@given(triples, strategies.seeds)
def test_a_fake_never_shares_a_group_and_every_image_that_can_have_one_has_one(batch, seed):
    image, caption, group = (torch.tensor(side) for side in zip(*batch, strict=True))
    mask = fakes_mask(image, caption, group, NONE, 5)
    rows, columns = draw_fakes(mask, torch.Generator().manual_seed(seed))
    assert rows.tolist() == mask.any(1).nonzero().squeeze(1).tolist()
    assert (group[rows] != group[columns]).all()
    assert (image[rows] != image[columns]).all()
    assert (caption[rows] != caption[columns]).all()


def test_fakes_are_drawn_evenly_among_those_allowed():
    mask = torch.tensor([[False, True, True, False]]).repeat(4, 1).repeat(500, 1)
    _, columns = draw_fakes(mask, torch.Generator().manual_seed(0))
    counts = torch.bincount(columns, minlength=4)
    assert counts[[0, 3]].sum() == 0
    assert abs(int(counts[1]) - 1000) < 100


@given(strategies.seeds, st.integers(1, 2), st.integers(1, 2), st.floats(0, 20))
def test_the_objective_equals_the_oracle(seed, num_images, num_captions, factor):
    judge = network(5, seed % 7)
    images = [normal(4, 2, seed=seed + k) for k in range(num_images)]
    captions = [normal(4, 3, seed=seed + 10 + k) for k in range(num_captions)]
    fake_at = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1])
    found = discriminator_loss(
        judge, images, captions, fake_at, torch.Generator().manual_seed(seed), penalty_factor=factor
    )
    generator = torch.Generator().manual_seed(seed)
    shares = [
        torch.rand(3, 5, generator=generator, dtype=torch.float64).numpy() if factor else np.zeros((3, 5))
        for _ in range(num_images * num_captions)
    ]

    def logit(z: np.ndarray) -> float:
        with torch.no_grad():
            return judge(torch.from_numpy(z)[None]).item()

    expected = oracles_chnr.discriminator_loss(
        logit,
        [v.numpy() for v in images],
        [t.numpy() for t in captions],
        list(zip(*(at.tolist() for at in fake_at), strict=True)),
        shares,
        factor,
    )
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_whole_objective_has_the_right_gradient():
    judge = network(5)
    images, captions = [normal(3, 2, seed=1)], [normal(3, 3, seed=2)]
    fake_at = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])

    def loss(*parameters: Tensor) -> Tensor:
        names = [name for name, _ in judge.named_parameters()]
        values = dict(zip(names, parameters, strict=True))

        def logit(z: Tensor) -> Tensor:
            return torch.func.functional_call(judge, values, z)

        return discriminator_loss(logit, images, captions, fake_at, torch.Generator().manual_seed(0))

    parameters = tuple(p.detach().clone().requires_grad_(True) for p in judge.parameters())
    assert torch.autograd.gradcheck(loss, parameters, atol=1e-4)


@given(st.floats(0.0, 5.0), strategies.seeds)
def test_a_linear_logit_is_penalised_for_its_slope_alone(length, seed):
    direction = torch.nn.functional.normalize(normal(4, seed=seed), dim=0) * length
    between = torch.rand(6, 4, dtype=torch.float64)
    found = gradient_penalty(lambda z: z @ direction, normal(6, 4, seed=1), normal(6, 4, seed=2), between)
    assert found.item() == pytest.approx((length - 1) ** 2, abs=1e-9)


def test_a_coin_costs_two_bits_and_certainty_nothing():
    zeros = torch.zeros(5, dtype=torch.float64)
    assert logistic_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert logistic_loss(zeros + 40, zeros - 40).item() < 1e-12


def test_pairs_that_a_line_parts_are_told_apart():
    rng = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 3, generator=rng)
    image, caption = (
        latent[:, :1] + 2 * torch.sign(latent[:, :1]),
        latent[:, :1] + 2 * torch.sign(latent[:, :1]),
    )
    group = (latent[:, 0] > 0).long()
    torch.manual_seed(0)
    judge = Discriminator(2, 32, 0.0)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.5, 0.9))
    at = torch.arange(200)
    for _ in range(150):
        fake_at = draw_fakes(fakes_mask(at, at, group[:200], NONE, 300), rng)
        optimiser.zero_grad()
        discriminator_loss(judge, [image[:200]], [caption[:200]], fake_at, rng).backward()
        optimiser.step()
    rest = torch.arange(200, 300)
    rows, columns = draw_fakes(fakes_mask(rest, rest, group[200:], NONE, 300), rng)
    with torch.no_grad():
        real = judge(joint_vectors(image[200:], caption[200:]))
        fake = judge(joint_vectors(image[200:][rows], caption[200:][columns]))
    assert (real[:, None] > fake[None, :]).float().mean() > 0.95


def test_views_are_averaged_over_all_combinations():
    images, captions = [normal(3, 2, seed=k) for k in (0, 1)], [normal(3, 1, seed=k) for k in (2, 3)]
    probability, logit = mean_over_views(lambda z: z.sum(1), images, captions)
    single = [(v.sum(1) + t.sum(1)) for v in images for t in captions]
    torch.testing.assert_close(logit, sum(single) / 4)
    torch.testing.assert_close(probability, sum(one.sigmoid() for one in single) / 4)


def test_the_network_is_as_published():
    shapes = [tuple(p.shape) for p in Discriminator(7).parameters()]
    assert shapes == [(7, 7), (7,), (7, 7), (7,), (7, 7), (7,), (1, 7), (1,)]
    assert Discriminator(7)(torch.zeros(4, 7)).shape == (4,)


def test_sides_of_different_length_are_refused():
    with pytest.raises(ShapeError) as caught:
        joint_vectors(torch.zeros(3, 2), torch.zeros(4, 2))
    assert str(caught.value) == "captions must have shape [3, T], got [4, 2]"
