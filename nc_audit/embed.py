"""Stage 2, embed: each distinct image and caption becomes one vector, once, kept in content-addressed shards.

A shard holds the rows of a fixed-size run of what was missing when the work began, in the given (canonical) order,
and is committed by a rename. So a killed and resumed embed makes the same shards as an undisturbed one, and what any
shard of the same encoder already holds is not embedded again. Vectors are stored in float16 and always used as read
back, so that a cached run equals a fresh one bit for bit. Images that cannot be decoded are remembered with the reason.

Shapes: N = images or captions; D = dimensions.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nc_audit.dataset import decode_image
from nc_audit.encoders import Encoders, ImageEncoder, ImageLearner, TextEncoder, TextLearner
from nc_audit.errors import DatasetError, EncoderError
from nc_audit.room import room_for
from nc_audit.run import digest_of, replacing
from nc_audit.team import ALONE, Team

logger = logging.getLogger(__name__)

IMAGES_PER_SHARD = 1024
CAPTIONS_PER_SHARD = 4096
PARTS_PER_LANE = 4  # into which a shard of captions is cut for each lane
CAPTIONS_PER_LEARNT_SHARD = 1 << 16  # cheap to encode, and one shard makes an interrupted fit harmless
AHEAD = 3  # batches decoded ahead of the encoder
DECODERS = max(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read, decode and preprocess."""
IMAGES_AT_ONCE = 64
IMAGES_PER_THREAD = 16  # of a processor's lane
LANES = 2
"""Batches encoded at once. A GPU is fed the next before it is through with one; the threads of a processor are shared
out, since two batches on half of them each wait less for each other than all threads do over one."""
MOST_AT_ONCE = 1024
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

Progress = Callable[[int, int], None]
Read = Callable[[int], bytes]
T = TypeVar("T")
R = TypeVar("R")


class EmbeddingStore:
    """A folder of Arrow IPC shards: `id`, `embedding` (float16, null where it failed), `error` (why it failed).

    A file name says the side (`image` or `caption`), the encoder's digest and a digest of the ids it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, side: str, digest: str) -> dict[str, int]:
        """Names of an encoder's shards, with their number of rows, sorted."""
        return {path.name: self._open(path).num_rows for path in self._shards(side, digest)}

    def ids(self, side: str, digest: str) -> set[str]:
        """Ids that the shards of an encoder hold, those that failed included."""
        return {one for path in self._shards(side, digest) for one in self._open(path)["id"].to_pylist()}

    def dim(self, side: str, digest: str) -> int | None:
        """Dimensions of an encoder's vectors; None where there are none yet."""
        path = next(iter(self._shards(side, digest)), None)
        return None if path is None else self._open(path).schema.field("embedding").type.list_size

    def read(
        self, side: str, digest: str, ids: Sequence[str], dim: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        """What the shards of an encoder hold of some ids.

        Args:
            side: `image` or `caption`.
            digest: the encoder's.
            ids: wanted, distinct.
            dim: D.

        Returns:
            Vectors [N, D] float16 (not a number where there is none), whether each id is known [N] bool, and the
            reasons of those that failed by id.
        """
        vectors = room_for(len(ids), dim, torch.float16).numpy()
        vectors.fill(np.nan)
        known = np.zeros(len(ids), dtype=bool)
        failures: dict[str, str] = {}
        shards = [self._open(path) for path in self._shards(side, digest)]
        if not shards:
            return vectors, known, failures
        table = pa.concat_tables(shards)
        at = pc.index_in(table["id"].combine_chunks(), value_set=pa.array(ids, pa.string()))
        place = at.fill_null(-1).to_numpy(zero_copy_only=False)
        start = 0
        for batch in table.to_batches():
            to = place[start : start + len(batch)]
            start += len(batch)
            rows = np.flatnonzero(to >= 0)
            embedding, error = batch.column("embedding"), batch.column("error")
            values = embedding.values.to_numpy(zero_copy_only=False)[embedding.offset * dim :][
                : len(batch) * dim
            ]
            known[to[rows]] = True
            failed = error.is_valid().to_numpy(zero_copy_only=False)[rows]
            vectors[to[rows[~failed]]] = values.reshape(-1, dim)[rows[~failed]]
            failures |= {ids[to[row]]: error[int(row)].as_py() for row in rows[failed]}
        return vectors, known, failures

    def write(
        self, side: str, digest: str, ids: Sequence[str], vectors: Tensor, errors: Sequence[str | None]
    ) -> None:
        """Commit one shard.

        Args:
            side: `image` or `caption`.
            digest: the encoder's.
            ids: of the rows.
            vectors: [N, D] float32; the rows that failed are ignored.
            errors: why each row failed, or None.

        Raises:
            EncoderError: a vector does not fit into float16 or is not finite.
        """
        dim = vectors.shape[1]
        failed = np.array([error is not None for error in errors], dtype=bool)
        half = np.where(failed[:, None], np.float32(0), vectors.numpy())
        with np.errstate(over="ignore"):
            half = half.astype(np.float16)
        wrong = int((~np.isfinite(half)).any(1).sum())
        if wrong:
            raise EncoderError(
                f"{wrong:,} of {len(ids):,} {side} embeddings are not finite or exceed 65,504",
                "the weights do not fit the model, or --precision fp32 is needed",
            )
        embedding = pa.FixedSizeListArray.from_arrays(
            pa.array(half.reshape(-1)), type=_vector_type(dim), mask=pa.array(failed)
        )
        table = pa.table(
            {"id": pa.array(ids, pa.string()), "embedding": embedding, "error": pa.array(errors, pa.string())}
        )
        path = self.folder / f"{side}-{digest[:16]}-{digest_of(list(ids))[:16]}.arrow"
        with (
            replacing(path) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table)

    def _shards(self, side: str, digest: str) -> list[Path]:
        return sorted(self.folder.glob(f"{side}-{digest[:16]}-*.arrow"))

    @staticmethod
    def _open(path: Path) -> pa.Table:
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as problem:
            raise EncoderError(
                f"{path.name} is damaged", f"delete {path}; its rows are embedded again"
            ) from problem


def _vector_type(dim: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float16(), nullable=False), dim)


