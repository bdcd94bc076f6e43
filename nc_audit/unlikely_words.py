"""Single words that their images do not look like: said of an image, and hardly to be seen there.

For each word a linear map of the image embeddings tells how much an image looks like those it is said of, learnt
without the image's own fold. Where an image lies much deeper among those a word is not said of, and no other caption
of the image says it, the word is unlikely. Words, unlike whole captions, have no known mismatches to calibrate on: what
is found is a place to look at, not a probability, and does not enter the scores.

Shapes: I = distinct images; C = distinct captions; P = distinct pairs; W = words; S = entries of a sparse [I, W], one
for each image and word said of it; K = directions of the embeddings, and a constant; F = folds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nc_audit.words import content_words, words_of

if TYPE_CHECKING:
    from scipy import sparse

FEWEST_IMAGES = 200
FEWEST_SAID = 20  # images that a word is said of by likely right captions
LIMIT = -8.0  # log ratio: e^8 times as typical of the images without the word as of those with it
_MOST_WORDS = 4_000
_MOST_DIRECTIONS = 256
_FOLDS = 5
_DECAY = 0.1  # of the maps' weights, for each image
_AT_ONCE = 4_096  # images
_MOST_SHOWN = 40  # letters of a word


@dataclass(frozen=True)
class UnlikelyWords:
    """The word of each pair that its image looks least like, among those that no other caption of the image says.

    Attributes:
        ratio_P: how much more the image looks like those the word is said of than like the others, log ratio, float32
            [P]; far below 0 where it hardly can be right, 0 where there is no such word.
        stem_P: which of `stems` it is, int64 [P]; -1 where there is none.
        stems: words without the s of a plural.
        num_said_W: number of images that likely right captions say it of, [W].
    """

    ratio_P: np.ndarray
    stem_P: np.ndarray
    stems: list[str]
    num_said_W: np.ndarray

    @property
    def is_named(self) -> np.ndarray:
        """Whether the word is so unlikely that a person should look, bool [P]."""
        return self.ratio_P <= LIMIT

    def told(self, pair: int, caption: str) -> str:
        """What is to be said to a person of a pair that has such a word."""
        stem = int(self.stem_P[pair])
        shown = min(word for word in words_of(caption) if _stem(word) == self.stems[stem])
        shown = shown if len(shown) <= _MOST_SHOWN else shown[: _MOST_SHOWN - 1] + "…"
        others = int(self.num_said_W[stem]) - 1
        return f'unlikely word: "{shown}", said of {others:,} images that look unlike this one'


def unlikely_words(
    embedding_ID: np.ndarray,
    image_P: np.ndarray,
    caption_P: np.ndarray,
    captions: Sequence[str],
    probability_P: np.ndarray,
) -> UnlikelyWords:
    """Look for the least likely word of each distinct pair.

    Args:
        embedding_ID: image embeddings, [I, D].
        image_P: image of each pair, [P].
        caption_P: caption of each pair, [P].
        captions: text of each distinct caption, C of them.
        probability_P: probability of each pair to be noise, 0..1, [P]; pairs teach by what is left to 1.
    """
    from scipy import sparse

    num_pairs, num_images = len(image_P), len(embedding_ID)
    nothing = UnlikelyWords(
        np.zeros(num_pairs, np.float32), np.full(num_pairs, -1), [], np.zeros(0, np.int64)
    )
    if num_images < FEWEST_IMAGES or not num_pairs:
        return nothing
    right_P = np.maximum(1 - np.nan_to_num(probability_P.astype(np.float64), nan=1.0), 1e-9)
    is_right_P = right_P > 0.5
    stems, says_CW = _says(captions)

    def said(weight_P: np.ndarray) -> sparse.csr_array:
        """Summed weights, all above 0, of the pairs of each image that say each word: [I, W] of one pattern."""
        of_images = sparse.csr_array((weight_P, (image_P, caption_P)), shape=(num_images, len(captions)))
        summed = (of_images @ says_CW).tocsr()
        summed.sort_indices()
        return summed

    num_said_W = np.asarray((said(np.where(is_right_P, 1.0, 1e-9)) > 0.5).sum(0)).ravel()
    chosen = np.argsort(-num_said_W, kind="stable")[:_MOST_WORDS]
    chosen = chosen[num_said_W[chosen] >= FEWEST_SAID]
    if not len(chosen):
        return nothing
    says_CW, num_said_W, stems = says_CW[:, chosen], num_said_W[chosen], [stems[at] for at in chosen]
    share_IW = said(right_P)
    total_I = np.bincount(image_P, right_P, num_images)
    share_IW.data /= np.repeat(total_I, np.diff(share_IW.indptr))
    is_said_S = said(np.where(is_right_P, 1.0, 1e-9)).data > 0.5
    ratio_S = _log_ratios(embedding_ID, np.minimum(total_I, 1.0), share_IW, is_said_S)
    # Where a single pair says the word, the sum of the numbers of those that do is its own.
    alone = np.flatnonzero((said(np.ones(num_pairs)).data == 1) & (ratio_S < 0))
    pair_S = said(np.arange(1.0, num_pairs + 1)).data.astype(np.int64) - 1
    alone = alone[np.argsort(ratio_S[alone], kind="stable")]
    pair, first = np.unique(pair_S[alone], return_index=True)
    nothing.ratio_P[pair] = ratio_S[alone[first]]
    nothing.stem_P[pair] = share_IW.indices[alone[first]]
    return UnlikelyWords(nothing.ratio_P, nothing.stem_P, stems, num_said_W)


def _says(texts: Sequence[str]) -> tuple[list[str], sparse.csr_array]:
    """Stems of content words, and which captions say each, sparse [C, W] of ones."""
    from scipy import sparse

    number_of: dict[str, int] = {}
    numbers, ends = array("q"), array("q", [0])
    for text in texts:
        # In an order that does not change from process to process, as that of a set would.
        numbers.extend([number_of.setdefault(word, len(number_of)) for word in sorted(words_of(text))])
        ends.append(len(numbers))
    said_in = np.bincount(np.array(numbers), minlength=len(number_of)).tolist()
    content = content_words(dict(zip(number_of, said_in, strict=True)), len(texts))
    place_of: dict[str, int] = {}
    stem_of = np.array(
        [place_of.setdefault(_stem(word), len(place_of)) if word in content else -1 for word in number_of]
    )
    caption = np.repeat(np.arange(len(texts)), np.diff(np.array(ends)))
    stem = stem_of[np.array(numbers)]
    shape = len(texts), max(1, len(place_of))
    places = np.unique((caption * shape[1] + stem)[stem >= 0])
    return list(place_of), sparse.csr_array((np.ones(len(places)), np.divmod(places, shape[1])), shape=shape)


def _stem(word: str) -> str:
    """A word without the s of a plural, as English and the Romance languages form most of them.

    Example:
        >>> [_stem(word) for word in ("trees", "grass", "bus")]
        ['tree', 'grass', 'bus']
    """
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] not in "sui" else word


def _log_ratios(
    embedding_ID: np.ndarray, weight_I: np.ndarray, share_IW: sparse.csr_array, is_said_S: np.ndarray
) -> np.ndarray:
    """How much more an image looks like those its words are said of than like the others, log ratio, [S].

    What the maps make of an image is taken as normal among both kinds of images, with one variance. Images none of
    whose captions is likely right belong to neither.

    Args:
        embedding_ID: image embeddings, [I, D].
        weight_I: how many of an image's captions are right, up to 1, as far as is known, [I].
        share_IW: share of an image's captions that say a word, 0..1.
        is_said_S: whether the entry is by a caption that is likely right.
    """
    num_images, num_words = share_IW.shape
    directions = _Directions(embedding_ID)
    fold_I = np.random.default_rng(0).permutation(num_images) % _FOLDS
    gram_F = np.zeros((_FOLDS, directions.num, directions.num))
    cross_F = np.zeros((_FOLDS, directions.num, num_words))
    for part, along in directions.parts():
        for fold in range(_FOLDS):
            mine = fold_I[part] == fold
            weighed = along[mine] * weight_I[part][mine, None]
            gram_F[fold] += weighed.T @ along[mine]
            cross_F[fold] += (share_IW[part][mine].T @ weighed).T
    decay = np.diag([_DECAY * weight_I.sum()] * (directions.num - 1) + [1e-9])
    gram, cross = gram_F.sum(0) + decay, cross_F.sum(0)
    maps = [
        np.linalg.solve(gram - gram_F[fold], cross - cross_F[fold]).astype(np.float32)
        for fold in range(_FOLDS)
    ]
    is_known_I = weight_I > 0.5
    total_W, square_W = np.zeros(num_words), np.zeros(num_words)
    like_S = np.empty(len(share_IW.data))
    for part, along in directions.parts():
        like = np.empty((len(along), num_words), np.float32)
        for fold in range(_FOLDS):
            mine = fold_I[part] == fold
            like[mine] = along[mine] @ maps[fold]
        known = like[is_known_I[part]]
        total_W += known.sum(0, dtype=np.float64)
        square_W += np.square(known).sum(0, dtype=np.float64)
        ends = share_IW.indptr[part.start : part.stop + 1]
        image_S = np.repeat(np.arange(len(along)), np.diff(ends))
        like_S[ends[0] : ends[-1]] = like[image_S, share_IW.indices[ends[0] : ends[-1]]]
    word_S = share_IW.indices

    def summed(values_S: np.ndarray) -> np.ndarray:
        return np.bincount(word_S[is_said_S], values_S[is_said_S], num_words)

    num_with = np.maximum(summed(np.ones_like(like_S)), 1)
    num_without = np.maximum(is_known_I.sum() - num_with, 1)
    mean_with = summed(like_S) / num_with
    mean_without = (total_W - summed(like_S)) / num_without
    spread = square_W - num_with * mean_with**2 - num_without * mean_without**2
    spread = np.maximum(spread, 1e-12 * num_images) / is_known_I.sum()
    slope = np.maximum(mean_with - mean_without, 0) / spread
    return (like_S - (mean_with + mean_without)[word_S] / 2) * slope[word_S]


class _Directions:
    """Image embeddings along those directions that they vary most in, each of variance 1, and a constant."""

    def __init__(self, embedding_ID: np.ndarray) -> None:
        self.embedding_ID = embedding_ID
        num, dim = embedding_ID.shape
        total, square = np.zeros(dim), np.zeros((dim, dim))
        for part in self._slices():
            some = np.asarray(embedding_ID[part], dtype=np.float32)
            total += some.sum(0, dtype=np.float64)
            square += some.T @ some
        self.mean = total / num
        variance, direction = np.linalg.eigh(square / num - np.outer(self.mean, self.mean))
        kept = slice(-min(_MOST_DIRECTIONS, dim, num // 8), None)
        variance, direction = variance[kept], direction[:, kept]
        is_any = variance > 1e-6 * max(variance[-1], 1e-12)
        self.scaled = (direction[:, is_any] / np.sqrt(variance[is_any])).astype(np.float32)
        self.num = self.scaled.shape[1] + 1

    def parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Images and what they are along the directions, [some, K], a part at a time."""
        for part in self._slices():
            along = (self.embedding_ID[part] - self.mean.astype(np.float32)) @ self.scaled
            yield part, np.concatenate([along, np.ones((len(along), 1), np.float32)], 1)

    def _slices(self) -> Iterator[slice]:
        ends = [*range(0, len(self.embedding_ID), _AT_ONCE), len(self.embedding_ID)]
        return (slice(start, stop) for start, stop in pairwise(ends))
