"""Images that look the same: the closest embeddings propose, a hash of the picture confirms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nc_audit.findings.found import Found

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

WHOLE_SEARCH = 200_000
"""Up to so many images are compared all with all; beyond, each with those of its `CELLS` cells."""
CELL = 10_000  # images whose closest centre a cell's is, on average
CELLS = 3  # that an image is in
NEAR_COSINE = 0.9  # of centred embeddings; the hash decides
NEAR_BITS = 26  # of 256
HASHED = 4_000  # images decoded for their hash, at most, or this share of them:
HASHED_SHARE = 0.25
FRUITLESS = 1_000  # images hashed in a row without a near-duplicate among them: the search ends
HASH_SIZE = (272, 256)  # pixels: a picture may be decoded smaller than it is, but not below this
_DECODERS = 4  # threads, at most; more than there are processors hinder each other
_DECODED_AT_ONCE = 32
_HASH_BYTES = 32
_PROPOSED = 1_000_000  # pairs of near-identical embeddings kept, at most
_AT_ONCE = 1 << 16  # images or pairs of them at once, or fewer, so that their vectors hold at most so many
_NUMBERS = 1 << 24  # numbers
_TILE = (512, 4_096)  # images compared with images at once
_DENSE = 0.01  # share of a tile's pairs close after projection, above which their cosines are not computed one by one
_PROJECTED = 32
_SLACK = 0.15  # the projection errs by about (1 - cosine^2) / sqrt(32)


def dhash(image: Image) -> int:
    """Difference hash of an image: 256 bits, one for each step to the right that gets brighter, 16 rows of 17 cells."""
    grey = np.asarray(image.convert("L").resize((17, 16), 4), dtype=np.int16)  # 4 = box: means of cells
    bits = np.packbits((grey[:, 1:] > grey[:, :-1]).ravel())
    return int.from_bytes(bits.tobytes(), "big")


def near_duplicates(
    embedding_ID: np.ndarray, read_hash: Callable[[int], int | None], found: Found
) -> list[tuple[int, int]]:
    """Pairs of distinct images that look the same: near-identical embeddings, confirmed by their hashes.

    A random projection to 32 dimensions proposes, the whole embedding and the hash decide. The closest are compared
    first, and the search ends where it has become fruitless: an encoder that sees little proposes nearly everything.
    Memory beyond the embeddings is the projections and what they propose.

    Args:
        embedding_ID: what tells images apart, shape [I, D].
        read_hash: `dhash` of an image by its index, None where it cannot be read; asked by several threads.
        found: where searches that were capped are noted.

    Returns:
        Index pairs, the smaller first, sorted.
    """
    num = len(embedding_ID)
    if num < 2:
        return []
    left, right = _closest(_Centred.of(embedding_ID), found)
    if not len(left):
        return []
    # How many images the pairs up to each one ask for, the closest pair first.
    first_I = np.full(num, len(left))
    for side in (left, right):
        np.minimum.at(first_I, side, np.arange(len(left)))
    num_asked = np.bincount(first_I, minlength=len(left))[: len(left)].cumsum()
    num_pairs = int(np.searchsorted(num_asked, max(HASHED, int(HASHED_SHARE * num)), side="right"))
    hashes = _Hashes.none(num)
    confirmed: list[tuple[int, int]] = []
    start, before = 0, 0
    with ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1)) as threads:
        while start < num_pairs:
            enough = int(np.searchsorted(num_asked, before + FRUITLESS, side="right"))
            part = slice(start, min(num_pairs, enough))
            start, before = part.stop, int(num_asked[part.stop - 1])
            hashes.read(np.unique(np.stack([left[part], right[part]])), read_hash, threads)
            more = hashes.alike(left[part], right[part])
            confirmed += more
            if not more:
                break
    if start < len(left):
        told = f"near-duplicate images: the closest {before:,} images were compared by hash"
        found.capped.append(told + (", the last of them in vain" if start < num_pairs else ""))
    return sorted(confirmed)


@dataclass(frozen=True)
class _Hashes:
    """Hashes of images, [I, 32] bytes, as far as asked for; and bool [I] whether one was, and could be read."""

    bytes_IB: np.ndarray
    is_asked_I: np.ndarray
    is_read_I: np.ndarray

    @classmethod
    def none(cls, num: int) -> _Hashes:
        """Of so many images, none is read."""
        return cls(np.zeros((num, _HASH_BYTES), np.uint8), np.zeros(num, bool), np.zeros(num, bool))

    def read(
        self, images: np.ndarray, read_hash: Callable[[int], int | None], threads: ThreadPoolExecutor
    ) -> None:
        """Read those of some images that were not asked for yet."""
        new = images[~self.is_asked_I[images]]
        self.is_asked_I[new] = True
        parts = [new[at : at + _DECODED_AT_ONCE].tolist() for at in range(0, len(new), _DECODED_AT_ONCE)]
        for part in threads.map(lambda some: [(one, read_hash(one)) for one in some], parts):
            for one, seen in part:
                if seen is not None:
                    self.bytes_IB[one] = np.frombuffer(seen.to_bytes(_HASH_BYTES, "big"), np.uint8)
                    self.is_read_I[one] = True

    def alike(self, left: np.ndarray, right: np.ndarray) -> list[tuple[int, int]]:
        """The pairs of images whose hashes confirm that they look the same."""
        confirmed: list[tuple[int, int]] = []
        for start in range(0, len(left), _AT_ONCE):
            some, others = left[start : start + _AT_ONCE], right[start : start + _AT_ONCE]
            differing = np.bitwise_count(self.bytes_IB[some] ^ self.bytes_IB[others]).sum(1, dtype=np.int64)
            alike = self.is_read_I[some] & self.is_read_I[others] & (differing <= NEAR_BITS)
            confirmed += zip(some[alike].tolist(), others[alike].tolist(), strict=True)
        return confirmed


def _closest(vectors: _Centred, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Indices, the smaller first, of all pairs with near-identical embeddings, the closest first.

    Of very many, as an encoder proposes that sees little, the closest are kept.
    """
    kept = _Kept()
    _close(vectors, kept, found)
    cosine, left, right = kept.together()
    if kept.is_capped or len(left) > _PROPOSED:
        found.capped.append(
            f"near-duplicate images: more than {_PROPOSED:,} pairs look alike to the encoder; the closest were compared"
        )
    order = _by_closeness(cosine, left * len(vectors.embedding_ID) + right)[:_PROPOSED]
    return left[order], right[order]


