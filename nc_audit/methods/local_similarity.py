"""Similarity of two sets of local embeddings (patches and words) without comparing every patch with every word.

With unit tokens a_p of an image and b_q of a caption, RRSITR's local score is the Frobenius norm of all cosines,
sqrt(sum_pq (a_p . b_q)^2). That equals sqrt(<A'A, B'B>), the inner product of the two D x D Gram matrices: each side
is summed up once, and a batch of local scores is one matrix product.

Shapes: B = images or captions; T = tokens; D = dimensions of a token; X, Y = Gram vectors of either side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nc_audit.errors import ShapeError

_TINY = 1e-12


def gram_vector(tokens_BTD: Tensor, *, is_mean: bool = False) -> Tensor:
    """The Gram matrix of each set of unit tokens, flattened.

    Args:
        tokens_BTD: local embeddings, shape [B, T, D]; all-zero tokens are padding and count for nothing.
        is_mean: divide by the number of tokens, so that similarities become root mean square cosines, 0..1, which
            the number of patches and words does not move.

    Returns:
        Shape [B, D * D]; its trace is the number of tokens that are no padding, or 1 with `is_mean`.

    Example:
        >>> gram_vector(torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))
        tensor([[1., 0., 0., 0.]])
    """
    if tokens_BTD.dim() != 3:
        raise ShapeError("tokens", "B, T, D", tokens_BTD.shape)
    unit = functional.normalize(tokens_BTD, dim=2)
    gram = (unit.transpose(1, 2) @ unit).flatten(1)
    if is_mean:
        gram = gram / (tokens_BTD.abs().sum(2) > 0).sum(1, keepdim=True).clamp_min(1)
    return gram


def local_similarity(image_XG: Tensor, caption_YG: Tensor) -> Tensor:
    """Frobenius norm of the cosines between all tokens of each image and all tokens of each caption.

    Args:
        image_XG: `gram_vector` of images, shape [X, D * D].
        caption_YG: `gram_vector` of captions, shape [Y, D * D].

    Returns:
        Shape [X, Y], 0..sqrt(number of token pairs); higher = alike. The sign of a cosine is lost.

    Source:
        local score of RRSITR (arXiv 2603.28134): its two L2 norms in a row are this norm. Padding is left out here;
        the authors' code counts it.
    """
    return rooted(image_XG @ caption_YG.T)


def rooted(products: Tensor) -> Tensor:
    """Local similarities from inner products of Gram vectors; the gradient at 0 stays finite."""
    return products.clamp_min(_TINY).sqrt()


def own_local_similarity(image_BG: Tensor, caption_BG: Tensor) -> Tensor:
    """`local_similarity` of image i and caption i alone, shape [B]."""
    return rooted(torch.linalg.vecdot(image_BG, caption_BG))
