"""Mutual-information variation in closed form: how a pair changes what images tell of captions.

Shapes: N = pairs; D = dimensions of each side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.errors import ShapeError


@dataclass(frozen=True)
class Moments:
    """Weighted sums over some pairs that a joint Gaussian is fitted from; those of several parts add up.

    Attributes:
        weight: sum of the weights.
        first_D: of the joint vectors, image before caption, shape [D + D'].
        second_DD: of their outer products, shape [D + D', D + D'].
    """

    weight: Tensor
    first_D: Tensor
    second_DD: Tensor

    @classmethod
    def of(cls, joint_ND: Tensor, weight_N: Tensor) -> Moments:
        """Those of pairs; sums over them are in the vectors' own precision, so these should be about zero.

        Args:
            joint_ND: image vectors beside caption vectors, shape [N, D + D'].
            weight_N: weight of each pair, shape [N], 0..
        """
        weighted = joint_ND * weight_N[:, None].to(joint_ND.dtype)
        return cls(weight_N.double().sum(), weighted.double().sum(0), (joint_ND.T @ weighted).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.weight + other.weight, self.first_D + other.first_D, self.second_DD + other.second_DD
        )


class GaussianDependence:
    """Joint Gaussian of image and caption vectors, fitted on weighted pairs.

    For a new pair the variation is (q_v + q_t - q_z) / 2 with q the squared Mahalanobis lengths of the image,
    the caption and both together: the first-order change of the mutual information, and up to a constant the
    log-likelihood ratio of "same pair" against "independent".

    Args:
        image_ND: image vectors, shape [N, D].
        caption_ND: caption vectors of the same pairs, shape [N, D'].
        weight_N: weight of each pair, shape [N], 0..
        shrinkage: share of the scaled identity in each covariance, 0..1.

    Source:
        the idea is TSVC's (AAAI 2025, from the abstract); this closed form is reconstructed and ours.
    """

    def __init__(self, image_ND: Tensor, caption_ND: Tensor, weight_N: Tensor, shrinkage: float) -> None:
        if image_ND.dim() != 2 or caption_ND.dim() != 2 or len(image_ND) != len(caption_ND):
            raise ShapeError("image and caption vectors", "N, D", image_ND.shape)
        joint = torch.cat([image_ND, caption_ND], 1)
        share = (weight_N / weight_N.sum())[:, None].to(joint.dtype)
        mean = (joint * share).sum(0)
        centred = joint - mean
        self._fit(mean, centred.T @ (centred * share), image_ND.shape[1], shrinkage)

    @classmethod
    def of_moments(
        cls, moments: Moments, num_image_dims: int, shrinkage: float, dtype: torch.dtype = torch.float32
    ) -> GaussianDependence:
        """The same from sums over the pairs.

        Args:
            moments: of all pairs to fit on.
            num_image_dims: D, how many of the joint dimensions are the image's.
            shrinkage: share of the scaled identity in each covariance, 0..1.
            dtype: what variations are worked out in.
        """
        mean = moments.first_D / moments.weight
        covariance = moments.second_DD / moments.weight - torch.outer(mean, mean)
        one = cls.__new__(cls)
        one._fit(mean.to(dtype), covariance.to(dtype), num_image_dims, shrinkage)
        return one

    def _fit(self, mean_D: Tensor, covariance: Tensor, num_image_dims: int, shrinkage: float) -> None:
        self.num_image_dims = d = num_image_dims
        self.mean = mean_D
        self.image_factor = _inverse_factor(covariance[:d, :d], shrinkage)
        self.caption_factor = _inverse_factor(covariance[d:, d:], shrinkage)
        self.joint_factor = _inverse_factor(covariance, shrinkage)

    def variation(self, image_ND: Tensor, caption_ND: Tensor) -> Tensor:
        """Mutual-information variation of pairs.

        Args:
            image_ND: shape [N, D].
            caption_ND: shape [N, D'].

        Returns:
            Shape [N], nats, unbounded; higher = image and caption agree.
        """
        d = self.num_image_dims
        image, caption = image_ND - self.mean[:d], caption_ND - self.mean[d:]
        q_image = (image @ self.image_factor).square().sum(1)
        q_caption = (caption @ self.caption_factor).square().sum(1)
        q_joint = (torch.cat([image, caption], 1) @ self.joint_factor).square().sum(1)
        return (q_image + q_caption - q_joint) / 2

    def novelty(self, image_ND: Tensor, caption_ND: Tensor) -> tuple[Tensor, Tensor]:
        """How far the image and the caption of pairs lie off their own side, whatever their match.

        First-order change of each side's entropy: half the squared Mahalanobis length minus half its mean.

        Args:
            image_ND: shape [N, D].
            caption_ND: shape [N, D'].

        Returns:
            Image and caption novelty, each of shape [N], nats, from minus half the number of dimensions up; higher
            = more unusual, 0 = as expected. A pair that is unusual on a side is odd rather than mismatched.

        Source:
            the marginal terms of TSVC's variation, reconstructed.
        """
        d = self.num_image_dims
        image = ((image_ND - self.mean[:d]) @ self.image_factor).square().sum(1)
        caption = ((caption_ND - self.mean[d:]) @ self.caption_factor).square().sum(1)
        return (image - image_ND.shape[1]) / 2, (caption - caption_ND.shape[1]) / 2


def trimmed_dependence(
    image_ND: Tensor,
    caption_ND: Tensor,
    start_N: Tensor,
    keep: float,
    rounds: int,
    shrinkage: float,
) -> tuple[GaussianDependence, Tensor]:
    """Joint Gaussian of a core of pairs, which is chosen anew by its own variation a few times.

    The first round fits on `start_N`; each further one on the `keep` share with the highest variation so far.

    Args:
        image_ND: image vectors of all pairs, shape [N, D].
        caption_ND: caption vectors of the same pairs, shape [N, D'].
        start_N: the first core, bool, shape [N].
        keep: share of all pairs in later cores, above 0..1; one minus the noise rate.
        rounds: fits, 1...
        shrinkage: share of the scaled identity in each covariance, 0..1.

    Returns:
        The last fit, and the core it was fitted on, bool, shape [N].

    Source:
        trimming after the reconstruction of TSVC (AAAI 2025).
    """
    num = max(1, round(keep * len(start_N)))
    core_N = start_N
    for done in range(1, rounds + 1):
        fitted = GaussianDependence(image_ND, caption_ND, core_N.to(image_ND.dtype), shrinkage)
        if done < rounds:
            best = fitted.variation(image_ND, caption_ND).topk(num).indices
            core_N = torch.zeros_like(core_N)
            core_N[best] = True
    return fitted, core_N


def _inverse_factor(covariance_DD: Tensor, shrinkage: float) -> Tensor:
    """A factor F with F F' = the inverse of the shrunk covariance, shape [D, D]."""
    size = len(covariance_DD)
    scale = covariance_DD.diagonal().mean().clamp_min(torch.finfo(covariance_DD.dtype).tiny)
    eye = torch.eye(size, dtype=covariance_DD.dtype, device=covariance_DD.device)
    shrunk = (1 - shrinkage) * covariance_DD + shrinkage * scale * eye
    factor = torch.linalg.cholesky(shrunk)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T
