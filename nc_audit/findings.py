"""What is wrong with a dataset beyond single captions that do not fit: duplicates, leakage, copies, shifted blocks.

Pure functions on the pairs table and vectors; the score stage calls `find_all` and keeps its table. Rows are named
by position in the input. Searches that grow faster than linearly are capped, and the result says which were.

Shapes: N = rows; I = distinct images; C = distinct captions; P = distinct pairs; D = dimensions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nc_audit.schema import FINDING_KINDS, FINDINGS

if TYPE_CHECKING:
    from PIL.Image import Image

WHOLE_SEARCH = 30_000
"""Up to so many images are compared all with all; beyond, each with those next to it along one direction."""
WINDOW = 256
NEAR_COSINE = 0.9  # of centred embeddings; the hash decides
NEAR_BITS = 26  # of 256
HASHED = 4_000  # images decoded for their hash, at most
_HASH_BYTES = 32
_PROPOSED = 1_000_000  # pairs of near-identical embeddings kept, at most
_AT_ONCE = 1 << 16  # pairs compared at once
_FEW = 50  # images close to one after projection, up to which cosines are computed one by one
PLACEHOLDER = 10  # captions at least
COPIED = 10  # images at least
REMATCHED = 20_000  # displaced images or captions searched, at most
SHIFTS = 10
MAX_REMATCH_PROBABILITY = 0.95

_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE = re.compile(
    r"\S*\.(?:jpe?g|png|gif|tiff?|webp|bmp|avif|svg|pdf|txt)|(?:img|dsc|dscn|image|photo)[_-]?\d+",
    re.IGNORECASE,
)
FEW_LANGUAGES = 20  # captions of a known language at least, to say which one is usual
_SMALL_WORDS = {
    name: frozenset(words.split())
    for name, words in {
        "English": "a an the and with of is are in on at there this that by from its to near next two some many",
        "German": "der die das dem den des ein eine einem einer einen und mit ist sind in im auf von neben zwei viele",
        "French": "le la les un une des du de et avec est sont dans sur au aux en près deux plusieurs qui il",
        "Spanish": "el la los las un una unos unas de del y con es son está están en sobre junto al hay dos muchos",
        "Italian": "il lo la gli le un una di del della dei e con è sono nel nella in su sul sulla al due molti che",
        "Portuguese": "o a os as um uma de do da dos das e com é são está em no na sobre ao dois muitos que",
        "Dutch": "de het een van en met is zijn in op bij naast aan voor twee veel er",
    }.items()
}
_UNSPACED = {"CJK", "THAI", "LAO", "KHMER", "MYANMAR"}
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HALFWIDTH": "CJK", "FULLWIDTH": "LATIN"}


@dataclass
class Found:
    """Findings as they come in, and notes on searches that were capped."""

    rows: list[tuple[int, str, int | None, str, float | None]] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)

    def add(
        self, kind: str, row: int, detail: str, partner: int | None = None, probability: float | None = None
    ) -> None:
        """One finding about one row."""
        self.rows.append((int(row), kind, None if partner is None else int(partner), detail, probability))

    def table(self, pairs: pa.Table) -> pa.Table:
        """The `findings` table, by kind in the order of `schema.FINDING_KINDS`, then by row."""
        order = {kind: at for at, kind in enumerate(FINDING_KINDS)}
        rows = sorted(self.rows, key=lambda one: (order[one[1]], one[0], one[2] or -1, one[3]))
        row = pa.array([one[0] for one in rows], pa.int64())
        return pa.table(
            [
                pairs["pair_id"].take(row),
                row,
                pa.array([one[1] for one in rows], pa.string()),
                pa.array([one[2] for one in rows], pa.int64()),
                pa.array([one[3] for one in rows], pa.string()),
                pa.array([FINDING_KINDS[one[1]][0] for one in rows], pa.string()),
                pa.array([one[4] for one in rows], pa.float32()),
            ],
            schema=FINDINGS,
        )


@dataclass(frozen=True)
class Vectors:
    """What the searches see; rows of `row_image` and `row_caption` (shape [N]) are -1 where a row is not ok.

    `image_embedding` [I, D] tells images apart; `image` [I, D] and `caption` [C, D] are unit vectors of the heads;
    `noise_probability` [N], not a number where a row is not ok.
    """

    row_image: np.ndarray
    row_caption: np.ndarray
    image_embedding: np.ndarray
    image: np.ndarray
    caption: np.ndarray
    noise_probability: np.ndarray


def find_all(
    pairs: pa.Table,
    vectors: Vectors,
    image_rank: np.ndarray,
    read_hash: Callable[[int], int | None],
    is_cut: Sequence[bool] = (),
) -> Found:
    """Every finding about a dataset.

    Args:
        pairs: the `pairs` table.
        vectors: embeddings and head vectors of what is audited.
        image_rank: rank of each row's image among all for its caption, 1 = best, shape [N]; 0 where not ok.
        read_hash: `dhash` of a distinct image by its index, None where it cannot be read.
        is_cut: of each distinct caption whether the encoder reads only its beginning, [C]; empty: of none.
    """
    found = Found()
    names = pairs["image"].to_pylist()
    splits = pairs["split"].to_pylist()
    near = near_duplicates(vectors.image_embedding, read_hash, found)
    duplicates(found, vectors, names, splits, near)
    crowded(found, vectors)
    written(found, pairs)
    for row, caption in enumerate(vectors.row_caption.tolist()):
        if is_cut and caption >= 0 and is_cut[caption]:
            found.add("cut_caption", row, "caption is longer than the encoder reads")
    generic(found, vectors, image_rank)
    own_disagreement(found, vectors)
    shifted = block_shifts(found, vectors, pairs["source"].to_pylist())
    rematches(found, vectors, shifted)
    return found


# --- images


def dhash(image: Image) -> int:
    """Difference hash of an image: 256 bits, one for each step to the right that gets brighter, 16 rows of 17 cells."""
    grey = np.asarray(image.convert("L").resize((17, 16), 4), dtype=np.int16)  # 4 = box: means of cells
    bits = np.packbits((grey[:, 1:] > grey[:, :-1]).ravel())
    return int.from_bytes(bits.tobytes(), "big")


def near_duplicates(
    embedding_ID: np.ndarray, read_hash: Callable[[int], int | None], found: Found
) -> list[tuple[int, int]]:
    """Pairs of distinct images that look the same: near-identical embeddings, confirmed by their hashes.

    A random projection to 32 dimensions proposes, the whole embedding and the hash decide.

    Returns:
        Index pairs, the smaller first, sorted.
    """
    num = len(embedding_ID)
    if num < 2:
        return []
    centred = np.array(embedding_ID, dtype=np.float32)
    centred -= centred.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    draw = np.random.default_rng(0).normal(size=(centred.shape[1], 32)).astype(np.float32)
    small = centred @ draw
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-9)
    left, right = _closest(centred, small, found)
    if not len(left):
        return []
    # Images in the order in which the pairs, the closest first, ask for them.
    asked, first = np.unique(np.stack([left, right], 1), return_index=True)
    num_asked = np.bincount(first // 2, minlength=len(left)).cumsum()
    within = num_asked <= HASHED
    if not within.all():
        found.capped.append(f"near-duplicate images: the closest {HASHED:,} images were compared by hash")
        left, right = left[within], right[within]
        asked = np.unique(np.stack([left, right], 1))
    hashes = np.zeros((num, _HASH_BYTES), np.uint8)
    is_read = np.zeros(num, bool)
    for one in asked.tolist():
        seen = read_hash(one)
        if seen is not None:
            hashes[one] = np.frombuffer(seen.to_bytes(_HASH_BYTES, "big"), np.uint8)
            is_read[one] = True
    confirmed: list[tuple[int, int]] = []
    for start in range(0, len(left), _AT_ONCE):
        some, others = left[start : start + _AT_ONCE], right[start : start + _AT_ONCE]
        differing = np.bitwise_count(hashes[some] ^ hashes[others]).sum(1, dtype=np.int64)
        alike = is_read[some] & is_read[others] & (differing <= NEAR_BITS)
        confirmed += zip(some[alike].tolist(), others[alike].tolist(), strict=True)
    return sorted(confirmed)


def _closest(centred: np.ndarray, small: np.ndarray, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Indices, the smaller first, of all pairs with near-identical embeddings, the closest first.

    Of very many, as an encoder proposes that sees little, the closest are kept.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_kept, least, is_capped = 0, NEAR_COSINE, False
    for alike, one, other in _close(centred, small, found):
        near = alike >= least
        kept.append((alike[near], np.minimum(one[near], other[near]), np.maximum(one[near], other[near])))
        num_kept += len(kept[-1][0])
        if num_kept > 2 * _PROPOSED:
            cosine, left, right = (np.concatenate(some) for some in zip(*kept, strict=True))
            least, is_capped = np.partition(cosine, -_PROPOSED)[-_PROPOSED], True
            near = cosine >= least
            kept, num_kept = [(cosine[near], left[near], right[near])], int(near.sum())
    if not kept:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing
    if is_capped or num_kept > _PROPOSED:
        found.capped.append(
            f"near-duplicate images: more than {_PROPOSED:,} pairs look alike to the encoder; the closest were compared"
        )
    cosine, left, right = (np.concatenate(some) for some in zip(*kept, strict=True))
    order = np.lexsort((right, left, -cosine))[:_PROPOSED]
    return left[order], right[order]


def _close(
    centred: np.ndarray, small: np.ndarray, found: Found
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cosines and indices of pairs of rows that are close after projection, a part at a time; each pair once."""
    limit = NEAR_COSINE - 0.15  # the projection errs by about (1 - cosine^2) / sqrt(32)
    num = len(centred)

    def cosines(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(left), _AT_ONCE):
            a, b = left[start : start + _AT_ONCE], right[start : start + _AT_ONCE]
            yield np.einsum("nd,nd->n", centred[a], centred[b]), a, b

    if num <= WHOLE_SEARCH:
        for start in range(0, num, 1024):
            rows = slice(start, start + 1024)
            is_close = small[rows] @ small[start:].T >= limit
            if np.count_nonzero(is_close) <= _FEW * len(is_close):
                left, right = np.nonzero(is_close)
                keep = right > left
                yield from cosines(left[keep] + start, right[keep] + start)
                continue
            cosine = centred[rows] @ centred[start:].T  # one by one would take longer
            left, right = np.nonzero(cosine >= NEAR_COSINE)
            keep = right > left
            left, right = left[keep], right[keep]
            yield cosine[left, right], left + start, right + start
        return
    found.capped.append(
        f"near-duplicate images: {num:,} images, each compared with the {2 * WINDOW:,} most alike along one direction"
    )
    order = np.argsort(small[:, 0], kind="stable")
    for step in range(1, WINDOW + 1):
        left, right = order[:-step], order[step:]
        keep = (small[left] * small[right]).sum(1) >= limit
        yield from cosines(left[keep], right[keep])


