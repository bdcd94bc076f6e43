"""The clean pairs of a dataset, embedded once, and what becomes of them when known noise is put in.

Shapes: N = clean rows; P = distinct pairs after injection; I = images; C = captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from nc_audit import tokens
from nc_audit.bench.classes import classes_of_names, cluster_classes
from nc_audit.bench.inject import Injected, fold_rows, inject
from nc_audit.dataset import Folded, content_id, fold, normalise_caption
from nc_audit.embed import (
    IMAGES_AT_ONCE,
    EmbeddingStore,
    embed_captions,
    embed_images,
    fit_captions,
    fit_images,
)
from nc_audit.encoders import Encoders, TextEncoder
from nc_audit.errors import DatasetError
from nc_audit.methods.matching import Pairs

NUM_CLUSTERS = 30


@dataclass(frozen=True)
class Corrupted:
    """Distinct pairs after injection, in canonical order, with embeddings and the truth.

    Attributes:
        folded: the distinct things; `row_pair` leads from each injected row to its pair.
        pairs: the same as indices.
        known_noise_P: bool [P], whether the caption is none of the image's own.
        changed_P: bool [P], whether injection touched the pair.
        image_ID: embeddings of `folded.image_ids`.
        caption_CD: embeddings of `folded.captions`.
        text_encoder: that made them.
    """

    folded: Folded
    pairs: Pairs
    known_noise_P: np.ndarray
    changed_P: np.ndarray
    image_ID: Tensor
    caption_CD: Tensor
    text_encoder: TextEncoder


@dataclass(frozen=True)
class Split:
    """Clean pairs of a test split with their embeddings."""

    pairs: Pairs
    image_ID: Tensor
    caption_CD: Tensor


class Corpus:
    """The ok rows of a `pairs` table with repeated captions of an image folded, in file order, and their embeddings.

    Args:
        pairs: a `pairs` table.
        encoders: loaded encoders.
        read: bytes of an image by its URI.
        store: where embeddings are kept.
        test_split: rows of this split stay clean and out of injection and training; None for none.
        batch_size: images per batch; 0 finds it.
        seed: of clusters that stand for classes.
        progress: told what is embedded and how far.
    """

    def __init__(
        self,
        pairs: pa.Table,
        encoders: Encoders,
        read: Callable[[str], bytes],
        store: EmbeddingStore,
        *,
        test_split: str | None = None,
        batch_size: int = 0,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.encoders, self.store, self.seed, self.progress = encoders, store, seed, progress
        ok = pairs.filter(pc.equal(pairs["status"], "ok"))
        if not len(ok):
            raise DatasetError(
                "not one row has both an image and a caption", "nc-audit score shows the statuses"
            )
        whole = fold(ok)
        self.image_ids, uris = whole.image_ids, whole.image_uris
        encoder = fit_images(
            encoders.image,
            self.image_ids,
            lambda at: read(uris[at]),
            store,
            progress=progress,
        )
        image, failures = embed_images(
            encoder,
            self.image_ids,
            lambda at: read(uris[at]),
            store,
            batch_size=batch_size,
            progress=self._part("embed images"),
        )
        self.image_ID, self.image_encoder = torch.from_numpy(image), encoder
        self.read_image, self.batch_size = lambda at: read(uris[at]), batch_size
        place = {one: at for at, one in enumerate(self.image_ids)}
        image_N = np.array([place[one] for one in ok["image_id"].to_pylist()], np.int64)
        good = np.array([one not in failures for one in self.image_ids])[image_N]
        captions = ok["caption"].to_pylist()
        rows = np.flatnonzero(good)
        rows = rows[fold_rows(image_N[rows].tolist(), [captions[row] for row in rows.tolist()])]
        self.names = _first_names(ok, place)
        split = ok["split"].to_pylist()
        is_test = np.array([test_split is not None and split[row] == test_split for row in rows.tolist()])
        if test_split is not None and not is_test.any():
            found = ", ".join(sorted({str(one) for one in split}))
            raise DatasetError(f"no row is of the split {test_split!r}", f"splits found: {found}")
        self.image_N, self.captions = image_N[rows[~is_test]], [captions[r] for r in rows[~is_test].tolist()]
        self.test_image_N = image_N[rows[is_test]]
        self.test_captions = [captions[r] for r in rows[is_test].tolist()]

    def _part(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of each image, int64 [I], by names where they tell, else by clusters of embeddings."""
        found = classes_of_names(self.names)
        if found is None:
            found = cluster_classes(self.image_ID.numpy(), min(NUM_CLUSTERS, len(self.names) // 3), self.seed)
        return found

    def inject(self, kind: str, rate: float, seed: int) -> Injected:
        """Known noise in the clean rows; see `inject.inject`."""
        local, image_N = np.unique(self.image_N, return_inverse=True)
        classes = self.classes[local].tolist() if kind == "class" else None
        return inject(image_N.tolist(), self.captions, kind, rate, seed, classes)

    def corrupted(self, injected: Injected) -> Corrupted:
        """The pairs that a tool would be given after the injection, embedded."""
        folded = self.fold(self._images_of(injected), injected.captions)
        num = len(folded.pair_ids)
        noise, changed = np.zeros(num, bool), np.zeros(num, bool)
        noise[folded.row_pair] = injected.known_noise
        changed[folded.row_pair] = injected.changed
        encoder = fit_captions(self.encoders.text, folded.caption_ids, folded.captions, self.store)
        vectors = embed_captions(encoder, folded.caption_ids, folded.captions, self.store)
        return Corrupted(
            folded,
            _pairs_of(folded),
            noise,
            changed,
            self._of(self.image_ID, folded.image_ids),
            torch.from_numpy(vectors),
            encoder,
        )

    def _images_of(self, injected: Injected) -> np.ndarray:
        """Image of each row after the injection, among all images of the corpus."""
        return np.unique(self.image_N)[injected.image_N]

    def test_set(self, text_encoder: TextEncoder) -> Split:
        """The clean pairs of the test split, captions embedded by the encoder of the training ones."""
        folded = self.fold(self.test_image_N, self.test_captions)
        vectors = embed_captions(text_encoder, folded.caption_ids, folded.captions, self.store)
        return Split(_pairs_of(folded), self._of(self.image_ID, folded.image_ids), torch.from_numpy(vectors))

    @cached_property
    def _image_tokens(self) -> Tensor:
        return tokens.image_tokens(
            self.image_encoder,
            self.image_ids,
            self.read_image,
            self.store,
            batch_size=self.batch_size or IMAGES_AT_ONCE,
            progress=self._part("embed patches"),
        )

    def tokens(self, corrupted: Corrupted) -> dict[str, Tensor]:
        """Local embeddings of both sides; empty where an encoder has none."""
        if not (tokens.has_tokens(self.image_encoder) and tokens.has_tokens(corrupted.text_encoder)):
            return {}
        folded = corrupted.folded
        return {
            "image_tokens": self._of(self._image_tokens, folded.image_ids),
            "caption_tokens": tokens.caption_tokens(
                corrupted.text_encoder, folded.caption_ids, folded.captions, self.store
            ),
        }

    def _of(self, vectors: Tensor, image_ids: Sequence[str]) -> Tensor:
        """The vectors of some images, in their order."""
        place = {one: at for at, one in enumerate(self.image_ids)}
        return vectors[torch.tensor([place[one] for one in image_ids])]

    def fold(self, image_N: np.ndarray, captions: Sequence[str]) -> Folded:
        """Rows of image indices and captions as distinct things in canonical order."""
        image_ids = [self.image_ids[at] for at in image_N.tolist()]
        caption_ids = [content_id(normalise_caption(caption)) for caption in captions]
        pair_ids = [content_id(i, c) for i, c in zip(image_ids, caption_ids, strict=True)]
        return fold(
            pa.table(
                {
                    "pair_id": pa.chunked_array([pair_ids], pa.string()),
                    "image_id": pa.chunked_array([image_ids], pa.string()),
                    "caption_id": pa.chunked_array([caption_ids], pa.string()),
                    "image_uri": pa.chunked_array([image_ids], pa.string()),
                    "caption": pa.chunked_array([list(captions)], pa.string()),
                    "status": pa.chunked_array([["ok"] * len(captions)], pa.string()),
                }
            )
        )

    def table(self, injected: Injected) -> pa.Table:
        """The injected rows as a dataset: image, caption, known_noise, original_image, original_caption."""
        return pa.table(
            {
                "image": [self.names[at] for at in self._images_of(injected).tolist()],
                "caption": injected.captions,
                "known_noise": injected.known_noise,
                "original_image": [self.names[at] for at in self.image_N.tolist()],
                "original_caption": self.captions,
            }
        )


def _first_names(ok: pa.Table, place: dict[str, int]) -> list[str]:
    names = ok.group_by("image_id").aggregate([("image", "min")])
    result = [""] * len(place)
    for image_id, name in zip(names["image_id"].to_pylist(), names["image_min"].to_pylist(), strict=True):
        result[place[image_id]] = name
    return result


def _pairs_of(folded: Folded) -> Pairs:
    return Pairs.of_arrays(
        folded.pair_image, folded.pair_caption, len(folded.image_ids), len(folded.caption_ids)
    )
