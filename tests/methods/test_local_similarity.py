from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.errors import ShapeError
from nc_audit.methods.local_similarity import gram_vector, local_similarity, own_local_similarity


def tokens(num: int, length: int, dims: int, seed: int, num_padded: int = 0) -> torch.Tensor:
    drawn = torch.randn(num, length, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[:, length - num_padded :] = 0
    return drawn


def by_hand(image: np.ndarray, caption: np.ndarray, is_mean: bool) -> np.ndarray:
    """Every patch against every word, one cosine at a time; padding is skipped."""
    result = np.zeros((len(image), len(caption)))
    for i, patches in enumerate(image):
        for j, words in enumerate(caption):
            squares = []
            for a in patches:
                for b in words:
                    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
                    if lengths > 0:
                        squares.append((sum(x * y for x, y in zip(a, b, strict=True)) / lengths) ** 2)
            result[i, j] = math.sqrt(sum(squares) / (len(squares) if is_mean else 1))
    return result


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 1000),
)
def test_it_equals_all_cosines_one_by_one(num, length, dims, num_padded, is_mean, seed):
    image = tokens(num, length, dims, seed)
    caption = tokens(3, length + num_padded, dims, seed + 1, num_padded)
    found = local_similarity(gram_vector(image, is_mean=is_mean), gram_vector(caption, is_mean=is_mean))
    np.testing.assert_allclose(found, by_hand(image.numpy(), caption.numpy(), is_mean), atol=1e-6)


def test_padding_scale_and_order_of_tokens_do_not_matter():
    image, caption = tokens(3, 4, 6, 0), tokens(3, 5, 6, 1)
    whole = local_similarity(gram_vector(image), gram_vector(caption))
    padded = torch.cat([caption, torch.zeros(3, 2, 6, dtype=caption.dtype)], 1)
    torch.testing.assert_close(local_similarity(gram_vector(image), gram_vector(padded)), whole)
    other = 3 * image[:, torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(local_similarity(gram_vector(other), gram_vector(caption)), whole)


def test_the_sign_of_a_cosine_is_lost():
    image, caption = tokens(2, 4, 6, 0), tokens(2, 5, 6, 1)
    torch.testing.assert_close(
        local_similarity(gram_vector(image), gram_vector(-caption)),
        local_similarity(gram_vector(image), gram_vector(caption)),
    )


def test_the_mean_lies_between_0_and_1_and_one_token_against_itself_is_1():
    image, caption = tokens(5, 4, 3, 0), tokens(6, 7, 3, 1)
    found = local_similarity(gram_vector(image, is_mean=True), gram_vector(caption, is_mean=True))
    assert ((found >= 0) & (found <= 1)).all()
    one = tokens(1, 1, 3, 2)
    assert local_similarity(gram_vector(one), gram_vector(one)).item() == pytest.approx(1.0)


def test_own_similarities_are_the_diagonal():
    image, caption = gram_vector(tokens(4, 3, 5, 0)), gram_vector(tokens(4, 6, 5, 1))
    torch.testing.assert_close(
        own_local_similarity(image, caption), local_similarity(image, caption).diagonal()
    )


def test_the_gradient_is_finite_where_nothing_is_alike():
    image = torch.zeros(2, 3, 4, requires_grad=True)
    local_similarity(gram_vector(image), gram_vector(torch.randn(2, 3, 4))).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ShapeError) as caught:
        gram_vector(torch.zeros(3, 4))
    assert str(caught.value) == "tokens must have shape [B, T, D], got [3, 4]"
