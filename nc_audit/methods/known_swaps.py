"""What deliberately mismatched pairs tell: the noise rate and each pair's probability, without labels.

Known swaps keep an image and take a caption that none of its pairs carries. They show how noise scores. If the
given pairs are a mixture of matched ones and of pairs that score like swaps, the share r of the latter and the
posterior follow from the two score distributions.

Shapes: N = given pairs; S = known swaps; Q = quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_QUANTILES = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50)


def draw_swaps(
    image_N: Tensor,
    caption_N: Tensor,
    num_captions: int,
    generator: torch.Generator,
    block_N: Tensor | None = None,
    given_pairs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A caption for each pair's image that none of the image's pairs carries.

    A random permutation of the captions within each block. Where it gives a given pair, it exchanges captions with
    another of its block, so that each caption stays as frequent as it is; after a bounded number of tries one is drawn
    again, at last from outside the block.

    A model that is to score swaps like noise must not know where their captions come from: a wrong caption's true
    image is nowhere in the set. So when pairs are scored by a model that did not see their fold, swaps take their
    captions from that same fold.

    Args:
        image_N: index of each pair's image, shape [N].
        caption_N: index of each pair's caption, shape [N].
        num_captions: size of the caption index.
        generator: source of randomness, on the CPU.
        block_N: block of each pair, shape [N]; one block when not given.
        given_pairs: image and caption indices of the pairs that no swap may be; those above when not given.

    Returns:
        Caption index per pair, shape [N]; -1 where no caption could be found (its image carries nearly all).

    Example:
        >>> draw_swaps(torch.tensor([0, 1]), torch.tensor([0, 1]), 2, torch.Generator().manual_seed(0))
        tensor([1, 0])
    """
    given_image, given_caption = given_pairs or (image_N, caption_N)
    given = (given_image * num_captions + given_caption).unique()

    def is_given(captions: Tensor, images: Tensor) -> Tensor:
        keys = images * num_captions + captions
        at = torch.searchsorted(given, keys).clamp_max(len(given) - 1)
        return given[at] == keys

    if block_N is None:
        block_N = torch.zeros_like(image_N)
    by_block = block_N.argsort(stable=True)
    _, block_N, sizes = block_N.unique(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    mixed = torch.randperm(len(caption_N), generator=generator)
    swapped = torch.empty_like(caption_N)
    swapped[by_block] = caption_N[mixed[block_N[mixed].argsort(stable=True)]]
    for attempt in range(70):
        clash = is_given(swapped, image_N).nonzero().squeeze(1)
        if len(clash) == 0:
            return swapped
        if attempt < 60:
            share = torch.rand(len(clash), generator=generator, dtype=torch.float64)
            within = (share * sizes[block_N[clash]]).long()
            other = by_block[starts[block_N[clash]] + within]
        if attempt < 50:
            _exchange(swapped, image_N, clash, other, is_given)
        elif attempt < 60:
            swapped[clash] = caption_N[other]
        else:
            drawn = torch.randint(len(caption_N), (len(clash),), generator=generator)
            swapped[clash] = caption_N[drawn]
    swapped[is_given(swapped, image_N)] = -1
    return swapped


def _exchange(
    swapped_N: Tensor,
    image_N: Tensor,
    clash_K: Tensor,
    other_K: Tensor,
    is_given: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Exchanges, in place, the captions of clashing places and of others, where neither then is a given pair."""
    fits = ~is_given(swapped_N[other_K], image_N[clash_K]) & ~is_given(swapped_N[clash_K], image_N[other_K])
    clash_K, other_K = clash_K[fits], other_K[fits]
    # A place takes part once: the first time it is named.
    named = torch.stack([clash_K, other_K], 1).flatten()
    places, inverse = named.unique(return_inverse=True)
    turn = torch.arange(len(named))
    first = torch.full_like(places, len(named)).scatter_reduce(0, inverse, turn, "amin")
    once = (first[inverse] == turn).view(-1, 2).all(1)
    clash_K, other_K = clash_K[once], other_K[once]
    swapped_N[clash_K], swapped_N[other_K] = swapped_N[other_K], swapped_N[clash_K]


def right_by_chance(
    image_S: Tensor, caption_S: Tensor, image_N: Tensor, caption_N: Tensor, num_captions: int
) -> float:
    """Share of the swaps that would be right by chance if every given pair were wrong.

    An image that lost its captions to noise may be given one of them back. An image of n captions holds c with the
    probability v = n q where q is c's share of all pairs; of those that do not carry c, a share v / (1 - v) lost it.
    Where only a share r of the given pairs is wrong, r times as many swaps are right.

    Args:
        image_S: index of each swap's image, shape [S].
        caption_S: index of each swap's caption, shape [S].
        image_N: index of each given pair's image, shape [N].
        caption_N: index of each given pair's caption, shape [N].
        num_captions: size of the caption index.

    Returns:
        0..1; near 0 where captions seldom repeat.
    """
    num_images = int(torch.cat([image_N, image_S]).max()) + 1
    size_I = torch.bincount(image_N, minlength=num_images).double()
    share_C = torch.bincount(caption_N, minlength=num_captions).double() / len(caption_N)
    held_S = (size_I[image_S] * share_C[caption_S]).clamp_max(0.5)
    return float((held_S / (1 - held_S)).mean())


def draw_image_swaps(
    image_N: Tensor,
    caption_N: Tensor,
    num_captions: int,
    generator: torch.Generator,
    block_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, image by image: an image takes all captions of one other image of its block, however many.

    Whole-image noise looks like this: the captions of an image agree with each other, and are all wrong. The captions
    keep their places and their images change, so that a set of captions stays the set it is.

    Args:
        image_N: index of each pair's image, shape [N].
        caption_N: index of each pair's caption, shape [N].
        num_captions: size of the caption index.
        generator: source of randomness, on the CPU.
        block_N: block of each pair, the same for all pairs of an image, shape [N]; one block when not given.

    Returns:
        Image and caption index of the swap in each place, each of shape [N]; a caption the image carries itself is
        drawn again singly, and -1 stands where none could be found.
    """
    order = image_N.argsort(stable=True)
    images, inverse, sizes = image_N.unique(return_inverse=True, return_counts=True)
    block_I = torch.zeros_like(images) if block_N is None else block_N[order[sizes.cumsum(0) - sizes]]
    mixed = torch.randperm(len(images), generator=generator)
    ring = mixed[block_I[mixed].argsort(stable=True)]  # block after block, shuffled within
    ends = torch.cat([block_I[ring][1:] != block_I[ring][:-1], torch.ones(1, dtype=torch.bool)])
    first_of_block = torch.cat([torch.zeros(1, dtype=torch.long), ends.nonzero().squeeze(1)[:-1] + 1])
    behind = torch.arange(1, len(ring) + 1)
    behind[ends] = first_of_block
    taker = torch.empty_like(ring)
    taker[ring] = ring[behind]
    swapped_image = images[taker[inverse]]
    singly = draw_swaps(swapped_image, caption_N, num_captions, generator, block_N, (image_N, caption_N))
    given = (image_N * num_captions + caption_N).unique()
    clash = torch.isin(swapped_image * num_captions + caption_N, given)
    return swapped_image, torch.where(clash, singly, caption_N)


def standardise(values: Tensor, swaps: Tensor) -> Tensor:
    """Values in standard deviations of the known swaps, from the swaps' mean.

    Args:
        values: shape [...].
        swaps: the same quantity on the swaps, shape [S].

    Returns:
        Shape [...]; all zero where the swaps do not vary.
    """
    spread = swaps.std(correction=0)
    return (values - swaps.mean()) / spread if spread > 0 else torch.zeros_like(values)


def tail_shares(score_N: Tensor, swap_score_S: Tensor, tails: tuple[float, ...] = TAIL_QUANTILES) -> Tensor:
    """For each pair and each tail of the swaps' scores, whether the pair lies in it.

    Args:
        score_N: scores, higher = noisier, shape [N].
        swap_score_S: scores of known swaps, shape [S].
        tails: share of the swaps each upper tail holds, 0..1.

    Returns:
        Shape [N, Q], 0 or 1.
    """
    quantiles = torch.tensor([1 - q for q in tails], dtype=swap_score_S.dtype)
    ordered = swap_score_S.sort().values
    at = (quantiles * (len(ordered) - 1)).round().long()
    return (score_N[:, None] > ordered[at][None, :]).to(torch.float64)


def noise_rate(score_N: Tensor, swap_score_S: Tensor) -> float:
    """Share of the given pairs that score like known swaps.

    The mean, over the upper tails that hold .25 to .50 of the swaps, of the given pairs' share of that tail
    divided by the swaps' share.

    Args:
        score_N: scores of the given pairs, higher = noisier, shape [N].
        swap_score_S: scores of known swaps, shape [S], exchangeable with those of real noise.

    Returns:
        0..1. Errors that are harder to tell than random swaps are under-counted.

    Example:
        >>> noise_rate(torch.arange(100.0), torch.arange(100.0))
        1.0
    """
    given = tail_shares(score_N, swap_score_S).mean(0)
    swaps = tail_shares(swap_score_S, swap_score_S).mean(0).clamp_min(1 / max(1, len(swap_score_S)))
    return float((given / swaps).mean().clamp(0.0, 1.0))


def swaps_auroc(score_N: Tensor, swap_score_S: Tensor) -> float:
    """AUROC of known swaps against the given pairs, ties counting half: 0..1, .5 = cannot tell them apart."""
    ordered = score_N.sort().values
    below = torch.searchsorted(ordered, swap_score_S)
    up_to = torch.searchsorted(ordered, swap_score_S, right=True)
    return float(((below + up_to).double() / 2).mean()) / len(score_N)


def expected_auroc(separation: float, rate: float, swaps_right: float = 0.0) -> float:
    """AUROC that the score would show against the truth, had one the labels.

    Swaps against given pairs give A; a share r of the given pairs are themselves like swaps (AUROC .5 against
    them), so (A - r / 2) / (1 - r) is what swaps show against the matched ones. Of swaps of which a share e is right,
    wrong ones show (A - r / 2 - e / 2) / (1 - r - e).

    Args:
        separation: A, `swaps_auroc`, 0..1.
        rate: noise rate of the given pairs, 0..1.
        swaps_right: e, share of the swaps that are right by chance, 0..1.

    Returns:
        0..1; .5 = blind. Not a number where nearly every pair is noise.

    Example:
        >>> round(expected_auroc(0.8, 0.4), 3)
        1.0
    """
    if rate + swaps_right > 0.99:
        return float("nan")
    return min(1.0, max(0.0, (separation - rate / 2 - swaps_right / 2) / (1 - rate - swaps_right)))


def auroc_of_probabilities(probability_N: Tensor, score_N: Tensor) -> float:
    """AUROC of a score, were each pair noise with its probability: 0..1.

    The chance that a noisy pair scores above a right one, both drawn by their probabilities, ties counting half.

    Args:
        probability_N: noise probability of each pair, shape [N], 0..1.
        score_N: higher = noisier, shape [N].

    Returns:
        Not a number where all pairs are surely right or all surely noise.
    """
    values, group_N = score_N.unique(return_inverse=True)
    noise, right = (
        torch.zeros(len(values), dtype=torch.float64).index_add_(0, group_N, share.double())
        for share in (probability_N, 1 - probability_N)
    )
    below = right.cumsum(0) - right / 2
    total = noise.sum() * right.sum()
    return float((noise * below).sum() / total) if total > 0 else float("nan")


def isotonic_fit(values: Tensor, weights: Tensor) -> Tensor:
    """Non-decreasing least-squares fit of values in their given order, by pooling adjacent violators.

    Args:
        values: shape [K].
        weights: shape [K], above 0.

    Returns:
        Shape [K], non-decreasing.

    Example:
        >>> isotonic_fit(torch.tensor([1.0, 3.0, 2.0]), torch.ones(3))
        tensor([1.0000, 2.5000, 2.5000], dtype=torch.float64)
    """
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, size = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, before_total, before_size = blocks.pop()
            mean = (mean * total + before * before_total) / (total + before_total)
            total, size = total + before_total, size + before_size
        blocks.append((mean, total, size))
    means = torch.tensor([mean for mean, _, _ in blocks], dtype=torch.float64)
    return means.repeat_interleave(torch.tensor([size for _, _, size in blocks]))


def noise_posterior(
    score_N: Tensor, swap_score_S: Tensor, rate: float, swaps_right: float = 0.0, num_bins: int = 2048
) -> tuple[Tensor, Tensor]:
    """Probability of each pair to be noise: rate times the density ratio of swaps to given pairs.

    An isotonic regression of "is a swap" on the score, over both kinds, gives h; the ratio x is
    h / (1 - h) * N / S; the posterior is r x, cut to 0..1. With rate 0 it is 0: nothing is forced. Of swaps of which a
    share e is right, wrong ones have the density ratio ((1 - r) x - e) / (1 - r - e).

    Args:
        score_N: scores of the given pairs, higher = noisier, shape [N].
        swap_score_S: scores of known swaps, shape [S].
        rate: noise rate r of the given pairs, 0..1.
        swaps_right: share e of the swaps that are right by chance, 0..1; at most half of 1 - r counts.
        num_bins: the pooled scores are first gathered into this many bins of equal count.

    Returns:
        For the given pairs, shape [N], and for the swaps by the same rule, shape [S]: float64, 0..1,
        non-decreasing in the score. The given pairs' mean is near `rate`.
    """
    given_N, swaps_S = density_ratio(score_N, swap_score_S, num_bins)
    right = min(swaps_right, (1 - rate) / 2)
    if right > 0:
        given_N, swaps_S = (
            (((1 - rate) * ratio - right) / (1 - rate - right)).clamp_min(0.0) for ratio in (given_N, swaps_S)
        )
    return (rate * given_N).clamp_max(1.0), (rate * swaps_S).clamp_max(1.0)


def density_ratio(score_N: Tensor, swap_score_S: Tensor, num_bins: int = 2048) -> tuple[Tensor, Tensor]:
    """Density of the swaps over that of the given pairs at each score, non-decreasing: see `noise_posterior`.

    Returns:
        For the given pairs, shape [N], and for the swaps, shape [S]: float64, 0 or more. Its mean over the given pairs
        is near 1.
    """
    pooled = torch.cat([score_N, swap_score_S]).double()
    bins, num_bins = bins_of(pooled, num_bins)
    is_swap = torch.zeros(len(pooled), dtype=torch.float64)
    is_swap[len(score_N) :] = 1.0
    counts = torch.bincount(bins, minlength=num_bins).double()
    filled = counts > 0
    share = torch.bincount(bins, is_swap, minlength=num_bins)[filled] / counts[filled]
    fitted = torch.zeros(num_bins, dtype=torch.float64)
    fitted[filled] = isotonic_fit(share, counts[filled])
    h = fitted[bins].clamp(0.0, 1 - 1e-9)
    ratio = h / (1 - h) * len(score_N) / len(swap_score_S)
    return ratio[: len(score_N)], ratio[len(score_N) :]


def bins_of(values: Tensor, num_bins: int) -> tuple[Tensor, int]:
    """A bin of equal count for each value, and how many there are; equal values share a bin."""
    order = values.argsort(stable=True)
    num_bins = max(1, min(num_bins, len(order) // 4))
    ordered_bins, ordered = torch.arange(len(order)) * num_bins // len(order), values[order]
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    first = torch.arange(len(ordered))[starts]
    bins = torch.empty_like(order)
    bins[order] = ordered_bins[first][starts.long().cumsum(0) - 1]
    return bins, num_bins


def intra_image_correlation(value_N: Tensor, image_N: Tensor) -> float:
    """Intra-class correlation of a value over the pairs of one image.

    One-way analysis of variance: near 0 when noise strikes pairs one by one, near 1 when whole images are wrong.

    Args:
        value_N: one value per pair, shape [N].
        image_N: index of each pair's image, shape [N].

    Returns:
        -1..1; 0 when no image has two pairs or the values do not vary.
    """
    _, inverse, sizes = image_N.unique(return_inverse=True, return_counts=True)
    several = sizes[inverse] > 1
    if not several.any():
        return 0.0
    value, image = value_N[several].double(), inverse[several]
    _, image, sizes = image.unique(return_inverse=True, return_counts=True)
    count, groups = len(value), len(sizes)
    if groups < 2 or count == groups:
        return 0.0
    means = torch.zeros(groups, dtype=torch.float64).index_add_(0, image, value) / sizes
    between = (sizes * (means - value.mean()).square()).sum() / (groups - 1)
    within = (value - means[image]).square().sum() / (count - groups)
    typical = (count - (sizes.double().square().sum() / count)) / (groups - 1)
    denominator = between + (typical - 1) * within
    return float((between - within) / denominator) if denominator > 0 else 0.0


@dataclass(frozen=True)
class Evidence:
    """One quantity on the given pairs and on the known swaps; higher = noisier."""

    given_N: Tensor
    swaps_S: Tensor

    def standardised(self) -> Evidence:
        """Both in standard deviations of the swaps."""
        return Evidence(standardise(self.given_N, self.swaps_S), standardise(self.swaps_S, self.swaps_S))

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.given_N + other.given_N, self.swaps_S + other.swaps_S)

    def times(self, factor: float) -> Evidence:
        """Both standardised and multiplied."""
        one = self.standardised()
        return Evidence(factor * one.given_N, factor * one.swaps_S)

    def rate(self) -> float:
        """Noise rate by the swaps' tails, 0..1."""
        return noise_rate(self.given_N, self.swaps_S)

    def posterior(self, rate: float, swaps_right: float = 0.0) -> Evidence:
        """Noise probability of given pairs and swaps, float32, 0..1."""
        given, swaps = noise_posterior(self.given_N, self.swaps_S, rate, swaps_right)
        return Evidence(given.float(), swaps.float())


def worth(more: Evidence, beside: Evidence) -> float:
    """How far one quantity tells given pairs from swaps, as a share of how far another does: 0..1.

    The distance is between means, in standard deviations of the swaps. As a weight in a sum it keeps a signal that
    knows nothing from blurring one that does.
    """
    own, other = (-float(one.standardised().given_N.mean()) for one in (more, beside))
    return min(1.0, max(0.0, own / other)) if other > 0 else float(own > 0)


def fused(*evidence: Evidence) -> Evidence:
    """Plain sum of standardised evidence."""
    total = evidence[0].standardised()
    for one in evidence[1:]:
        total = total + one.standardised()
    return total


def pooled(evidence: Sequence[Evidence], noise_N: Tensor) -> Evidence:
    """Evidence of several draws of known swaps on the same pairs as one: the mean of each pair, the swaps of all draws.

    A given pair is scored in every draw, a swap in its own alone, and means vary less. With v the variance of a noisy
    pair's score from draw to draw, in units of the swaps' variance, the mean of T scores has 1 - (1 - 1 / T) v of the
    variance of one; so the swaps are drawn together about their mean.

    Args:
        evidence: of each draw, T of them, higher = noisier.
        noise_N: noise probability of each given pair, which says how far it counts in v, shape [N], 0..1.

    Returns:
        In standard deviations of single swaps; the swaps of all draws, one draw after the other.
    """
    drawn = [one.standardised() for one in evidence]
    given_TN = torch.stack([one.given_N for one in drawn])
    swaps = torch.cat([one.swaps_S for one in drawn])
    total = noise_N.sum()
    if len(drawn) > 1 and total > 0:
        spread = float((given_TN.var(0) * noise_N).sum() / total)
        swaps = swaps * max(0.0, 1 - (1 - 1 / len(drawn)) * min(1.0, spread)) ** 0.5
    return Evidence(given_TN.mean(0), swaps)