def _rows_of(index_N: np.ndarray, num: int) -> list[np.ndarray]:
    """Rows of each index 0..num-1, ascending; -1 is nobody's."""
    order = np.argsort(index_N, kind="stable")
    borders = np.searchsorted(index_N[order], np.arange(num + 1))
    return [order[low:high] for low, high in pairwise(borders.tolist())]


def duplicates(
    found: Found,
    vectors: Vectors,
    names: Sequence[str | None],
    splits: Sequence[str | None],
    near: Sequence[tuple[int, int]],
) -> None:
    """Equal and near-equal images under other names, across splits, and with captions that disagree."""
    rows_of = _rows_of(vectors.row_image, len(vectors.image))
    usual = _usual_agreement(vectors)

    def leak(row: int, other: int, how: str) -> None:
        found.add(
            "leakage",
            row,
            f"{how} {names[other]} (row {other:,}), which is in split {splits[other]}, this row in {splits[row]}",
            other,
        )

    for rows in rows_of:
        first_by_name: dict[str | None, int] = {}
        first_by_split: dict[str | None, int] = {}
        for row in rows.tolist():
            first_by_name.setdefault(names[row], row)
            if splits[row]:
                first_by_split.setdefault(splits[row], row)
        if len(first_by_name) > 1:
            first = int(rows[0])
            for row in rows.tolist():
                if names[row] != names[first]:
                    found.add("duplicate_image", row, f"image equals {names[first]} (row {first:,})", first)
            groups = [rows[[names[r] == name for r in rows.tolist()]] for name in first_by_name]
            _contradictions(found, vectors, names, groups[0], groups[1:], usual)
        if len(first_by_split) > 1:
            firsts = list(first_by_split.values())
            for row in rows.tolist():
                other = next((one for one in firsts if splits[one] != splits[row]), None)
                if splits[row] and other is not None:
                    leak(row, other, "image equals")
    for a, b in near:
        first, second = int(rows_of[a][0]), int(rows_of[b][0])
        for rows, other in ((rows_of[a], second), (rows_of[b], first)):
            for row in rows.tolist():
                found.add(
                    "near_duplicate_image", row, f"image looks like {names[other]} (row {other:,})", other
                )
                if splits[row] and splits[other] and splits[row] != splits[other]:
                    leak(row, other, "image looks like")
        _contradictions(found, vectors, names, rows_of[a], [rows_of[b]], usual)


