"""Known noise for a bench: captions of clean pairs moved or changed by a stated rule, with the truth about every row.

The kinds are not interchangeable, and figures of one are not to be compared with figures of another:

    caption    rows are chosen and exchange their captions; images keep most of their captions
    image      images are chosen and exchange all their captions, however many, so that those of an image agree
    donor      chosen rows copy the caption of a random other row, which keeps its own
    class      as caption, within the image's class: the hardest kind, many such captions nearly fit
    block      one run of rows, in the order given, has its captions shifted by a constant, as by a join that slipped
    truncated  captions of chosen rows lose their end: half of the words or more
    mixture    half of the rate by image, half by caption on rows of other images
    word       one content word of chosen rows' captions becomes another of the set that no caption of the image has

The truth is worked out anew after the fact: a row is noisy when its caption is none of its image's own captions as
they were. A truncated caption is noisy by that rule too, though it may describe its image, if poorly, and so is one
whose new word happens to be true of the image: report these kinds by themselves, and no rate of mismatches from them.

Shapes: N = rows; I = images; K = chosen rows or images.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nc_audit.bench.words import WrongWords
from nc_audit.dataset import normalise_caption
from nc_audit.errors import RecipeError, nearest
from nc_audit.words import words_of

KINDS = ("caption", "image", "donor", "class", "block", "truncated", "mixture", "word")
RULES = {"image": 2, "mixture": 2}
"""Version of a kind's rule, where it is not the first: figures of different rules are not of the same noise."""
MAX_RATE = 0.95

_WORD = re.compile(r"\S*[^\W_]\S*")
_MOST_TRIES = 1000  # other places or donors looked at for one row that would keep a caption of its own image


@dataclass(frozen=True)
class Injected:
    """Captions after injection, and what is known about them.

    Attributes:
        captions: one per row, N of them.
        image_N: image of each row, int64 [N]; the given one unless whole images exchanged their captions.
        known_noise: bool [N], True where the caption is none of the image's own original captions. Its mean is the
            realised rate.
        changed: bool [N], True where the row's image or caption, to the letter, is not the original one; every noisy
            row is.
        donor: int64 [N], row whose original caption this row carries, whole or changed; its own where nothing moved.
    """

    captions: list[str]
    image_N: np.ndarray
    known_noise: np.ndarray
    changed: np.ndarray
    donor: np.ndarray


