"""The distinct images, captions and pairs of a table, in an order that does not depend on the order of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Folded:
    """What to embed, train and score: each distinct thing once, sorted by its id. N rows, P pairs.

    `image_uris` holds the smallest URI of each image, `captions` the smallest raw caption of each caption, both by
    code point. `pair_image` and `pair_caption` (shape [P]) index the two lists; `row_pair` (shape [N]) gives the
    pair of each row, -1 where its status is not ok.
    """

    image_ids: list[str]
    image_uris: list[str]
    caption_ids: list[str]
    captions: list[str]
    pair_ids: list[str]
    pair_image: np.ndarray
    pair_caption: np.ndarray
    row_pair: np.ndarray


def fold(pairs: pa.Table) -> Folded:
    """The distinct images, captions and pairs among the rows whose status is ok."""
    is_ok = pc.equal(pairs["status"], "ok")
    ok = pairs.select(["pair_id", "image_id", "caption_id", "image_uri", "caption"]).filter(is_ok)
    image_codes, image_ids = _sorted_codes(ok["image_id"])
    caption_codes, caption_ids = _sorted_codes(ok["caption_id"])
    pair_codes, pair_ids = _sorted_codes(ok["pair_id"])
    first = np.zeros(len(pair_ids), np.int64)
    first[pair_codes[::-1]] = np.arange(len(pair_codes))[::-1]
    row_pair = np.full(len(pairs), -1, np.int64)
    row_pair[np.asarray(is_ok, dtype=bool)] = pair_codes
    return Folded(
        image_ids=image_ids,
        image_uris=_smallest(ok["image_uri"], image_codes, len(image_ids)),
        caption_ids=caption_ids,
        captions=_smallest(ok["caption"], caption_codes, len(caption_ids)),
        pair_ids=pair_ids,
        pair_image=image_codes[first],
        pair_caption=caption_codes[first],
        row_pair=row_pair,
    )


def _sorted_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Each value as its index into the sorted distinct values, shape [N], and those values."""
    codes, values = _codes(column)
    order = np.asarray(pc.sort_indices(values), dtype=np.int64)  # by UTF-8 bytes, which is by code point
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    return place[codes], values.take(pa.array(order)).to_pylist()


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value as its index into the distinct values, in order of first appearance, and those values."""
    encoded = pc.dictionary_encode(column).unify_dictionaries()
    if not encoded.num_chunks:
        return np.zeros(0, np.int64), pa.array([], pa.string())
    codes = np.concatenate([np.asarray(chunk.indices, dtype=np.int64) for chunk in encoded.chunks])
    return codes, encoded.chunk(0).dictionary


def _smallest(column: pa.ChunkedArray, groups: np.ndarray, num_groups: int) -> list[str]:
    """The smallest string, by code point, of each group."""
    codes, values = _codes(column)
    chosen = np.empty(num_groups, np.int64)
    chosen[groups] = codes
    is_torn = np.zeros(num_groups, dtype=bool)
    is_torn[groups[chosen[groups] != codes]] = True
    smallest: list[str] = values.take(pa.array(chosen)).to_pylist()
    at = np.flatnonzero(is_torn[groups])
    for group, value in zip(groups[at].tolist(), values.take(pa.array(codes[at])).to_pylist(), strict=True):
        smallest[group] = min(smallest[group], value)
    return smallest


def mark_corrupt(pairs: pa.Table, failures: Mapping[str, str]) -> pa.Table:
    """The table with the ok rows of images that failed to decode marked `corrupt_image`; twice changes nothing.

    Args:
        pairs: a `pairs` table.
        failures: what is wrong, by `image_id`.
    """
    if not failures:
        return pairs
    at = pc.index_in(pairs["image_id"], pa.array(list(failures), pa.string()))
    is_hit = pc.and_(pc.is_valid(at), pc.equal(pairs["status"], "ok"))
    details = pc.take(pa.array(list(failures.values()), pa.string()), at)
    status = pc.if_else(is_hit, "corrupt_image", pairs["status"])
    detail = pc.if_else(is_hit, details, pairs["status_detail"])
    for name, column in (("status", status), ("status_detail", detail)):
        pairs = pairs.set_column(pairs.schema.get_field_index(name), pairs.schema.field(name), column)
    return pairs