@dataclass
class Work:
    """What embedding had to do, beside what the store held.

    Attributes:
        images: embedded now; of those that could not be decoded, those that were tried now.
        captions: embedded now.
        learn: seconds in which encoders learnt from the data.
        decode: seconds for which the image encoder waited for images to be read, decoded and resized.
        encode: seconds of encoding images and captions.
    """

    images: int = 0
    captions: int = 0
    learn: float = 0.0
    decode: float = 0.0
    encode: float = 0.0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time inside to `learn`, `decode` or `encode`."""
        start = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)


@dataclass(frozen=True)
class Maker:
    """What embeddings in a store were made by: enough to read them again without loading an encoder.

    Attributes:
        image: digest of the image encoder.
        image_dim: D.
        caption: digest of the text encoder.
        caption_dim: D'.
        logit_scale: of aligned encoders, else None.
    """

    image: str
    image_dim: int
    caption: str
    caption_dim: int
    logit_scale: float | None


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of images and captions by id, and what was seen on the way.

    Attributes:
        image_ids: of the rows of `image`.
        image: shape [I, D] float16; not a number for an image that could not be decoded.
        caption_ids: of the rows of `caption`.
        caption: shape [C, D'] float16.
        failures: why an image could not be decoded, by its id.
        is_cut: of each caption whether the encoder reads only its beginning.
        maker: what made them.
        encoders: of the images and of the captions; None where they were not needed.
        work: what had to be done for them.
    """

    image_ids: list[str]
    image: Tensor
    caption_ids: list[str]
    caption: Tensor
    failures: dict[str, str]
    is_cut: list[bool]
    maker: Maker
    encoders: tuple[ImageEncoder, TextEncoder] | None
    work: Work

    def of(self, image_ids: list[str], caption_ids: list[str]) -> tuple[Tensor, Tensor]:
        """The embeddings of some images and captions, in their order: shapes [I, D] and [C, D']."""
        return (
            _picked(self.image, self.image_ids, image_ids),
            _picked(self.caption, self.caption_ids, caption_ids),
        )

    def cut(self, caption_ids: list[str]) -> list[bool]:
        """Of some captions whether the encoder reads only the beginning; empty where it reads all."""
        if not any(self.is_cut):
            return []
        is_cut = dict(zip(self.caption_ids, self.is_cut, strict=True))
        return [is_cut[one] for one in caption_ids]


def _picked(vectors: Tensor, ids: list[str], wanted: list[str]) -> Tensor:
    if ids == wanted:
        return vectors
    found = pc.index_in(pa.array(wanted, pa.string()), value_set=pa.array(ids, pa.string()))
    at = torch.from_numpy(found.to_numpy(zero_copy_only=False).astype(np.int64))
    return torch.index_select(vectors, 0, at, out=room_for(len(at), vectors.shape[1], vectors.dtype))