def _by_closeness(cosine: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """Order of cosines above 0, to seven digits, from the highest on; of equal ones the smaller pair's number first.

    Cosines and places in one integer each, which are sorted several times as fast as by two keys: the bits of floats
    above 0 are in their order.
    """
    by_pair = np.argsort(pair)
    falling = ~cosine[by_pair].astype(np.float32).view(np.uint32)
    keys = falling.astype(np.uint64) << 32 | np.arange(len(pair), dtype=np.uint64)
    return by_pair[(np.sort(keys) & 0xFFFFFFFF).astype(np.int64)]


@dataclass
class _Kept:
    """The closest pairs so far, their cosines and both indices, in parts.

    Attributes:
        least: cosine that a pair needs to be kept; grows where there are very many.
    """

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    num: int = 0
    least: float = NEAR_COSINE
    is_capped: bool = False

    def add(self, cosine: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
        """Keep those of more pairs that are close enough."""
        near = cosine >= self.least
        self.parts.append(
            (cosine[near], np.minimum(one[near], other[near]), np.maximum(one[near], other[near]))
        )
        self.num += int(near.sum())
        if self.num > 2 * _PROPOSED:
            cosine, left, right = self.together()
            self.least, self.is_capped = float(np.partition(cosine, -_PROPOSED)[-_PROPOSED]), True
            near = cosine >= self.least
            self.parts, self.num = [(cosine[near], left[near], right[near])], int(near.sum())

    def together(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosines and indices of all that is kept, the smaller index first."""
        nothing = np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        cosine, left, right = (np.concatenate(some) for some in zip(nothing, *self.parts, strict=True))
        return cosine, left, right


@dataclass(frozen=True)
class _Centred:
    """Embeddings minus their mean, of length one, worked out as they are asked for; and their projections.

    Attributes:
        embedding_ID: as given.
        mean_D: their mean.
        length_I: their distances from it.
        small_IP: projections of the centred ones, of length one, P = 32.
    """

    embedding_ID: np.ndarray
    mean_D: np.ndarray
    length_I: np.ndarray
    small_IP: Tensor

    @classmethod
    def of(cls, embedding_ID: np.ndarray) -> _Centred:
        """Those of some embeddings, a part at a time."""
        import torch

        num, dims = embedding_ID.shape
        at_once = _at_once(dims)
        parts = range(0, num, at_once)
        mean = sum(embedding_ID[at : at + at_once].sum(0, dtype=np.float64) for at in parts) / num
        draw = np.random.default_rng(0).normal(size=(dims, _PROJECTED)).astype(np.float32)
        one = cls(
            embedding_ID, mean.astype(np.float32), np.ones(num, np.float32), torch.empty(num, _PROJECTED)
        )
        for at in parts:
            some = one.rows(slice(at, at + at_once))
            one.length_I[at : at + at_once] = np.maximum(np.linalg.norm(some, axis=1), 1e-9)
            small = torch.from_numpy(some @ draw)
            one.small_IP[at : at + at_once] = small / small.norm(dim=1, keepdim=True).clamp_min(1e-9)
        return one

    def rows(self, at: np.ndarray | slice) -> np.ndarray:
        """Some of the centred embeddings, shape [len(at), D]."""
        return (self.embedding_ID[at] - self.mean_D) / self.length_I[at][:, None]


def _at_once(dims: int) -> int:
    """How many vectors of so many dimensions are worked on at once."""
    return max(1, min(_AT_ONCE, _NUMBERS // dims))


def _close(vectors: _Centred, kept: _Kept, found: Found) -> None:
    """Keep the pairs of images with near-identical embeddings, each once."""
    num = len(vectors.embedding_ID)
    if num <= WHOLE_SEARCH:
        for pairs in _close_within(vectors, np.arange(num), kept):
            kept.add(*pairs)
        return
    found.capped.append(
        f"near-duplicate images: {num:,} images, each compared with those of the {CELLS} cells that it is next to"
    )
    cells, members = _cells(vectors.small_IP)
    for cell, some in enumerate(members):
        for cosine, left, right in _close_within(vectors, some, kept):
            # a pair that shares several cells counts in the first
            shared = np.where(
                (cells[left][:, :, None] == cells[right][:, None, :]).any(2), cells[left], len(members)
            )
            first = shared.min(1) == cell
            kept.add(cosine[first], left[first], right[first])


def _cells(small_IP: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """The cells of each image, those of the centres it is closest to, shape [I, CELLS]; and the images of each cell.

    Centres are images drawn at random.
    """
    import torch

    num = len(small_IP)
    num_cells = max(CELLS, num // CELL)
    chosen = torch.from_numpy(np.random.default_rng(0).choice(num, num_cells, replace=False))
    centres = small_IP[chosen].T.contiguous()
    cells = torch.cat([(part @ centres).topk(CELLS).indices for part in small_IP.split(_AT_ONCE)]).numpy()
    order = cells.ravel().argsort(kind="stable")
    borders = np.searchsorted(cells.ravel()[order], np.arange(num_cells + 1))
    return cells, [order[low:high] // CELLS for low, high in pairwise(borders.tolist())]


def _close_within(
    vectors: _Centred, index: np.ndarray, kept: _Kept
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cosines and indices of close pairs among some images, a part at a time, as close as `kept` asks by then.

    Args:
        vectors: of all images.
        index: which images, ascending.
        kept: its `least` is looked at for every part.
    """
    import torch

    is_all = len(index) == len(vectors.small_IP)
    small = vectors.small_IP if is_all else vectors.small_IP[torch.from_numpy(index)]
    rows_at_once, columns_at_once = _TILE
    cosines = torch.empty(_TILE)
    is_held, held = len(index) * vectors.embedding_ID.shape[1] <= _NUMBERS, list[np.ndarray]()

    def rows(at: slice) -> np.ndarray:
        if not is_held:
            return vectors.rows(index[at])
        if not held:
            held.append(vectors.rows(index))
        return held[0][at]

    for start in range(0, len(index), rows_at_once):
        mine = small[start : start + rows_at_once]
        whole: np.ndarray | None = None
        for begin in range(start, len(index), columns_at_once):
            theirs, limit = small[begin : begin + columns_at_once], kept.least - _SLACK
            # torch lays the product out anew where the tile is not whole
            cosine = (
                torch.mm(mine, theirs.T, out=cosines)
                if (len(mine), len(theirs)) == _TILE
                else mine @ theirs.T
            )
            hot = (cosine.amax(1) >= limit).nonzero()[:, 0]
            if not len(hot):
                continue
            is_near = cosine[hot] >= limit
            if int(is_near.count_nonzero()) > _DENSE * len(mine) * len(theirs):
                if whole is None:
                    whole = rows(slice(start, start + rows_at_once))
                exact = whole @ rows(slice(begin, begin + columns_at_once)).T
                at_row, at_column = np.divmod(np.flatnonzero(exact >= kept.least), len(theirs))
                later = at_column + begin > at_row + start
                at_row, at_column = at_row[later], at_column[later]
                yield exact[at_row, at_column], index[at_row + start], index[at_column + begin]
                continue
            at_row, at_column = (one.numpy() for one in is_near.nonzero(as_tuple=True))
            left, right = hot.numpy()[at_row] + start, at_column + begin
            left, right = index[left[right > left]], index[right[right > left]]
            at_once = _at_once(vectors.embedding_ID.shape[1])
            for some in range(0, len(left), at_once):
                a, b = left[some : some + at_once], right[some : some + at_once]
                yield np.einsum("nd,nd->n", vectors.rows(a), vectors.rows(b)), a, b
