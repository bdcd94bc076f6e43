"""Scoring pairs against fixed candidates: loss, energy and entropies without an N x M matrix.

What a pair's candidates contribute depends on its image alone (or its caption alone), so each distinct image and
caption meets the candidates once, and the own match is added per pair.

Shapes: I = images; C = captions; N = pairs; M = candidates; Q = queries of one side; D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nc_audit.methods.rows import paired_products


@dataclass(frozen=True)
class Pairs:
    """Distinct pairs as indices into distinct images and captions, all in canonical order."""

    image_N: Tensor
    caption_N: Tensor
    num_images: int
    num_captions: int

    def __len__(self) -> int:
        return len(self.image_N)

    @classmethod
    def of_arrays(
        cls, image_N: Sequence[int] | Any, caption_N: Sequence[int] | Any, num_images: int, num_captions: int
    ) -> Pairs:
        """Pairs from indices in lists or arrays, which are copied."""
        return cls(
            torch.tensor(image_N, dtype=torch.long),
            torch.tensor(caption_N, dtype=torch.long),
            num_images,
            num_captions,
        )

    def carrier_of_captions(self) -> Tensor:
        """An image that carries each caption, the one of the smallest index, shape [C]; -1 where there is none."""
        first = torch.full((self.num_captions,), self.num_images, dtype=torch.long)
        first.scatter_reduce_(0, self.caption_N, self.image_N, "amin")
        return torch.where(first == self.num_images, -1, first)

    def and_more(self, more: Pairs) -> Pairs:
        """These pairs and others behind them, over the same images and captions."""
        images, captions = [self.image_N, more.image_N], [self.caption_N, more.caption_N]
        return Pairs(torch.cat(images), torch.cat(captions), self.num_images, self.num_captions)

    def to(self, device: str | torch.device) -> Pairs:
        """The same with its indices on a device."""
        return replace(self, image_N=self.image_N.to(device), caption_N=self.caption_N.to(device))

    def select(self, at: Tensor) -> Pairs:
        """Some of the pairs, over the same images and captions."""
        return Pairs(self.image_N[at], self.caption_N[at], self.num_images, self.num_captions)


@dataclass(frozen=True)
class Candidates:
    """The fixed captions and images that every pair is scored against, and which are no negatives."""

    caption_M: Tensor
    image_M: Tensor
    own_caption: tuple[Tensor, Tensor]
    own_image: tuple[Tensor, Tensor]
    position_of_caption_C: Tensor
    position_of_image_I: Tensor

    @classmethod
    def draw(cls, pairs: Pairs, num: int, generator: torch.Generator) -> Candidates:
        """`num` random captions and images, or all where there are fewer."""
        caption_M = torch.randperm(pairs.num_captions, generator=generator)[:num].sort().values
        image_M = torch.randperm(pairs.num_images, generator=generator)[:num].sort().values
        caption_at = positions(caption_M, pairs.num_captions)
        image_at = positions(image_M, pairs.num_images)
        c, i = caption_at[pairs.caption_N], image_at[pairs.image_N]
        return cls(
            caption_M,
            image_M,
            (pairs.image_N[c >= 0], c[c >= 0]),
            (pairs.caption_N[i >= 0], i[i >= 0]),
            caption_at,
            image_at,
        )

    def to(self, device: str | torch.device) -> Candidates:
        """The same on a device."""
        own_caption, own_image = (
            (query.to(device), position.to(device)) for query, position in (self.own_caption, self.own_image)
        )
        return Candidates(
            self.caption_M.to(device),
            self.image_M.to(device),
            own_caption,
            own_image,
            self.position_of_caption_C.to(device),
            self.position_of_image_I.to(device),
        )

    def among(self, image_at: Tensor, caption_at: Tensor) -> Candidates:
        """The same candidates with images and captions counted among some of them, in increasing order.

        Args:
            image_at: images that remain, increasing, the candidates among them, shape [I'].
            caption_at: captions that remain, likewise, shape [C'].
        """

        def kept(own: tuple[Tensor, Tensor], at: Tensor, num: int) -> tuple[Tensor, Tensor]:
            place = positions(at, num)[own[0]]
            return place[place >= 0], own[1][place >= 0]

        num_images, num_captions = len(self.position_of_image_I), len(self.position_of_caption_C)
        return Candidates(
            torch.searchsorted(caption_at, self.caption_M),
            torch.searchsorted(image_at, self.image_M),
            kept(self.own_caption, image_at, num_images),
            kept(self.own_image, caption_at, num_captions),
            self.position_of_caption_C[caption_at],
            self.position_of_image_I[image_at],
        )


def positions(at: Tensor, num: int) -> Tensor:
    """Where each of `num` things stands in a selection `at` of distinct ones, shape [num]; -1 for one that is not."""
    position = torch.full((num,), -1, dtype=torch.long)
    position[at] = torch.arange(len(at))
    return position


@dataclass(frozen=True)
class Asked:
    """Sets of pairs to be matched, over those images and captions alone which that takes.

    `image_at` and `caption_at` say which these are, in increasing order; everything else counts among them. `strays`
    are those of the last set.
    """

    image_at: Tensor
    caption_at: Tensor
    candidates: Candidates
    sets: tuple[tuple[Tensor, Tensor], ...]
    strays: Tensor

    @classmethod
    def of(cls, candidates: Candidates, sets: Sequence[tuple[Tensor, Tensor]], strays: Tensor) -> Asked:
        """From image and caption indices of each set, and an image of each pair of the last, all among all."""
        image_at = torch.cat([*(image for image, _ in sets), strays, candidates.image_M]).unique()
        caption_at = torch.cat([*(caption for _, caption in sets), candidates.caption_M]).unique()
        image_place = positions(image_at, len(candidates.position_of_image_I))
        caption_place = positions(caption_at, len(candidates.position_of_caption_C))
        return cls(
            image_at,
            caption_at,
            candidates.among(image_at, caption_at),
            tuple((image_place[image], caption_place[caption]) for image, caption in sets),
            image_place[strays],
        )

    def to(self, device: str | torch.device) -> Asked:
        """The same on a device."""
        return Asked(
            self.image_at.to(device),
            self.caption_at.to(device),
            self.candidates.to(device),
            tuple((image.to(device), caption.to(device)) for image, caption in self.sets),
            self.strays.to(device),
        )

    def match(self, image_ID: Tensor, caption_CD: Tensor, scale: float) -> list[Matches]:
        """`match` on the vectors of `image_at` and `caption_at`."""
        return match(image_ID, caption_CD, scale, self.candidates, *self.sets, strays=self.strays)


@dataclass(frozen=True)
class Matches:
    """What scoring against candidates gives, per pair, each of shape [N].

    Similarity -1..1; loss and energy in nats; match entropies of the image over captions and of the caption over
    images, 0..1.
    """

    similarity: Tensor
    loss: Tensor
    energy: Tensor
    image_entropy: Tensor
    caption_entropy: Tensor

    @classmethod
    def zeros(cls, num_pairs: int) -> Matches:
        """A sum to add to."""
        return cls(*(torch.zeros(num_pairs) for _ in range(5)))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.similarity, self.loss, self.energy, self.image_entropy, self.caption_entropy

    def to(self, device: str | torch.device) -> Matches:
        """The same on a device."""
        return Matches(*(mine.to(device) for mine in self._tensors()))

    def add_(self, at_B: Tensor, more: Matches) -> None:
        """Add `more` (B pairs) at the places `at_B`, in place."""
        for mine, theirs in zip(self._tensors(), more._tensors(), strict=True):
            mine[at_B] += theirs

    def first(self, num: int) -> Matches:
        """Every quantity of the first `num` pairs."""
        return Matches(*(mine[:num] for mine in self._tensors()))

    def divided(self, by: float) -> Matches:
        """Every quantity divided by `by`."""
        return Matches(*(mine / by for mine in self._tensors()))


@dataclass
class _Side:
    """One direction's normaliser over the candidates, per query: log-sum-exp and softmax mean of the logits."""

    logsumexp: Tensor
    mean_logit: Tensor


_MASKED = -1e4  # finite, so that 0 x it is 0; no logit comes near
_QUERIES_AT_ONCE = 1024  # a block of logits stays in the processor's cache


def _one_side(
    query_QD: Tensor,
    candidate_MD: Tensor,
    own: tuple[Tensor, Tensor],
    scale: float,
    transform: Callable[[Tensor], Tensor] | None,
) -> _Side:
    query, position = own
    order = query.argsort(stable=True)
    query, position = query[order], position[order]
    num = len(query_QD)
    size = min(_QUERIES_AT_ONCE, max(1, num))
    # The same memory for every block: what is freed between results that stay is seldom fit for the next block.
    lse, mean = query_QD.new_empty(num), query_QD.new_empty(num)
    logits_BM, share_BM = (query_QD.new_empty(size, len(candidate_MD)) for _ in range(2))
    for start in range(0, num, size):
        part = query_QD[start : start + size]
        logits, share = logits_BM[: len(part)], share_BM[: len(part)]
        if transform is None:
            torch.mm(scale * part, candidate_MD.T, out=logits)
        else:
            torch.mul(transform(part @ candidate_MD.T), scale, out=logits)
        low, high = torch.searchsorted(query, query.new_tensor([start, start + len(part)])).tolist()
        logits[query[low:high] - start, position[low:high]] = _MASKED
        top = logits.amax(1)
        torch.exp(logits.sub_(top[:, None]), out=share)
        total = share.sum(1)
        torch.add(torch.linalg.vecdot(share, logits) / total, top, out=mean[start : start + len(part)])
        torch.add(top, total.log(), out=lse[start : start + len(part)])
    return _Side(lse, mean)


def match(
    image_ID: Tensor,
    caption_CD: Tensor,
    scale: float,
    candidates: Candidates,
    *asked: tuple[Tensor, Tensor],
    strays: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> list[Matches]:
    """Score pairs of images and captions, given or swapped, against the fixed candidates.

    The own match counts once, the other captions of the image and the other images of the caption not at all.

    Args:
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        scale: logit scale, a factor.
        candidates: what to score against.
        asked: sets of pairs, each as image and caption indices of shape [N].
        strays: for the last set, an image of each pair that is a candidate of the caption though it carries it,
            shape [N]. A swap needs that: the true image of a wrong caption is a candidate like any other, so the
            image from which a swap took its caption must be one too. Losses and energies count it, entropies do not.
        transform: from inner products to similarities, elementwise, where vectors are no unit vectors.

    Returns:
        For each set similarity (-1..1), loss and energy (nats), match entropies (0..1), each of shape [N].
    """
    by_image = _one_side(image_ID, caption_CD[candidates.caption_M], candidates.own_caption, scale, transform)
    by_caption = _one_side(caption_CD, image_ID[candidates.image_M], candidates.own_image, scale, transform)
    largest_entropy = [math.log(max(2, len(m))) for m in (candidates.caption_M, candidates.image_M)]
    found = []
    for number, (image_N, caption_N) in enumerate(asked):
        similarity = paired_products(image_ID, caption_CD, image_N, caption_N)
        if transform is not None:
            similarity = transform(similarity)
        own = scale * similarity
        caption_side = _with_own(by_image, image_N, own, candidates, caption_N, of_captions=True)
        image_side = _with_own(by_caption, caption_N, own, candidates, image_N, of_captions=False)
        over_images = image_side[0]
        if strays is not None and number == len(asked) - 1:
            astray = scale * paired_products(image_ID, caption_CD, strays, caption_N)
            counted = (candidates.position_of_image_I[strays] >= 0) & (strays != image_N)
            over_images = torch.where(counted, torch.logaddexp(over_images, astray), over_images)
        normaliser = (caption_side[0] + over_images) / 2
        found.append(
            Matches(
                similarity,
                normaliser - own,
                -normaliser,
                (caption_side[1] / largest_entropy[0]).clamp(0.0, 1.0),
                (image_side[1] / largest_entropy[1]).clamp(0.0, 1.0),
            )
        )
    return found


def _with_own(
    side: _Side, query_N: Tensor, own_N: Tensor, candidates: Candidates, other_N: Tensor, *, of_captions: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy with the own match among the candidates exactly once."""
    at = candidates.position_of_caption_C if of_captions else candidates.position_of_image_I
    owned = candidates.own_caption if of_captions else candidates.own_image
    lse, mean = side.logsumexp[query_N], side.mean_logit[query_N]
    # A swap's caption may itself be a candidate that is not masked for this query; then it is already counted.
    masked_keys = (owned[0] * len(at) + owned[1]).unique()
    keys = query_N * len(at) + at[other_N]
    found = torch.searchsorted(masked_keys, keys).clamp_max(max(0, len(masked_keys) - 1))
    is_masked = masked_keys[found] == keys if len(masked_keys) else torch.zeros_like(keys, dtype=torch.bool)
    counted = (at[other_N] >= 0) & ~is_masked
    total = torch.where(counted, lse, torch.logaddexp(lse, own_N))
    rest = (lse - total).exp() * mean
    expected = torch.where(counted, mean, rest + (own_N - total).exp() * own_N)
    return total, total - expected