def fold_rows(images: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """Rows that are left when repeated captions of an image count once.

    Args:
        images: image index of each row, N of them.
        captions: caption of each row; equal when they normalise equally.

    Returns:
        Positions of the first of each, ascending, int64.

    Example:
        >>> fold_rows([0, 0, 1], ["A tree.", "a tree", "a tree"]).tolist()
        [0, 2]
    """
    first: dict[tuple[int, str], int] = {}
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        first.setdefault((image, normalise_caption(caption)), row)
    return np.array(sorted(first.values()), dtype=np.int64)


def inject(
    images: Sequence[int],
    captions: Sequence[str],
    kind: str,
    rate: float,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Injected:
    """Put noise of one kind into clean pairs; the same arguments give the same result.

    A row that would receive a caption of its own image exchanges with another where it can, so that the realised
    rate meets the rate asked for; where it cannot, it stays clean and the truth says so. At one seed, rows chosen at
    a lower rate are chosen at a higher one too (`image`, `block` and `mixture` aside).

    Args:
        images: image index of each row, 0..I-1, N of them; repeated captions of an image folded (`fold_rows`).
        captions: caption of each row.
        kind: one of `KINDS`.
        rate: share of the rows that is chosen (`image`: of the images), 0..0.95.
        seed: of everything drawn.
        classes: class of each image, I of them, for kind `class`; a negative one means none, and its rows are left.

    Raises:
        RecipeError: the kind is unknown, the rate out of range, or the classes are missing or of the wrong number.
    """
    if kind not in KINDS:
        raise RecipeError(f"unknown kind of noise {kind!r}", nearest(kind, KINDS))
    if not 0 <= rate <= MAX_RATE:
        raise RecipeError(
            f"a noise rate must lie between 0 and {MAX_RATE}, got {rate}",
            "0.2, 0.4, 0.6 and 0.8 are usual; 0 is the control",
        )
    if len(images) != len(captions):
        raise RecipeError(
            f"{len(images):,} image indices do not match {len(captions):,} captions",
            "give one of each per row",
        )
    rows = _Rows(
        np.asarray(images, dtype=np.int64), captions, np.random.default_rng([seed, KINDS.index(kind)])
    )
    num_chosen = round(rate * len(captions))
    new = list(captions)
    donor = np.arange(len(captions))
    if kind == "caption":
        rows.exchange(donor, rows.random_order()[:num_chosen])
    elif kind == "image":
        rows.exchange_images(rate)
    elif kind == "donor":
        rows.copy(donor, rows.random_order()[:num_chosen])
    elif kind == "class":
        rows.exchange_within(donor, rows.class_of_rows(classes), num_chosen)
    elif kind == "block":
        rows.shift(donor, num_chosen)
    elif kind == "mixture":
        hit = rows.exchange_images(rate / 2)
        spared = rows.random_order()
        rows.exchange(donor, spared[~hit[spared]][: num_chosen - round(rate / 2 * len(captions))])
    for row in np.flatnonzero(donor != np.arange(len(donor))).tolist():
        new[row] = captions[donor[row]]
    if kind == "truncated":
        for row in rows.random_order()[:num_chosen].tolist():
            new[row] = _cut(captions[row], rows.rng.uniform(0.25, 0.5))
    elif kind == "word":
        new = rows.misword(captions, num_chosen)
    return Injected(
        new,
        rows.image_N,
        np.array([not rows.is_own(row, caption) for row, caption in enumerate(new)], dtype=bool),
        np.array([one != other for one, other in zip(new, captions, strict=True)], dtype=bool)
        | (rows.image_N != np.asarray(images)),
        donor,
    )


class _Rows:
    """The clean rows, which captions are whose, and the draws; methods write into `donor` [N], the source of rows."""

    def __init__(self, image_N: np.ndarray, captions: Sequence[str], rng: np.random.Generator) -> None:
        self.image_N, self.rng = image_N, rng
        self.normalised = [normalise_caption(caption) for caption in captions]
        self.own = set(zip(image_N.tolist(), self.normalised, strict=True))

    def random_order(self) -> np.ndarray:
        return self.rng.permutation(len(self.image_N))

    def is_own(self, row: int, caption: str) -> bool:
        """Whether a caption is one that the row's image had."""
        return (int(self.image_N[row]), normalise_caption(caption)) in self.own

    def keeps(self, row: int, donor: int) -> bool:
        """Whether the row would stay clean with the donor's caption."""
        return (int(self.image_N[row]), self.normalised[donor]) in self.own

    def exchange(self, donor: np.ndarray, chosen: np.ndarray) -> None:
        donor[chosen] = chosen[
            _deranged(len(chosen), lambda i, j: self.keeps(chosen[i], chosen[j]), self.rng)
        ]

    def exchange_within(self, donor: np.ndarray, class_N: np.ndarray, num_chosen: int) -> None:
        order = self.random_order()
        chosen = order[class_N[order] >= 0][:num_chosen]
        for one in np.unique(class_N[chosen]):
            self.exchange(donor, chosen[class_N[chosen] == one])

    def copy(self, donor: np.ndarray, chosen: np.ndarray) -> None:
        for row in chosen.tolist():
            for _ in range(_MOST_TRIES):
                other = int(self.rng.integers(len(donor)))
                if not self.keeps(row, other):
                    donor[row] = other
                    break

    def shift(self, donor: np.ndarray, length: int) -> None:
        """A block of the length goes round by an offset that passes an image's own captions in either direction."""
        if length < 2:
            return
        start = int(self.rng.integers(len(donor) - length + 1))
        block = np.arange(start, start + length)
        most = max(Counter(self.image_N[block].tolist()).values())
        low, high = (most, length - most) if 2 * most <= length else (1, length - 1)
        donor[block] = np.roll(block, -int(self.rng.integers(low, high + 1)))

    def misword(self, captions: Sequence[str], num_chosen: int) -> list[str]:
        """Captions of which the chosen number has one wrong word; rows without a content word are passed over."""
        words, new = WrongWords(captions), list(captions)
        known: defaultdict[int, set[str]] = defaultdict(set)
        for image, caption in zip(self.image_N.tolist(), captions, strict=True):
            known[image] |= words_of(caption)
        for row in self.random_order().tolist():
            if not num_chosen:
                break
            changed = words.put_one(captions[row], known[int(self.image_N[row])], self.rng)
            if changed is not None:
                new[row] = changed
                num_chosen -= 1
        return new

    def exchange_images(self, rate: float) -> np.ndarray:
        """Chosen images exchange their captions, whole sets of any size; which rows that moved, bool [N].

        It is the rows' images that change. Were images to trade with those of as many captions only, wrong captions
        would come from images of like classes, and be harder to tell than whole-image noise is.
        """
        rows_of: defaultdict[int, list[int]] = defaultdict(list)
        for row, image in enumerate(self.image_N.tolist()):
            rows_of[image].append(row)
        images = sorted(rows_of)
        chosen = [
            images[at] for at in self.rng.permutation(len(images))[: round(rate * len(images))].tolist()
        ]
        own = [{self.normalised[row] for row in rows_of[image]} for image in chosen]
        moved = _deranged(len(chosen), partial(_overlap, own), self.rng)
        image_N = self.image_N.copy()
        for image, other in zip(chosen, moved.tolist(), strict=True):
            image_N[rows_of[chosen[other]]] = image
        hit = image_N != self.image_N
        self.image_N = image_N
        return hit

    def class_of_rows(self, classes: Sequence[int] | None) -> np.ndarray:
        if classes is None:
            raise RecipeError(
                "noise of kind class needs the class of each image", "give classes, or clusters for them"
            )
        num_images = int(self.image_N.max(initial=-1)) + 1
        if len(classes) != num_images:
            raise RecipeError(
                f"{len(classes):,} classes do not match {num_images:,} images",
                "give one per image, not per row",
            )
        return np.asarray(classes, dtype=np.int64)[self.image_N]


def _overlap(sets: Sequence[set[str]], one: int, other: int) -> bool:
    return bool(sets[one] & sets[other])


def _deranged(num: int, keeps: Callable[[int, int], bool], rng: np.random.Generator) -> np.ndarray:
    """A random order of `num` things in which place i holds no j with keeps(i, j), as far as exchanges can reach.

    Where two places would be mended by exchanging what they hold, they do; a place that no exchange mends stays.
    """
    order = rng.permutation(num)
    for _ in range(3):
        bad = [place for place in range(num) if keeps(place, int(order[place]))]
        for place in bad:
            if not keeps(place, int(order[place])):
                continue  # mended by an exchange before
            for other in rng.permutation(num)[:_MOST_TRIES].tolist():
                if not (keeps(place, int(order[other])) or keeps(other, int(order[place]))):
                    order[[place, other]] = order[[other, place]]
                    break
    return order


def _cut(caption: str, share: float) -> str:
    """The beginning of a caption: about a share of its words, at least one; of a single word, of its characters."""
    words = list(_WORD.finditer(caption))
    ends = [word.end() for word in words]
    if len(words) == 1:
        ends = list(range(words[0].start() + 1, words[0].end() + 1))
    return caption[: ends[max(1, int(share * len(ends))) - 1]] if ends else caption