def _usual_agreement(vectors: Vectors) -> float:
    """Mean cosine of two captions drawn at random."""
    if len(vectors.caption) < 2:
        return -1.0
    return float(np.square(np.linalg.norm(vectors.caption.mean(0))))


def _contradictions(
    found: Found,
    vectors: Vectors,
    names: Sequence[str | None],
    rows: np.ndarray,
    others: Sequence[np.ndarray],
    usual: float,
) -> None:
    """Captions of the same picture that agree no better than any two captions of the set."""
    for other in others:
        cosine = vectors.caption[vectors.row_caption[rows]] @ vectors.caption[vectors.row_caption[other]].T
        for mine, theirs, best in ((rows, other, cosine.max(1)), (other, rows, cosine.max(0))):
            partner = int(theirs[0])
            for row in mine[best <= usual].tolist():
                found.add(
                    "contradicting_captions",
                    row,
                    f"image equals {names[partner]} (row {partner:,}), whose captions disagree",
                    partner,
                )


def crowded(found: Found, vectors: Vectors) -> None:
    """Images under unusually many captions, captions over many images."""
    is_ok = vectors.row_image >= 0
    if not is_ok.any():
        return
    distinct = np.unique(np.stack([vectors.row_image[is_ok], vectors.row_caption[is_ok]]), axis=1)
    captions_I = np.bincount(distinct[0], minlength=len(vectors.image))
    images_C = np.bincount(distinct[1], minlength=len(vectors.caption))
    many = max(PLACEHOLDER, 4 * float(np.median(captions_I[captions_I > 0])))
    rows_of = _rows_of(vectors.row_image, len(vectors.image))
    for image in np.flatnonzero(captions_I >= many).tolist():
        for row in rows_of[image].tolist():
            found.add("placeholder_image", row, f"image carries {captions_I[image]:,} different captions")
    rows_of = _rows_of(vectors.row_caption, len(vectors.caption))
    for caption in np.flatnonzero(images_C >= COPIED).tolist():
        for row in rows_of[caption].tolist():
            found.add("copied_caption", row, f"caption also on {images_C[caption] - 1:,} other images")


