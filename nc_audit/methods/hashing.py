"""Binary codes of images and captions: hash heads, their losses, and weights from a probability of being right.

Codes are compared by Hamming distance; during training they are real numbers -1..1.

Shapes: B = pairs of a batch; I = images; C = captions; N = pairs; D = dimensions; K = bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nc_audit.errors import RecipeError, ShapeError, nearest

WEIGHTINGS = ("nw", "ew", "dw", "ones")


class HashHead(nn.Module):
    """One side's hash head: Linear, batch norm, ReLU, Linear, tanh."""

    def __init__(self, num_inputs: int, bits: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, bits),
            nn.Tanh(),
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Soft codes, shape [B, K], -1..1."""
        return self.layers(vectors_BD.float())


class HashHeads(nn.Module):
    """Image and caption hash head; soft codes, unit vectors and bits.

    Args:
        num_image: dimensions of the image head's inputs.
        num_caption: likewise of captions.
        bits: K.
        hidden: hidden units of each head.
        logit_scale: factor between cosines and logits.

    Source:
        f and g of CHNR (arXiv 2202.13117), there with 4096 hidden units and 64 bits.
    """

    def __init__(
        self,
        num_image: int,
        num_caption: int,
        bits: int = 64,
        hidden: int = 4096,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.sizes = {"num_image": num_image, "num_caption": num_caption, "bits": bits, "hidden": hidden}
        self.image = HashHead(num_image, bits, hidden)
        self.caption = HashHead(num_caption, bits, hidden)
        self.register_buffer("logit_scale", torch.tensor(logit_scale))

    def scale(self) -> Tensor:
        """Logit scale, a factor; 1 / temperature, not learnt."""
        return self.get_buffer("logit_scale")

    @torch.no_grad()
    def soft_codes(self, image_ID: Tensor, caption_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Soft codes of all images and captions, in evaluation mode: shapes [I, K], [C, K], -1..1."""
        was_training = self.training
        self.eval()
        image = torch.cat([self.image(part) for part in image_ID.split(16_384)])
        caption = torch.cat([self.caption(part) for part in caption_CD.split(16_384)])
        self.train(was_training)
        return image, caption

    def embed(self, image_ID: Tensor, caption_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Soft codes at unit length, as `Heads.embed` gives them: shapes [I, K], [C, K]."""
        image, caption = self.soft_codes(image_ID, caption_CD)
        return functional.normalize(image, dim=1), functional.normalize(caption, dim=1)


def binary_codes(soft_BK: Tensor) -> Tensor:
    """The codes themselves: the sign of each soft bit, 0 counting as +1.

    Args:
        soft_BK: soft codes, or unit vectors made of them, shape [B, K].

    Returns:
        Shape [B, K], int8, -1 or 1.

    Example:
        >>> binary_codes(torch.tensor([[0.3, -0.1, 0.0]]))
        tensor([[ 1, -1,  1]], dtype=torch.int8)
    """
    return torch.where(soft_BK < 0, -1, 1).to(torch.int8)


def pair_weight(probability_N: Tensor, weighting: str, threshold: float) -> Tensor:
    """Training weight of each pair from its probability of being right.

    `nw`: the probability itself. `ew`: its cube. `dw`: 1 above the threshold, else 0. `ones`: 1 for all.

    Args:
        probability_N: shape [N], 0..1, higher = cleaner.
        weighting: one of `WEIGHTINGS`.
        threshold: of `dw`; see `halfway`.

    Returns:
        Shape [N], 0..1, never falling as the probability rises.

    Raises:
        RecipeError: the weighting is unknown.

    Source:
        NW, EW and DW of CHNR (arXiv 2202.13117).

    Example:
        >>> pair_weight(torch.tensor([0.2, 0.5]), "ew", 0.3)
        tensor([0.0080, 0.1250])
        >>> pair_weight(torch.tensor([0.2, 0.5]), "dw", 0.3)
        tensor([0., 1.])
    """
    if weighting == "nw":
        return probability_N
    if weighting == "ew":
        return probability_N**3
    if weighting == "dw":
        return (probability_N > threshold).to(probability_N.dtype)
    if weighting == "ones":
        return torch.ones_like(probability_N)
    raise RecipeError(f"no weighting is called {weighting}", nearest(weighting, WEIGHTINGS))


def halfway(real_B: Tensor, fake_B: Tensor) -> tuple[float, float]:
    """Where real pairs and fakes part, and half their distance.

    Args:
        real_B: probability of real pairs, shape [B], 0..1.
        fake_B: of fakes, shape [B'].

    Returns:
        The middle of the two means, and half of (mean of real pairs - mean of fakes).

    Source:
        threshold of DW in CHNR (arXiv 2202.13117).

    Example:
        >>> halfway(torch.tensor([0.75, 0.75]), torch.tensor([0.25]))
        (0.5, 0.25)
    """
    real, fake = real_B.mean().item(), fake_B.mean().item()
    return (real + fake) / 2, (real - fake) / 2


def hash_contrastive_loss(
    image_BK: Tensor,
    caption_BK: Tensor,
    weight_B: Tensor,
    counts_BB: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Weighted contrastive loss between the two sides, over all 2B images and captions as anchors.

    An anchor's own other side stands against everything else in the batch, its own side included:
    -log of exp(own cosine) / sum of exp(cosine) over all but itself.

    Args:
        image_BK: soft codes of images, shape [B, K].
        caption_BK: of their captions, shape [B, K].
        weight_B: shape [B], 0..1.
        counts_BB: which pairs may serve as negatives of which (`contrastive.negatives_mask`), shape [B, B];
            None = all, as published.
        temperature: divides cosines.

    Returns:
        Shape [B], nats: the weighted loss of a pair's two anchors together.

    Raises:
        ShapeError: the two sides differ in shape.

    Source:
        L_con of CHNR (arXiv 2202.13117): NT-Xent with a weight per anchor.

    Example:
        >>> codes = torch.ones(2, 4)
        >>> hash_contrastive_loss(codes, codes, torch.tensor([1.0, 0.5]))
        tensor([2.1972, 1.0986])
    """
    if image_BK.dim() != 2 or image_BK.shape != caption_BK.shape:
        raise ShapeError("captions", ", ".join(map(str, image_BK.shape)), caption_BK.shape)
    num = len(image_BK)
    sides = [functional.normalize(one, dim=1) for one in (image_BK, caption_BK)]
    anchors = torch.cat(sides)
    logits = anchors @ anchors.T / temperature
    itself = torch.eye(2 * num, dtype=torch.bool, device=logits.device)
    masked = itself if counts_BB is None else itself | ~counts_BB.repeat(2, 2)
    normaliser = logits.masked_fill(masked, float("-inf")).logsumexp(1)
    own = torch.linalg.vecdot(*sides) / temperature
    return weight_B * (normaliser[:num] + normaliser[num:] - 2 * own)


def quantisation_loss(target_BK: Tensor, views: Sequence[Tensor]) -> Tensor:
    """Squared distance of soft codes from the bits they should become.

    Args:
        target_BK: bits, -1 or 1, shape [B, K].
        views: soft codes of the pairs' images and captions and of further views of them, each of shape [B, K].

    Returns:
        Shape [B], 0..4 K per view: sum over views and bits.

    Source:
        L_q of CHNR (arXiv 2202.13117); the target is the sign of the mean of all views, renewed every epoch.

    Example:
        >>> quantisation_loss(torch.ones(1, 2), [torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, -1.0]])])
        tensor([5.])
    """
    total = torch.zeros(len(target_BK), dtype=target_BK.dtype, device=target_BK.device)
    for view in views:
        total = total + (target_BK - view).square().sum(1)
    return total
