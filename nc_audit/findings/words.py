"""Single words that their images do not look like: said of an image, and hardly to be seen there.

For each word a linear map of the image embeddings tells how much an image looks like those it is said of, learnt
without the image's own fold. Where an image lies much deeper among those a word is not said of, and no other caption
of the image says it, the word is named. Words, unlike whole captions, have no known mismatches to calibrate on: a
finding is a place to look at, not a probability.

Shapes: I = distinct images; C = distinct captions; P = distinct pairs; W = words; S = entries of a sparse [I, W], one
for each image and word said of it; K = directions of the embeddings, and a constant; F = folds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nc_audit.findings.found import Found, Vectors
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


def unlikely_words(found: Found, vectors: Vectors, captions: Sequence[str | None]) -> None:
    """The word of a likely right pair that its image looks least like, where it hardly does at all.

    Args:
        found: takes what is found.
        vectors: what is audited.
        captions: caption of each row, [N].
    """
    from scipy import sparse

    rows = np.flatnonzero(vectors.row_image >= 0)
    num_images, num_captions = len(vectors.image_embedding), len(vectors.caption)
    if num_images < FEWEST_IMAGES or not len(rows):
        return
    texts = [""] * num_captions
    for row in rows.tolist():
        texts[vectors.row_caption[row]] = captions[row] or ""
    keys = vectors.row_image[rows] * num_captions + vectors.row_caption[rows]
    keys, first, pair_of_row = np.unique(keys, return_index=True, return_inverse=True)
    image_P, caption_P = np.divmod(keys, num_captions)
    right_P = 1 - np.nan_to_num(vectors.noise_probability[rows[first]], nan=1.0)
    is_right_P = right_P > 0.5
    stems, says_CW = _says(texts)

    def said(weight_P: np.ndarray) -> sparse.csr_array:
        """Summed weights, all above 0, of the pairs of each image that say each word: [I, W] of one pattern."""
        of_images = sparse.csr_array((weight_P, (image_P, caption_P)), shape=(num_images, num_captions))
        summed = (of_images @ says_CW).tocsr()
        summed.sort_indices()
        return summed

    num_said_W = np.asarray((said(np.where(is_right_P, 1.0, 1e-9)) > 0.5).sum(0)).ravel()
    chosen = np.argsort(-num_said_W, kind="stable")[:_MOST_WORDS]
    chosen = chosen[num_said_W[chosen] >= FEWEST_SAID]
    if not len(chosen):
        return
    says_CW, num_said_W, stems = says_CW[:, chosen], num_said_W[chosen], [stems[at] for at in chosen]
    share_IW = said(np.maximum(right_P, 1e-9))
    total_I = np.bincount(image_P, np.maximum(right_P, 1e-9), num_images)
    share_IW.data /= np.repeat(total_I, np.diff(share_IW.indptr))
    is_said_S = said(np.where(is_right_P, 1.0, 1e-9)).data > 0.5
    ratio_S = _log_ratios(vectors.image_embedding, np.minimum(total_I, 1.0), share_IW, is_said_S)
    num_S = said(np.ones(len(image_P))).data
    # Where a single pair says the word, the sum of the numbers of those that do is its own.
    pair_S = said(np.arange(1.0, len(image_P) + 1)).data - 1
    odd = np.flatnonzero((ratio_S <= LIMIT) & (num_S == 1) & is_said_S)
    told: dict[int, str] = {}
    for at in odd[np.argsort(ratio_S[odd], kind="stable")].tolist():
        pair, word = int(pair_S[at]), int(share_IW.indices[at])
        if pair not in told:
            shown = min(one for one in words_of(texts[caption_P[pair]]) if _stem(one) == stems[word])
            shown = shown if len(shown) <= _MOST_SHOWN else shown[: _MOST_SHOWN - 1] + "…"
            others = num_said_W[word] - 1
            told[pair] = f'unlikely word: "{shown}", said of {others:,} images that look unlike this one'
    for row, pair in zip(rows.tolist(), pair_of_row.tolist(), strict=True):
        if pair in told:
            found.add("unlikely_word", row, told[pair])


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