# --- captions


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return _ONE_SCRIPT.get(name, name)


def script_of(caption: str) -> str | None:
    """The script of most letters of a caption, as Unicode names it (LATIN, CJK, ...); None without letters.

    Example:
        >>> script_of("ein Fluß"), script_of("река"), script_of("12 !")
        ('LATIN', 'CYRILLIC', None)
    """
    if caption.isascii():
        return "LATIN" if any(map(str.isalpha, caption[:2000])) else None
    counts = Counter(_script(letter) for letter in caption[:2000] if letter.isalpha())
    return max(sorted(counts), key=lambda one: counts[one]) if counts else None


def written(found: Found, pairs: pa.Table) -> None:
    """Captions that are empty, one word, a file name or URL, or in another script or language than the rest."""
    captions, statuses = pairs["caption"].to_pylist(), pairs["status"].to_pylist()
    texts = ["" if caption is None else caption.strip() for caption in captions]
    scripts = _of_each(texts, script_of)
    for row, (text, script, status) in enumerate(zip(texts, scripts, statuses, strict=True)):
        if status in ("empty_caption", "missing_caption"):
            found.add("empty_caption", row, STATUS_WORDS[status])
        if not text:
            continue
        if _URL.fullmatch(text):
            found.add("file_name_caption", row, "caption is a URL")
        elif _FILE.fullmatch(text):
            found.add("file_name_caption", row, "caption is a file name")
        elif len(text) <= 2 if script in _UNSPACED else len(re.findall(r"\w+", text)) <= 1:
            found.add("short_caption", row, "caption is a single word")
    counts = Counter(one for one in scripts if one)
    if not counts:
        return
    usual, num = counts.most_common(1)[0]
    if num < 0.8 * sum(counts.values()):
        return
    for row, script in enumerate(scripts):
        if script and script != usual:
            found.add(
                "other_script", row, f"caption is in {script.title()}, {num:,} others are in {usual.title()}"
            )
    if usual == "LATIN":
        _other_languages(found, texts)


