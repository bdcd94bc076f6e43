"""A small network that tells fitting pairs from made-up ones, learnt on a few pairs known to be right.

It sees both sides of a pair at once. Real pairs are trusted ones; fakes are their images with captions of another
group. "Adversarial" is only the name: nothing is trained to make better fakes.

Shapes: B = pairs; V, T = dimensions of the image and the caption side; Z = V + T; G = given pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from nc_audit.errors import ShapeError
from nc_audit.methods.contrastive import negatives_mask


class Discriminator(nn.Module):
    """Three hidden layers as wide as asked, each with ReLU and dropout, and one raw logit.

    Args:
        num_inputs: Z.
        hidden: width of the hidden layers; 0 = Z, as published.
        dropout: after each hidden layer.

    Source:
        D_N of CHNR (arXiv 2202.13117).
    """

    def __init__(self, num_inputs: int, hidden: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        hidden = hidden or num_inputs
        widths = [num_inputs, hidden, hidden, hidden]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, joint_BZ: Tensor) -> Tensor:
        """Logit of being a real pair, shape [B]; higher = fits better."""
        return self.layers(joint_BZ).squeeze(1)


def joint_vectors(image_BV: Tensor, caption_BT: Tensor) -> Tensor:
    """What the discriminator takes in of pairs: both sides beside each other.

    Args:
        image_BV: shape [B, V].
        caption_BT: shape [B, T].

    Returns:
        Shape [B, V + T].

    Raises:
        ShapeError: not equally many images and captions.

    Source:
        z(x, t) of CHNR (arXiv 2202.13117).

    Example:
        >>> joint_vectors(torch.ones(2, 1), torch.zeros(2, 2))
        tensor([[1., 0., 0.],
                [1., 0., 0.]])
    """
    if image_BV.dim() != 2 or caption_BT.dim() != 2 or len(image_BV) != len(caption_BT):
        raise ShapeError("captions", f"{len(image_BV)}, T", caption_BT.shape)
    return torch.cat([image_BV, caption_BT], 1)


def fakes_mask(
    image_B: Tensor, caption_B: Tensor, group_B: Tensor, given_G: Tensor, num_captions: int
) -> Tensor:
    """Which captions of a batch may be given to which images to make a fake pair.

    Never the own one, never that of another pair of the same image or with the same caption, never one of the same
    group (class or cluster), and never one that makes a pair which the dataset holds.

    Args:
        image_B: index of each pair's image, shape [B].
        caption_B: index of each pair's caption, shape [B].
        group_B: group of each pair, shape [B].
        given_G: the given pairs as image * num_captions + caption, sorted, shape [G]; may be empty.
        num_captions: distinct captions.

    Returns:
        Shape [B, B], True where image i with caption j is a fake.

    Source:
        CHNR (arXiv 2202.13117) draws fakes of another class; the rest is ours.

    Example:
        >>> at, group = torch.arange(3), torch.tensor([0, 0, 1])
        >>> fakes_mask(at, at, group, torch.tensor([], dtype=torch.long), 3).int()
        tensor([[0, 0, 1],
                [0, 0, 1],
                [1, 1, 0]], dtype=torch.int32)
    """
    mask = negatives_mask(image_B, caption_B) & (group_B[:, None] != group_B[None, :])
    if len(given_G):
        keys = image_B[:, None] * num_captions + caption_B[None, :]
        found = torch.searchsorted(given_G, keys).clamp_max(len(given_G) - 1)
        mask &= given_G[found] != keys
    return mask


def draw_fakes(mask_BB: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One fake per image, uniformly among those allowed.

    Args:
        mask_BB: `fakes_mask`, shape [B, B].
        generator: draws.

    Returns:
        Positions of the images that can have a fake, and of the caption each got; both of shape [B'], B' <= B.

    Example:
        >>> draw_fakes(torch.tensor([[False, True], [False, False]]), torch.Generator())
        (tensor([0]), tensor([1]))
    """
    rows = mask_BB.any(1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    return rows, torch.multinomial(mask_BB[rows].float(), 1, generator=generator).squeeze(1)


def logistic_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """Cross-entropy of telling real pairs from fakes, from logits.

    Args:
        real_B: logits of real pairs, shape [B].
        fake_B: logits of as many fakes, shape [B].

    Returns:
        A scalar, nats, 0..: mean over the real pairs plus mean over the fakes; 2 ln 2 for a coin.

    Source:
        L_D of CHNR (arXiv 2202.13117), first two terms.

    Example:
        >>> logistic_loss(torch.zeros(3), torch.zeros(3))
        tensor(1.3863)
    """
    return functional.softplus(-real_B).mean() + functional.softplus(fake_B).mean()


def gradient_penalty(
    logit: Callable[[Tensor], Tensor], real_BZ: Tensor, fake_BZ: Tensor, share_BZ: Tensor
) -> Tensor:
    """How far the logit's slope is from 1 between real pairs and fakes: mean of (|gradient| - 1)^2.

    Args:
        logit: from joint vectors [B, Z] to logits [B], differentiable.
        real_BZ: joint vectors of real pairs, shape [B, Z].
        fake_BZ: of fakes, shape [B, Z].
        share_BZ: share of the real pair in the point between, per feature, 0..1, shape [B, Z].

    Returns:
        A scalar, 0.., with gradient to the network behind `logit`.

    Source:
        L_D of CHNR (arXiv 2202.13117), third term: a WGAN-GP penalty interpolated per feature, not per pair.

    Example:
        >>> between = torch.rand(4, 2)
        >>> gradient_penalty(lambda z: 3 * z[:, 0], torch.ones(4, 2), torch.zeros(4, 2), between)
        tensor(4.)
    """
    between = (share_BZ * real_BZ + (1 - share_BZ) * fake_BZ).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(logit(between).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(slope, dim=1) - 1).square().mean()


def discriminator_loss(
    logit: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    captions: Sequence[Tensor],
    fake_at: tuple[Tensor, Tensor],
    generator: torch.Generator,
    penalty_factor: float = 10.0,
) -> Tensor:
    """The whole objective of the discriminator on one batch, summed over all combinations of views.

    Args:
        logit: from joint vectors [B, Z] to logits [B].
        images: views of the batch's images, each of shape [B, V].
        captions: views of its captions, each of shape [B, T].
        fake_at: positions of images and of the captions they get (`draw_fakes`), each of shape [B'], not empty.
        generator: draws the points between real pairs and fakes.
        penalty_factor: weight of the gradient penalty.

    Returns:
        A scalar, 0..: per combination the logistic loss of all real pairs and the fakes plus the penalty.

    Source:
        L_D of CHNR (arXiv 2202.13117).

    Example:
        >>> ones, at = [torch.ones(2, 1)], (torch.tensor([0, 1]), torch.tensor([1, 0]))
        >>> discriminator_loss(lambda z: z[:, 0] * 0 + 1, ones, ones, at, torch.Generator(), 0.0)
        tensor(1.6265)
    """
    total = torch.zeros(())
    image_at, caption_at = fake_at
    for image in images:
        for caption in captions:
            real = joint_vectors(image, caption)
            fake = joint_vectors(image[image_at], caption[caption_at])
            total = total + logistic_loss(logit(real), logit(fake))
            if penalty_factor:
                share = torch.rand(fake.shape, generator=generator, dtype=fake.dtype)
                total = total + penalty_factor * gradient_penalty(logit, real[image_at], fake, share)
    return total


def mean_over_views(
    logit: Callable[[Tensor], Tensor], images: Sequence[Tensor], captions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Probability and logit of pairs, averaged over all combinations of views.

    Args:
        logit: from joint vectors [B, Z] to logits [B].
        images: views of the images, each of shape [B, V].
        captions: views of the captions, each of shape [B, T].

    Returns:
        Probability of fitting (0..1) and its logit averaged apart, each of shape [B]; higher = cleaner.

    Source:
        c of CHNR (arXiv 2202.13117); the published code scores one combination with dropout running.

    Example:
        >>> mean_over_views(lambda z: z.sum(1), [torch.zeros(1, 1)], [torch.zeros(1, 1), torch.ones(1, 1)])
        (tensor([0.6155]), tensor([0.5000]))
    """
    logits = torch.stack([logit(joint_vectors(v, t)) for v in images for t in captions])
    return logits.sigmoid().mean(0), logits.mean(0)
