from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from nc_audit.methods.projections import Projection, principal_projection


def vectors(num: int = 300, dims: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3.0, 0.3, dims)
    mix = torch.linalg.qr(torch.randn(dims, dims, generator=generator)).Q
    return torch.randn(num, dims, generator=generator) * spread @ mix + 5.0


@pytest.mark.parametrize("whitening", [1.0, 0.5, 0.0])
def test_equals_singular_values_of_the_centred_rows(whitening):
    rows = vectors()
    found = principal_projection(rows, 7, whitening)(rows)
    expected = oracles.principal_components(rows.double().numpy(), 7, whitening)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_whitened_components_are_uncorrelated_with_unit_variance():
    rows = vectors()
    found = principal_projection(rows, 8)(rows).double()
    np.testing.assert_allclose(found.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(8), atol=1e-3)


def test_half_whitening_keeps_half_of_the_spread_on_a_log_scale():
    rows = vectors()
    raw = (rows.double() - rows.double().mean(0)).numpy()
    deviation = np.linalg.svd(raw, compute_uv=False)[:6] / np.sqrt(len(raw))
    found = principal_projection(rows, 6, 0.5)(rows).double().std(0, correction=0)
    np.testing.assert_allclose(found, np.sqrt(deviation / deviation[0]), rtol=1e-3)


def test_the_largest_entry_of_each_axis_is_positive():
    matrix = principal_projection(vectors(seed=3), 8).matrix
    assert (matrix.gather(0, matrix.abs().argmax(0, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_order_of_rows():
    rows = vectors()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    first, second = principal_projection(rows, 6), principal_projection(rows[order], 6)
    np.testing.assert_allclose(first.matrix, second.matrix, atol=1e-4)
    assert torch.equal(first.matrix, principal_projection(rows, 6).matrix)


@pytest.mark.parametrize(
    ("num_rows", "dims", "wanted", "kept"), [(50, 6, 10, 6), (5, 20, 10, 4), (40, 8, 3, 3), (2, 4, 4, 1)]
)
def test_no_more_components_than_wanted_dimensions_and_rows(num_rows, dims, wanted, kept):
    assert principal_projection(vectors(num_rows, dims), wanted).matrix.shape == (dims, kept)


def test_directions_without_spread_are_left_out():
    rows = torch.cat([vectors(dims=4), torch.ones(300, 3)], 1)
    projection = principal_projection(rows, 7)
    assert projection.matrix.shape == (7, 4)
    assert torch.isfinite(projection(rows)).all()


def test_a_subset_of_rows_finds_nearly_the_same_axes():
    rows = vectors(4000, 6)
    few, all_rows = principal_projection(rows, 3, sample=1000), principal_projection(rows, 3)
    cosine = torch.nn.functional.cosine_similarity(few.matrix, all_rows.matrix, dim=0)
    assert (cosine > 0.95).all()
    assert not torch.equal(few.matrix, all_rows.matrix)


def test_identity_changes_nothing():
    rows = vectors()
    assert torch.equal(Projection.identity(12)(rows), rows)