def _of_each(texts: Sequence[str], of: Callable[[str], str | None]) -> list[str | None]:
    """What holds of each text, found out once for equal ones."""
    known = {text: of(text) for text in set(texts)}
    return [known[text] for text in texts]


def _other_languages(found: Found, captions: Sequence[str]) -> None:
    """Captions whose small words are of another language than those of nearly all others, and none of theirs."""
    languages = _of_each(captions, language_of)
    counts = Counter(one for one in languages if one)
    if sum(counts.values()) < FEW_LANGUAGES:
        return
    usual, num = counts.most_common(1)[0]
    if num < 0.8 * sum(counts.values()):
        return
    for row, (language, caption) in enumerate(zip(languages, captions, strict=True)):
        if language and language != usual and not _SMALL_WORDS[usual].intersection(_words(caption)):
            found.add("other_script", row, f"caption is in {language}, {num:,} others are in {usual}")


def language_of(caption: str) -> str | None:
    """The language whose small words a caption holds most of, two or more; None where that is not clear.

    Example:
        >>> language_of("zwei Flugzeuge auf dem Rollfeld"), language_of("a plane on the runway"), language_of("la casa")
        ('German', 'English', None)
    """
    words = _words(caption)
    hits = {name: sum(word in known for word in words) for name, known in _SMALL_WORDS.items()}
    first, second = sorted(hits, key=lambda name: -hits[name])[:2]
    return first if hits[first] >= 2 and hits[first] > hits[second] else None


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption[:2000].casefold())


STATUS_WORDS = {"empty_caption": "caption is empty", "missing_caption": "caption is missing"}