def embed_all(
    encoders: Encoders,
    image_ids: list[str],
    read: Read,
    caption_ids: list[str],
    captions: list[str],
    store: EmbeddingStore,
    *,
    batch_size: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    team: Team = ALONE,
) -> Embeddings:
    """Fit encoders that learn from the data, and embed every image and caption that the store does not hold yet.

    Args:
        encoders: loaded.
        image_ids: distinct images in canonical order.
        read: bytes of an image by its position.
        caption_ids: distinct captions in canonical order.
        captions: the captions.
        store: where embeddings are kept.
        batch_size: images per batch; 0 finds it.
        progress: told what is done, how many are, and of how many.
        team: processes that do the same with the same store at the same time, each its share of the shards.
    """

    def part(what: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    work = Work()
    with work.timed("learn"):
        if not team.is_first:
            team.meet()  # what the first one has learnt is there then
        image_encoder = fit_images(encoders.image, image_ids, read, store, progress=progress, work=work)
        if team.is_first:
            team.meet()
    image, failures = embed_images(
        image_encoder,
        image_ids,
        read,
        store,
        batch_size=batch_size,
        num_workers=max(4, DECODERS // team.size),
        progress=part("embed images"),
        work=work,
        team=team,
    )
    with work.timed("learn"):
        text_encoder = fit_captions(encoders.text, caption_ids, captions, store)
    caption = embed_captions(
        text_encoder, caption_ids, captions, store, progress=part("embed captions"), work=work, team=team
    )
    return Embeddings(
        image_ids,
        torch.from_numpy(image),
        caption_ids,
        torch.from_numpy(caption),
        failures,
        text_encoder.truncated(captions),
        Maker(
            image_encoder.digest,
            image_encoder.dim,
            text_encoder.digest,
            text_encoder.dim,
            encoders.logit_scale,
        ),
        (image_encoder, text_encoder),
        work,
    )


def recalled(
    maker: Maker, image_ids: list[str], caption_ids: list[str], cut_ids: set[str], store: EmbeddingStore
) -> Embeddings | None:
    """Embeddings that a store holds, by no encoder; None where it lacks one of them.

    Args:
        maker: what made them.
        image_ids: distinct images.
        caption_ids: distinct captions.
        cut_ids: the captions of which the encoder read only the beginning.
        store: where embeddings are kept.
    """
    image, has_image, failures = store.read("image", maker.image, image_ids, maker.image_dim)
    if failures or not has_image.all():
        return None
    caption, has_caption, _ = store.read("caption", maker.caption, caption_ids, maker.caption_dim)
    if not has_caption.all():
        return None
    return Embeddings(
        image_ids,
        torch.from_numpy(image),
        caption_ids,
        torch.from_numpy(caption),
        {},
        [one in cut_ids for one in caption_ids],
        maker,
        None,
        Work(),
    )


def fit_images(
    encoder: ImageEncoder | ImageLearner,
    image_ids: Sequence[str],
    read: Read,
    store: EmbeddingStore,
    *,
    num_workers: int = DECODERS,
    progress: Callable[[str, int, int], None] | None = None,
    work: Work | None = None,
) -> ImageEncoder:
    """The encoder itself when it is frozen; else what it learns from the images, kept in the store's folder.

    The images that it learns from are embedded by that.

    Args:
        encoder: frozen or not.
        image_ids: all distinct images in canonical order.
        read: bytes of an image by its position.
        store: where the learnt encoder is kept.
        num_workers: threads that decode.
        progress: told what is done (images are read, then learnt from), how many are, and of how many.
        work: what is done is added to it.

    Raises:
        EncoderError: it must learn and no image can be decoded.
    """
    if not isinstance(encoder, ImageLearner):
        return encoder
    fitted_on = digest_of(list(image_ids))
    path = store.folder / f"fitted-{encoder.digest_for(fitted_on)[:16]}.safetensors"
    if path.is_file():
        return encoder.encoder(load_file(path), fitted_on)
    at = encoder.sample(len(image_ids))
    images: list[Tensor] = []
    ids: list[str] = []
    for done, (image, _) in enumerate(decoded_ahead(encoder, read, at, num_workers, AHEAD * 64)):
        if image is not None:
            images.append(image)
            ids.append(image_ids[at[done]])
        if progress:
            progress("read images", done + 1, len(at))
    if not images:
        raise EncoderError(
            f"none of {len(at):,} images can be decoded, so {encoder.spec} has nothing to learn from",
            "check the images",
        )
    learnt, vectors = encoder.learn(
        torch.stack(images), None if progress is None else partial(progress, "learn images")
    )
    # Before what was learnt: a run that is killed in between learns the same again, and makes the same shards.
    digest = encoder.digest_for(fitted_on)
    for rows in _runs(range(len(ids)), IMAGES_PER_SHARD):
        store.write("image", digest, [ids[row] for row in rows], vectors[rows], [None] * len(rows))
    if work is not None:
        work.images += len(ids)
    with replacing(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in learnt.items()}, unfinished)
    return encoder.encoder(load_file(path), fitted_on)


def fit_captions(
    encoder: TextEncoder | TextLearner,
    caption_ids: Sequence[str],
    captions: Sequence[str],
    store: EmbeddingStore,
) -> TextEncoder:
    """The encoder itself when it is frozen; else what it learns from the captions (seconds, always the same).

    Where the store holds vectors of the same encoder, it learns only when a further caption is to be encoded.

    Args:
        encoder: frozen or not.
        caption_ids: all distinct captions in canonical order.
        captions: the captions.
        store: where embeddings are kept.
    """
    if not isinstance(encoder, TextLearner):
        return encoder
    fitted_on = digest_of(list(caption_ids))
    return encoder.fit(captions, fitted_on, store.dim("caption", encoder.digest_for(fitted_on)))


def embed_images(
    encoder: ImageEncoder,
    image_ids: Sequence[str],
    read: Read,
    store: EmbeddingStore,
    *,
    batch_size: int = 0,
    num_workers: int = DECODERS,
    progress: Progress | None = None,
    work: Work | None = None,
    team: Team = ALONE,
) -> tuple[np.ndarray, dict[str, str]]:
    """Embed the images that the store does not hold yet, and return all as read back from it.

    Args:
        encoder: fitted or frozen.
        image_ids: distinct, in canonical order.
        read: bytes of an image by its position; an OSError counts as a failure that is not remembered.
        store: where embeddings are kept.
        batch_size: images per batch; 0 finds it by the device. Halved when memory runs out.
        num_workers: threads that read, decode and preprocess, ahead of the encoder.
        progress: called with images embedded and images in all, what the store held included.
        work: what is done is added to it.
        team: processes that each embed a share of it.

    Returns:
        Vectors [N, D] float16, not a number for images that failed, and why those failed by image id.
    """
    _, known, _ = store.read("image", encoder.digest, image_ids, encoder.dim)
    missing = np.flatnonzero(~known).tolist()
    done = len(image_ids) - len(missing)
    if progress:
        progress(done, len(image_ids))
    work = work or Work()
    work.images += len(missing)
    team.meet()  # nothing is written before all have seen what is missing
    batch_size = team.agreed(batch_size or (batch_that_fits(encoder) if missing else IMAGES_AT_ONCE))
    runs = team.share(_runs(missing, max(1, IMAGES_PER_SHARD // batch_size) * batch_size))
    passing: dict[str, str] = {}
    decoded = decoded_ahead(encoder, read, chain.from_iterable(runs), num_workers, AHEAD * batch_size)
    on_gpu = _is_on_gpu(encoder)
    lanes = LANES if on_gpu else _lanes_of_processor()
    encode = _Fitting(encoder.encode)

    def batches() -> Iterator[list[tuple[Tensor | None, Exception | None]]]:
        for rows in runs:
            for first in range(0, len(rows), batch_size):
                yield list(islice(decoded, min(batch_size, len(rows) - first)))

    def encoded(
        batch: list[tuple[Tensor | None, Exception | None]],
    ) -> tuple[Tensor | None, list[Exception | None], float]:
        start = time.perf_counter()
        images = [image for image, _ in batch if image is not None]
        vectors = encode(_stacked(images, pinned=on_gpu)) if images else None
        return vectors, [error for _, error in batch], time.perf_counter() - start

    begun, encoding = time.perf_counter(), 0.0
    results = _ahead(encoded, batches(), lanes, lanes + 1, None if on_gpu else _shared_out(lanes))
    for rows in runs:
        vectors = torch.zeros(len(rows), encoder.dim)
        errors: list[str | None] = [None] * len(rows)
        unread: set[int] = set()
        for first in range(0, len(rows), batch_size):
            found, problems, seconds = next(results)
            encoding += seconds if on_gpu else seconds / lanes
            if found is not None:
                vectors[[first + at for at, problem in enumerate(problems) if problem is None]] = found
            for place, problem in enumerate(problems, first):
                if isinstance(problem, OSError):
                    unread.add(place)
                    passing[image_ids[rows[place]]] = f"cannot be read: {problem.strerror or problem}"
                elif problem is not None:
                    errors[place] = str(problem)
            done += team.size * len(problems)
            if progress:
                progress(min(done, len(image_ids)), len(image_ids))
        kept = [place for place in range(len(rows)) if place not in unread]
        if kept:
            store.write(
                "image",
                encoder.digest,
                [image_ids[rows[p]] for p in kept],
                vectors[kept],
                [errors[p] for p in kept],
            )
    spent = time.perf_counter() - begun
    work.encode += min(encoding, spent)
    work.decode += max(0.0, spent - encoding)
    for others in team.gathered(passing):
        passing |= others
    embedded, _, failures = store.read("image", encoder.digest, image_ids, encoder.dim)
    return embedded, failures | passing


def embed_captions(
    encoder: TextEncoder,
    caption_ids: Sequence[str],
    captions: Sequence[str],
    store: EmbeddingStore,
    *,
    progress: Progress | None = None,
    work: Work | None = None,
    team: Team = ALONE,
) -> np.ndarray:
    """Embed the captions that the store does not hold yet, and return all as read back from it.

    Args:
        encoder: fitted or frozen.
        caption_ids: distinct, in canonical order.
        captions: the captions.
        store: where embeddings are kept.
        progress: called with captions embedded and captions in all, what the store held included.
        work: what is done is added to it.
        team: processes that each embed a share of it.

    Returns:
        Vectors [N, D] float16.
    """
    _, known, _ = store.read("caption", encoder.digest, caption_ids, encoder.dim)
    # By their text, so that captions of a batch share their beginnings, which some encoders compute once.
    missing = sorted(np.flatnonzero(~known).tolist(), key=captions.__getitem__)
    done = len(caption_ids) - len(missing)
    work = work or Work()
    work.captions += len(missing)
    encode = _Fitting(encoder.encode)
    is_learnt = encoder.spec == "tfidf"
    run = CAPTIONS_PER_LEARNT_SHARD if is_learnt else CAPTIONS_PER_SHARD
    lanes = 1 if is_learnt or _is_on_gpu(encoder) else _lanes_of_processor()
    if progress:
        progress(done, len(caption_ids))
    team.meet()  # nothing is written before all have seen what is missing
    for rows in team.share(_runs(missing, run)):
        with work.timed("encode"):
            vectors = _in_lanes(encode, [captions[row] for row in rows], lanes)
        store.write(
            "caption", encoder.digest, [caption_ids[row] for row in rows], vectors, [None] * len(rows)
        )
        done += team.size * len(rows)
        if progress:
            progress(min(done, len(caption_ids)), len(caption_ids))
    team.meet()
    embedded, _, _ = store.read("caption", encoder.digest, caption_ids, encoder.dim)
    return embedded


def _is_on_gpu(encoder: ImageEncoder | TextEncoder) -> bool:
    return str(getattr(encoder, "device", "cpu")).startswith("cuda")


def _lanes_of_processor() -> int:
    """As many as share torch's threads out evenly, if two or three do."""
    num = torch.get_num_threads()
    return min(num, next((lanes for lanes in (LANES, LANES + 1) if num % lanes == 0), LANES))


def _shared_out(lanes: int) -> Callable[[], None]:
    """What a lane's thread does first: take its share of torch's threads."""
    return partial(torch.set_num_threads, max(1, torch.get_num_threads() // lanes))


def _in_lanes(encode: Callable[[list[str]], Tensor], captions: list[str], lanes: int) -> Tensor:
    """Vectors of captions, which lanes take a few neighbours at a time: one is seldom left with all that is long."""
    size = -(-len(captions) // (lanes * PARTS_PER_LANE))
    if lanes <= 1 or size < 1:
        return encode(captions)
    parts = [captions[start : start + size] for start in range(0, len(captions), size)]
    return torch.cat(list(_ahead(encode, parts, lanes, len(parts), _shared_out(lanes))))


def _runs(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Rows in pieces of `size`, each to be a shard."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _stacked(images: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """Images as one tensor [B, 3, H, W], in memory from which a GPU copies by itself where that is wanted."""
    if not pinned:
        return torch.stack(list(images))
    shape = (len(images), *images[0].shape)
    return torch.stack(list(images), out=torch.empty(shape, dtype=images[0].dtype, pin_memory=True))


class Decoding:
    """Position to preprocessed image, or to why there is none."""

    def __init__(self, read: Read, preprocess: Callable[..., Tensor], size: tuple[int, int]) -> None:
        self.read, self.preprocess = read, preprocess
        self.hint = (
            2 * size[1],
            2 * size[0],
        )  # width and height; twice, so that the encoder's own resizing decides

    def __call__(self, position: int) -> tuple[Tensor | None, Exception | None]:
        """The preprocessed image at a position, or None and why."""
        try:
            data = self.read(position)
        except OSError as problem:
            return None, problem
        except DatasetError as problem:
            return None, OSError(problem.message)
        try:
            return self.preprocess(decode_image(data, self.hint)), None
        except DatasetError as problem:
            return None, problem


def decoded_ahead(
    encoder: ImageEncoder | ImageLearner, read: Read, positions: Iterable[int], num_workers: int, depth: int
) -> Iterator[tuple[Tensor | None, Exception | None]]:
    """Preprocessed images, or why there is none, in order; threads read and decode at most `depth` ahead."""
    return _ahead(Decoding(read, encoder.preprocess, encoder.input_size), positions, num_workers, depth)


def _ahead(
    work: Callable[[T], R],
    items: Iterable[T],
    num_workers: int,
    depth: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[R]:
    """Results of `work` in order, worked out by threads at most `depth` items ahead of who takes them.

    Each thread calls `begin` first. Torch remembers the number of threads that was set last, by whatever thread, for
    threads to come; so it is set again at the end.
    """
    waiting: deque[Future[R]] = deque()
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="decode", initializer=begin) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= max(1, depth):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if begin is not None:
                torch.set_num_threads(num_threads)


class _Fitting:
    """Encodes batches in parts that fit into memory: halved when it runs out, and so from then on.

    Attributes:
        at_once: the largest part that is still tried; None as long as nothing had to be halved.
    """

    def __init__(self, encode: Callable[..., Tensor]) -> None:
        self.encode = encode
        self.at_once: int | None = None

    def __call__(self, batch: Tensor | list[str]) -> Tensor:
        """Vectors of a batch, whole or in parts."""
        done: list[Tensor] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + (self.at_once or len(batch))]
            try:
                done.append(self.encode(part))
            except (RuntimeError, MemoryError) as problem:
                if len(part) == 1 or not _is_out_of_memory(problem):
                    raise
                self.at_once = len(part) // 2
            else:
                start += len(part)
                continue
            # Here, not above: while the error is handled, it holds what was computed until then.
            torch.cuda.empty_cache()
            logger.warning("out of memory at %d at once, going on with %d", len(part), self.at_once)
        return done[0] if len(done) == 1 else torch.cat(done)


def _is_out_of_memory(problem: Exception) -> bool:
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(problem) for words in _OUT_OF_MEMORY)


def batch_that_fits(encoder: ImageEncoder) -> int:
    """How many images to encode at once: on a processor 16 for each thread of a lane, up to 64; on a GPU a power of two
    that fills half of what is free.

    It is measured by one batch of blank images.
    """
    device = getattr(encoder, "device", "cpu")
    if not str(device).startswith("cuda"):
        return min(IMAGES_AT_ONCE, IMAGES_PER_THREAD * (torch.get_num_threads() // _lanes_of_processor()))
    blank = torch.zeros(IMAGES_AT_ONCE, 3, *encoder.input_size, dtype=torch.uint8)
    try:
        encoder.encode(blank[:1])  # workspaces of the first call are no part of an image's need
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        encoder.encode(blank)
        needed = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return IMAGES_AT_ONCE
    return power_that_fits(needed / IMAGES_AT_ONCE, torch.cuda.mem_get_info()[0] / 2)


def power_that_fits(each: float, room: float) -> int:
    """The largest power of two, 1..1024, of things of `each` bytes that fit into `room` bytes.

    Example:
        >>> power_that_fits(10e6, 4e9), power_that_fits(10e6, 1e6), power_that_fits(1e3, 4e9)
        (256, 1, 1024)
    """
    number = 1
    while number < MOST_AT_ONCE and 2 * number * each <= room:
        number *= 2
    return number
