"""What is wrong with a dataset beyond single captions that do not fit: duplicates, leakage, odd words, shifted blocks.

Pure functions on the pairs table and vectors; the score stage calls `find_all` and keeps its table. Rows are named
by position in the input. Searches that grow faster than linearly are capped, and the result says which were.

Shapes: N = rows; I = distinct images; C = distinct captions; P = distinct pairs; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from nc_audit.findings.captions import generic, own_disagreement, script_of, written
from nc_audit.findings.displaced import block_shifts, rematches
from nc_audit.findings.found import Found, Vectors
from nc_audit.findings.images import crowded, duplicates
from nc_audit.findings.near import HASH_SIZE, dhash, near_duplicates

__all__ = ["HASH_SIZE", "Found", "Vectors", "dhash", "find_all", "script_of"]


def find_all(
    pairs: pa.Table,
    vectors: Vectors,
    image_rank: np.ndarray,
    read_hash: Callable[[int], int | None],
    is_cut: Sequence[bool] = (),
    unlikely: Mapping[int, str] | None = None,
) -> Found:
    """Every finding about a dataset.

    Args:
        pairs: the `pairs` table.
        vectors: embeddings and head vectors of what is audited.
        image_rank: rank of each row's image among all for its caption, 1 = best, shape [N]; 0 where not ok.
        read_hash: `dhash` of a distinct image by its index, None where it cannot be read; asked by several threads.
        is_cut: of each distinct caption whether the encoder reads only its beginning, [C]; empty: of none.
        unlikely: what is to be told of rows with a word that their image looks unlike.
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
    for row, detail in sorted((unlikely or {}).items()):
        found.add("unlikely_word", row, detail)
    shifted = block_shifts(found, vectors, pairs["source"].to_pylist())
    rematches(found, vectors, shifted)
    return found