def generic(found: Found, vectors: Vectors, image_rank: np.ndarray) -> None:
    """Captions of pairs that look right, yet fit many other images better: more than a tenth of all."""
    limit = max(20, len(vectors.image) // 10)
    is_generic = (image_rank > limit) & (vectors.noise_probability < 0.2)
    for row in np.flatnonzero(is_generic).tolist():
        found.add(
            "generic_caption", row, f"generic: {image_rank[row] - 1:,} other images fit the caption better"
        )


def own_disagreement(found: Found, vectors: Vectors) -> None:
    """Captions of likely noisy pairs that agree with their image's other captions no better than with any."""
    usual = _usual_agreement(vectors)
    for rows in _rows_of(vectors.row_image, len(vectors.image)):
        captions = vectors.row_caption[rows]
        distinct = np.unique(captions)
        if len(distinct) < 3 or len(distinct) > 64 or not (vectors.noise_probability[rows] >= 0.5).any():
            continue
        cosine = vectors.caption[distinct] @ vectors.caption[distinct].T
        mean = (cosine.sum(1) - cosine.diagonal()) / (len(distinct) - 1)
        apart = mean <= usual
        if apart.all():
            continue
        for row, own in zip(rows.tolist(), np.searchsorted(distinct, captions).tolist(), strict=True):
            if apart[own] and vectors.noise_probability[row] >= 0.5:
                found.add("disagrees", row, "disagrees with the image's other captions")


# --- displaced captions


def block_shifts(found: Found, vectors: Vectors, sources: Sequence[str]) -> dict[int, tuple[int, float]]:
    """Runs of rows of one source whose images fit the captions a constant number of rows away.

    For each offset the evidence of a row is the cosine with the caption that far away minus that with its own, mean
    over the rows of an image that stand together. A run counts when its log likelihood ratio, of that evidence being
    as strong as own captions usually are against being none at all, exceeds what the best run among as many rows and
    offsets reaches by chance in one of 10,000 sets; half the ratio is discounted, as neighbours are not independent.

    Returns:
        The row whose caption fits, and the probability, by row.
    """
    result: dict[int, tuple[int, float]] = {}
    is_ok = vectors.row_image >= 0
    by_source: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        by_source.setdefault(source, []).append(row)
    for source in sorted(by_source):
        rows = np.asarray(by_source[source])
        rows = rows[is_ok[rows]]
        if len(rows) < 40:
            continue
        image, caption = vectors.row_image[rows], vectors.row_caption[rows]
        run = np.concatenate([[0], np.cumsum(image[1:] != image[:-1])])
        per_image = max(1, round(len(rows) / (run[-1] + 1)))
        steps = {*range(1, SHIFTS + 1), *(per_image * one for one in range(1, SHIFTS + 1))}
        offsets = [sign * step for step in sorted(steps) for sign in (1, -1) if step < len(rows) // 2]
        needed = 2 * np.log(1e4 * (run[-1] + 1) * max(1, len(offsets)))
        own = _cosines(vectors, image, caption)
        candidates: list[tuple[float, int, int, int]] = []
        for offset in offsets:
            ratio = _shift_evidence(vectors, image, caption, run, own, offset)
            if ratio is not None:
                candidates += [
                    (-score, offset, low, high) for score, low, high in _runs(ratio, float(needed))
                ]
        taken = np.zeros(run[-1] + 1, dtype=bool)
        for _, offset, low, high in sorted(candidates):
            if taken[low : high + 1].any() or high - low < 4:
                continue
            taken[low : high + 1] = True
            inside = np.flatnonzero((run >= low) & (run <= high))
            detail = (
                f"rows {rows[inside[0]]:,} to {rows[inside[-1]]:,} fit captions {abs(offset):,} "
                f"row{'s' if abs(offset) > 1 else ''} {'later' if offset > 0 else 'earlier'}"
            )
            for at in inside.tolist():
                if 0 <= at + offset < len(rows):
                    right = int(rows[at + offset])
                    result[int(rows[at])] = (right, MAX_REMATCH_PROBABILITY)
                    found.add("block_shift", int(rows[at]), detail, right, MAX_REMATCH_PROBABILITY)
    return result


def _cosines(vectors: Vectors, image: np.ndarray, caption: np.ndarray) -> np.ndarray:
    """Cosine of each image with the caption beside it, in blocks."""
    parts = [
        (vectors.image[image[at : at + 16384]] * vectors.caption[caption[at : at + 16384]]).sum(1)
        for at in range(0, len(image), 16384)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _shift_evidence(
    vectors: Vectors, image: np.ndarray, caption: np.ndarray, run: np.ndarray, own: np.ndarray, offset: int
) -> np.ndarray | None:
    """Log likelihood ratio of each image's rows to be shifted; None where own captions hardly stand out."""
    low, high = max(0, -offset), len(image) - max(0, offset)
    at = np.arange(low, high)
    other = _cosines(vectors, image[at], caption[at + offset])
    asks = image[at] != image[at + offset]
    num = np.bincount(run[at[asks]], minlength=run[-1] + 1)
    total = np.bincount(run[at[asks]], other[asks] - own[at[asks]], minlength=run[-1] + 1)
    known = num > 0
    if known.sum() < 20:
        return None
    gain = np.where(known, total / np.maximum(num, 1), 0.0)
    usual = -float(np.median(gain[known]))
    spread = float(np.median(np.abs(gain[known] + usual))) * 1.4826
    if usual <= 0 or usual < 0.5 * spread:
        return None
    gain = np.clip(gain, -3 * usual, 3 * usual)
    return np.where(known, usual / max(spread, 1e-6) ** 2 * (gain - usual / 2), 0.0)


def _runs(ratio: np.ndarray, needed: float) -> list[tuple[float, int, int]]:
    """Runs of the highest sum, each at least `needed`, not overlapping: sum, first, last."""
    result: list[tuple[float, int, int]] = []
    total, start, best, end = 0.0, 0, 0.0, -1
    for at, value in enumerate([*ratio.tolist(), float("-inf")]):
        if total <= 0:
            total, start, best, end = 0.0, at, 0.0, -1
        total += value
        if total > best:
            best, end = total, at
        if end >= 0 and (total <= 0 or total < best - needed):
            if best >= needed:
                result.append((best, start, end))
            total = 0.0
    return result


def rematches(found: Found, vectors: Vectors, known: dict[int, tuple[int, float]]) -> None:
    """For likely noisy pairs, the displaced caption that fits the image best and whose best image it is.

    The probability compares the cosine with those of clean pairs and with hard mismatches, the best of 16 random
    captions of each clean image; two normal densities of one spread, mismatches four times as likely beforehand.
    """
    noisy = np.nan_to_num(vectors.noise_probability, nan=0.0) >= 0.5
    noisy[list(known)] = False
    rows = np.flatnonzero(noisy)
    clean = np.flatnonzero(vectors.noise_probability < 0.1)
    if len(rows) < 2 or len(clean) < 50:
        return
    images, captions = np.unique(vectors.row_image[rows]), np.unique(vectors.row_caption[rows])
    if max(len(images), len(captions)) > REMATCHED:
        found.capped.append(
            f"re-matches: the first {REMATCHED:,} displaced images and captions were searched"
        )
        images, captions = images[:REMATCHED], captions[:REMATCHED]
    draw = np.random.default_rng(0)
    clean = draw.permutation(clean)[:5000]
    right = _cosines(vectors, vectors.row_image[clean], vectors.row_caption[clean])
    wrong = np.full(len(clean), -1.0)
    for _ in range(16):
        other = vectors.row_caption[draw.permutation(clean)]
        cosine = _cosines(vectors, vectors.row_image[clean], other)
        wrong = np.maximum(wrong, np.where(other == vectors.row_caption[clean], -1.0, cosine))
    spread = float(np.sqrt((right.var() + wrong.var()) / 2)) or 1e-6
    slope = float(right.mean() - wrong.mean()) / spread**2
    middle = float(right.mean() + wrong.mean()) / 2
    if slope <= 0:
        return
    best_caption, value = _best(vectors.image[images], vectors.caption[captions])
    best_image, _ = _best(vectors.caption[captions], vectors.image[images])
    own = {
        (int(vectors.row_image[r]), int(vectors.row_caption[r]))
        for r in np.flatnonzero(vectors.row_image >= 0)
    }
    carrier = {int(vectors.row_caption[r]): int(r) for r in rows[::-1]}
    chosen: dict[int, tuple[int, float]] = {}
    for at, image in enumerate(images.tolist()):
        caption = int(captions[best_caption[at]])
        if best_image[best_caption[at]] != at or (image, caption) in own:
            continue
        probability = 1 / (1 + 4 * np.exp(-np.clip(slope * (value[at] - middle), -50, 50)))
        chosen[image] = (carrier[caption], min(float(probability), 0.9))
    for row in rows.tolist():
        partner, probability = chosen.get(int(vectors.row_image[row]), (-1, 0.0))
        if probability >= 0.5:
            found.add("rematch", row, f"the caption of row {partner:,} fits the image", partner, probability)


def _best(query: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and cosine of the best other for each query, in blocks."""
    index, value = np.zeros(len(query), np.int64), np.zeros(len(query))
    for at in range(0, len(query), 512):
        cosine = query[at : at + 512] @ other.T
        index[at : at + 512] = cosine.argmax(1)
        value[at : at + 512] = cosine.max(1)
    return index, value
