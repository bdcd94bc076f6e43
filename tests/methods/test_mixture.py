from __future__ import annotations

import warnings

import numpy as np
import oracles_divided
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.errors import ShapeError
from nc_audit.methods.mixture import clean_posterior


def two_groups(seed: int, num: int = 400, share: float = 0.3, gap: float = 3.0) -> torch.Tensor:
    """Values of a lower and a higher group, the first (1 - share) of them lower."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(num, generator=generator, dtype=torch.float64)
    value[int((1 - share) * num) :] = 1.5 * value[int((1 - share) * num) :] + gap
    return value


@given(strategies.seeds, st.integers(4, 40), st.floats(0.2, 0.8), st.floats(0, 5))
def test_equals_the_oracle(seed, num, share, gap):
    value = two_groups(seed, num, share, gap)
    np.testing.assert_allclose(
        clean_posterior(value, 0.0), oracles_divided.low_posterior(value.numpy()), atol=1e-8
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_learn_from_the_best_split(seed, share):
    from sklearn.mixture import GaussianMixture

    value = two_groups(seed, share=share)
    column = ((value - value.min()) / (value.max() - value.min())).numpy()[:, None]
    ordered = np.sort(column[:, 0])
    parts = min(
        ((ordered[:cut], ordered[cut:]) for cut in range(1, len(ordered))),
        key=lambda halves: sum(half.var() * len(half) for half in halves),
    )
    start = {
        "weights_init": [len(part) / len(ordered) for part in parts],
        "means_init": [[part.mean()] for part in parts],
        "precisions_init": [[[1 / (part.var() + 5e-4)]] for part in parts],
    }
    fitted = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, **start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten rounds need not converge
        fitted.fit(column)
    expected = fitted.predict_proba(column)[:, fitted.means_.argmin()]
    np.testing.assert_allclose(clean_posterior(value), expected, atol=1e-8)


@given(strategies.seeds, st.floats(0.1, 100), st.floats(-50, 50))
def test_scale_and_origin_do_not_matter(seed, scale, shift):
    value = two_groups(seed, 50)
    np.testing.assert_allclose(clean_posterior(scale * value + shift), clean_posterior(value), atol=1e-6)


@given(strategies.seeds)
def test_the_order_of_pairs_does_not_matter(seed):
    value = two_groups(seed, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(clean_posterior(value[order]), clean_posterior(value)[order], atol=1e-9)


def test_tells_far_groups_apart_in_float32():
    posterior = clean_posterior(two_groups(0, gap=12.0).float())
    assert posterior.dtype == torch.float32
    assert (posterior[:280] > 0.99).all()
    assert (posterior[280:] < 0.01).all()


@pytest.mark.parametrize("value", [[], [3.0], [2.0, 2.0, 2.0]])
def test_values_that_do_not_vary_are_all_clean(value):
    assert clean_posterior(torch.tensor(value)).tolist() == [1.0] * len(value)


def all_clean() -> torch.Tensor:
    """58 values whose lower component, wide and heavy, wins everywhere."""
    values, copies = [2.0, 13.0, 15.0, 16.0, 19.0], torch.tensor([1, 40, 2, 13, 2])
    return torch.tensor(values).repeat_interleave(copies)


@pytest.mark.parametrize(("share", "num"), [(0.0, 0), (0.01, 1), (0.05, 2), (0.1, 5)])
def test_where_all_are_clean_a_share_is_made_doubtful(share, num):
    free = clean_posterior(all_clean(), 0.0)
    assert (free > 0.5).all()
    forced = clean_posterior(all_clean(), share)
    changed = forced != free
    assert changed.sum() == num
    assert (forced[changed] == 0.5).all()
    if num:
        assert free[~changed].min() >= free[changed].max()


def test_a_set_with_noise_is_not_forced():
    value = two_groups(1)
    assert torch.equal(clean_posterior(value, 0.5), clean_posterior(value, 0.0))


def test_the_shape_is_named_in_the_error():
    with pytest.raises(ShapeError) as caught:
        clean_posterior(torch.zeros(2, 3))
    assert str(caught.value) == "values must have shape [N], got [2, 3]"
