"""Words that their images do not look like: said of an image, and hardly to be seen there.

For each word a linear map of the image embeddings tells how much an image looks like those it is said of, learnt
without the image's own fold. Where an image lies much deeper among those a word is not said of, and no other caption
of the image says it, the word is unlikely. Since the maps can be asked about any image and caption, known swaps
can be asked as well: what words tell against a pair is evidence as any other is, and calibrated with it.

Shapes: I = distinct images; C = distinct captions; P = distinct pairs; N = pairs asked about; W = words; S = entries of
a sparse [I, W], one for each image and word said of it; E = words of pairs asked about; K = directions of the
embeddings, and a constant; F = folds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nc_audit.words import content_words, words_of

if TYPE_CHECKING:
    from scipy import sparse

FEWEST_IMAGES = 200
FEWEST_SAID = 20  # images that a word is said of by likely right captions
LIMIT = -8.0  # log ratio: e^8 times as typical of the images without the word as of those with it
_FARTHEST = -12.0  # log ratio; beyond it no word tells more
_MOST_WORDS = 4_000
_MOST_DIRECTIONS = 256
_FOLDS = 5
_DECAY = 0.1  # of the maps' weights, for each image
_AT_ONCE = 4_096  # images
_MOST_SHOWN = 40  # letters of a word


@dataclass(frozen=True)
class UnlikelyWords:
    """What the words of pairs tell against them, but for words that the other captions of the image vouch for.

    They vouch for what they say where one of them at least is likely right: those of a wrong image agree as well.

    Attributes:
        ratio_N: of the word that the image looks least like, how much more it looks like those the word is said of than
            like the others, log ratio, float32 [N]; far below 0 where it hardly can be right, 0 where there is none.
        stem_N: which of the words it is, int64 [N]; -1 where there is none.
        is_shared_N: whether another caption of the image says it too, bool [N].
        total_N: sum over the words of the root of how far below 0 each one's ratio is, down to -12, float32 [N].
        stems: the words, without the s of a plural.
        num_said_W: number of images that likely right captions say each of, [W].
    """

    ratio_N: np.ndarray
    stem_N: np.ndarray
    is_shared_N: np.ndarray
    total_N: np.ndarray
    stems: list[str]
    num_said_W: np.ndarray

    @property
    def is_named(self) -> np.ndarray:
        """Whether the word is so unlikely that a person should look, bool [N]."""
        return (self.ratio_N <= LIMIT) & ~self.is_shared_N

    @property
    def least(self) -> np.ndarray:
        """What the least likely word alone adds to `total_N`, float32 [N]."""
        return _root(self.ratio_N)

    def told(self, pair: int, caption: str) -> str:
        """What is to be said to a person of a pair that has such a word."""
        stem = int(self.stem_N[pair])
        shown = min(word for word in words_of(caption) if _stem(word) == self.stems[stem])
        shown = shown if len(shown) <= _MOST_SHOWN else shown[: _MOST_SHOWN - 1] + "…"
        others = int(self.num_said_W[stem]) - 1
        return f'unlikely word: "{shown}", said of {others:,} images that look unlike this one'


class WordMaps:
    """Linear maps from image embeddings to words, learnt from pairs by how likely each is right.

    Args:
        embedding_ID: image embeddings, [I, D].
        image_P: image of each pair, [P].
        caption_P: caption of each pair, [P].
        captions: text of each distinct caption, C of them.
        right_P: probability of each pair to be right, 0..1, [P].
    """

    def __init__(
        self,
        embedding_ID: np.ndarray,
        image_P: np.ndarray,
        caption_P: np.ndarray,
        captions: Sequence[str],
        right_P: np.ndarray,
    ) -> None:
        from scipy import sparse

        self.image_P, self.caption_P = image_P, caption_P
        num_images = len(embedding_ID)
        self._stems: list[str] = []
        self._num_said_W = np.zeros(0, np.int64)
        if num_images < FEWEST_IMAGES or not len(image_P):
            return
        right_P = np.nan_to_num(right_P.astype(np.float64))
        stems, says_CW = _says(captions)

        def said(weight_P: np.ndarray, says_CW: sparse.csr_array) -> sparse.csr_array:
            """Summed weights of the pairs of each image that say each word, [I, W]."""
            of_images = sparse.csr_array((weight_P, (image_P, caption_P)), shape=(num_images, len(captions)))
            return _sorted(of_images @ says_CW)

        said_IW = said(right_P.astype(np.float32), says_CW)
        num_said_W = np.bincount(said_IW.indices[said_IW.data > 0.5], minlength=len(stems))
        chosen = np.argsort(-num_said_W, kind="stable")[:_MOST_WORDS]
        chosen = chosen[num_said_W[chosen] >= FEWEST_SAID]
        self._stems, self._num_said_W = [stems[at] for at in chosen], num_said_W[chosen]
        if not len(chosen):
            return
        self._says_CW = _sorted(says_CW[:, chosen])
        self._num_saying_IW = said(np.ones(len(image_P), np.float32), self._says_CW)
        self._right_P, self._total_I = right_P, np.bincount(image_P, right_P, num_images)
        self._directions = _Directions(embedding_ID)
        self._fold_I = np.random.default_rng(0).permutation(num_images) % _FOLDS
        said_IW = _sorted(said_IW[:, chosen])
        self._maps_FKW = self._learn(said_IW)
        self._middle_W, self._slope_W = self._curves(said_IW)

    @cached_property
    def given(self) -> UnlikelyWords:
        """What words tell against the pairs that the maps were learnt from, P of them."""
        return self._ask(self.image_P, self.caption_P, np.arange(len(self.image_P)))

    def swaps(self, image_N: np.ndarray, caption_N: np.ndarray, seed: int) -> UnlikelyWords:
        """What words tell against captions put in the place of one of an image's own, drawn at random.

        The caption that makes room is not heard, so that a swap has as many others beside it as a wrong pair has.

        Args:
            image_N: images, each of one pair at least, [N].
            caption_N: captions put to them, [N].
            seed: draws the places.
        """
        by_image = np.argsort(self.image_P, kind="stable")
        sizes = np.bincount(self.image_P, minlength=int(image_N.max(initial=0)) + 1)
        starts = np.cumsum(sizes) - sizes
        draws = np.random.default_rng(seed).random(len(image_N))
        place_N = by_image[starts[image_N] + (draws * sizes[image_N]).astype(np.int64)]
        return self._ask(image_N, caption_N, place_N)

    def _ask(self, image_N: np.ndarray, caption_N: np.ndarray, place_N: np.ndarray) -> UnlikelyWords:
        """Look for what tells against pairs that stand in the place of given ones, [N]."""
        num = len(image_N)
        found = UnlikelyWords(
            np.zeros(num, np.float32),
            np.full(num, -1),
            np.zeros(num, bool),
            np.zeros(num, np.float32),
            self._stems,
            self._num_said_W,
        )
        if not self._stems:
            return found
        by_image = np.argsort(image_N, kind="stable")
        ordered = image_N[by_image]
        for part, like in self._likeness():
            asked = by_image[np.searchsorted(ordered, part.start) : np.searchsorted(ordered, part.stop)]
            words = self._says_CW[caption_N[asked]]
            pair_E, word_E = np.repeat(np.arange(len(asked)), np.diff(words.indptr)), words.indices
            image_E, place_E = image_N[asked][pair_E], place_N[asked][pair_E]
            own_E = _at(self._says_CW, self.caption_P[place_E], word_E)
            is_shared_E = _at(self._num_saying_IW, image_E, word_E) > own_E
            others_N = self._total_I[image_N[asked]] - self._right_P[place_N[asked]]
            counts = ~is_shared_E | (others_N[pair_E] < 0.5)
            pair_E, word_E, image_E, is_shared_E = (
                one[counts] for one in (pair_E, word_E, image_E, is_shared_E)
            )
            ratio_E = like[image_E - part.start, word_E] - self._middle_W[word_E]
            ratio_E = np.minimum(ratio_E * self._slope_W[word_E], 0.0)
            found.total_N[asked] = np.bincount(pair_E, _root(ratio_E), len(asked))
            # The least likely word of each, the last of them written; words come in one order whatever the ratio.
            order = np.argsort(-ratio_E, kind="stable")
            order = order[ratio_E[order] < 0]
            found.ratio_N[asked[pair_E[order]]] = ratio_E[order]
            found.stem_N[asked[pair_E[order]]] = word_E[order]
            found.is_shared_N[asked[pair_E[order]]] = is_shared_E[order]
        return found

    def _learn(self, said_IW: sparse.csr_array) -> np.ndarray:
        """For each fold the map learnt from the others: ridge regression on the share of captions that say a word."""
        num, num_words = self._directions.num, len(self._stems)
        weight_I = np.minimum(self._total_I, 1.0)
        share_IW = said_IW.copy()
        share_IW.data /= np.repeat(np.maximum(self._total_I, 1e-9), np.diff(share_IW.indptr))
        gram_F, cross_F = np.zeros((_FOLDS, num, num)), np.zeros((_FOLDS, num, num_words))
        for part, along in self._directions.parts():
            for fold in range(_FOLDS):
                mine = self._fold_I[part] == fold
                weighed = along[mine] * weight_I[part][mine, None]
                gram_F[fold] += weighed.T @ along[mine]
                cross_F[fold] += (share_IW[part][mine].T @ weighed).T
        gram = gram_F.sum(0) + np.diag([_DECAY * weight_I.sum()] * (num - 1) + [1e-9])
        cross = cross_F.sum(0)
        maps_FKW = np.empty(cross_F.shape, np.float32)
        for fold in range(_FOLDS):
            maps_FKW[fold] = np.linalg.solve(gram - gram_F[fold], cross - cross_F[fold])
        return maps_FKW

    def _curves(self, said_IW: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
        """Of each word, where a map's values turn from unlike to like, and how fast: log ratio by unit, both [W].

        The values are taken as normal among the images the word is said of and among the others, with one variance.
        Images none of whose captions is likely right belong to neither.
        """
        is_known_I = self._total_I > 0.5
        is_said_S, num_words = said_IW.data > 0.5, len(self._stems)
        total_W, square_W, with_W = np.zeros(num_words), np.zeros(num_words), np.zeros(num_words)
        for part, like in self._likeness():
            known = like[is_known_I[part]]
            total_W += known.sum(0, dtype=np.float64)
            square_W += np.square(known).sum(0, dtype=np.float64)
            ends = said_IW.indptr[part.start : part.stop + 1]
            here = slice(ends[0], ends[-1])
            image = np.repeat(np.arange(len(like)), np.diff(ends))[is_said_S[here]]
            word = said_IW.indices[here][is_said_S[here]]
            with_W += np.bincount(word, like[image, word], num_words)
        num_with = np.maximum(self._num_said_W, 1)
        num_without = np.maximum(is_known_I.sum() - num_with, 1)
        mean_with, mean_without = with_W / num_with, (total_W - with_W) / num_without
        spread = square_W - num_with * mean_with**2 - num_without * mean_without**2
        spread = np.maximum(spread, 1e-12 * len(is_known_I)) / is_known_I.sum()
        return (mean_with + mean_without) / 2, np.maximum(mean_with - mean_without, 0) / spread

    def _likeness(self) -> Iterator[tuple[slice, np.ndarray]]:
        """What the maps make of images, each by the map learnt without its fold, [some, W], a part at a time."""
        for part, along in self._directions.parts():
            like = np.empty((len(along), len(self._stems)), np.float32)
            for fold in range(_FOLDS):
                mine = self._fold_I[part] == fold
                like[mine] = along[mine] @ self._maps_FKW[fold]
            yield part, like


def _root(ratio: np.ndarray) -> np.ndarray:
    """The root of how far log ratios are below 0: many words that tell a little outweigh one that tells much."""
    return np.sqrt(-np.clip(ratio, _FARTHEST, 0.0))


def _sorted(table: sparse.csr_array) -> sparse.csr_array:
    """The same with the columns of each row in order."""
    table = table.tocsr()
    table.sort_indices()
    return table


def _at(table: sparse.csr_array, row_E: np.ndarray, column_E: np.ndarray) -> np.ndarray:
    """Values of a sparse table, sorted, at given places, [E]; 0 where it holds none."""
    rows, inverse_E = np.unique(row_E, return_inverse=True)
    some, width = table[rows], table.shape[1]
    held = np.repeat(np.arange(len(rows)), np.diff(some.indptr)) * width + some.indices
    if not len(held):
        return np.zeros(len(row_E))
    asked_E = inverse_E * width + column_E
    at_E = np.minimum(np.searchsorted(held, asked_E), len(held) - 1)
    return np.where(held[at_E] == asked_E, some.data[at_E], 0.0)


def _says(texts: Sequence[str]) -> tuple[list[str], sparse.csr_array]:
    """Stems of content words, and which captions say each, sparse [C, W] of ones."""
    from scipy import sparse

    number_of: dict[str, int] = {}
    numbers, ends = array("i"), array("q", [0])
    for text in texts:
        # In an order that does not change from process to process, as that of a set would.
        numbers.extend([number_of.setdefault(word, len(number_of)) for word in sorted(words_of(text))])
        ends.append(len(numbers))
    number = np.frombuffer(numbers, np.int32)
    said_in = np.bincount(number, minlength=len(number_of)).tolist()
    content = content_words(dict(zip(number_of, said_in, strict=True)), len(texts))
    place_of: dict[str, int] = {}
    stem_of = np.array(
        [place_of.setdefault(_stem(word), len(place_of)) if word in content else -1 for word in number_of],
        np.int32,
    )
    stem = stem_of[number]
    kept = stem >= 0
    starts = np.concatenate([[0], np.cumsum(kept)])[np.frombuffer(ends, np.int64)]
    shape = len(texts), max(1, len(place_of))
    says = sparse.csr_array((np.ones(kept.sum(), np.float32), stem[kept], starts), shape=shape)
    says.sum_duplicates()
    says.data[:] = 1  # a word and its plural are one
    return list(place_of), says


def _stem(word: str) -> str:
    """A word without the s of a plural, as English and the Romance languages form most of them.

    Example:
        >>> [_stem(word) for word in ("trees", "grass", "bus")]
        ['tree', 'grass', 'bus']
    """
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] not in "sui" else word


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
