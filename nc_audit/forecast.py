"""What a `score` would do and take: the dataset is read and a few images are embedded; nothing is written.

Sizes are expected ones, by what the tables of runs took per row; the time of embedding is that of a small sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nc_audit.dataset import Folded, ImageStore, check_exists, fold, load_pairs
from nc_audit.errors import DatasetError, EncoderError
from nc_audit.pipeline import Silence, Watcher, load_options, plan_of, with_corrupt
from nc_audit.recipe import Recipe
from nc_audit.run import digest_of

if TYPE_CHECKING:
    from nc_audit.encoders import Encoders

_SAMPLE_ROWS = 100_000
_SAMPLE_IMAGES, _SAMPLE_CAPTIONS = 16, 64

# Bytes on the disk as measured on runs of 2,000 to 50,000 rows; `pairs` is measured on the very rows.
_PER_PAIR_AND_EPOCH = 14
_PER_PAIR = 110
_PER_ROW = {"scores.parquet": 85, "tags.parquet": 22, "findings.parquet": 14}
_PER_ID = 44
_PER_HEAD_DIM, _HEADS = 4_100, 480_000
_PATCHES, _PATCHES_PER_IMAGE = 1_000_000, 131_000


@dataclass(frozen=True)
class _Side:
    """Images or captions: how many there are, how many the run holds already, and how they are embedded.

    Attributes:
        dim: dimensions of the embeddings; None where the weights must be fetched first.
        seconds: of embedding those that are missing, by a sample; None where there is no saying.
    """

    total: int
    held: int
    dim: int | None
    seconds: float | None


def forecast_score(
    dataset: Path,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    precision: str = "auto",
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """What `score` would do with a dataset; nothing is written, and no weights are fetched.

    Args:
        dataset: folder or file.
        out: the run directory that `score` would write to; what it holds is not embedded again.
        recipe: every setting.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
        watch: told notes and progress.

    Returns:
        `rows`, `status` (rows by status, before any image is decoded), `pairs`, `images` and `captions` (each `total`,
        `held` by the run, `dim`, and `seconds` to embed the rest or None), `encoders`, `device`, `precision`, `disk`
        (expected bytes by file, and in all), `memory` (bytes of the embeddings alone), `fetch` (why the encoders
        could not be tried, or None) and `notes`.

    Raises:
        AuditError: of the kind that `score` would end with.
    """
    watch = watch or Silence()
    check_exists(dataset)
    plan = plan_of(recipe, device, precision)
    for note in plan.notes:
        watch.warn(note)
    loaded = load_pairs(
        dataset, load_options(recipe), lambda done, total: watch.progress("load", done, total)
    )
    watch.note(loaded.layout)
    for note in loaded.notes:
        watch.note(note)
    folded = fold(with_corrupt(loaded.pairs))
    if not folded.pair_ids:
        raise DatasetError("not one row has both an image and a caption", "nc-audit runs shows the statuses")
    from nc_audit.encoders import load_encoders
    from nc_audit.hub import unasked

    encoders: Encoders | None = None
    fetch: str | None = None
    try:
        with unasked():
            encoders = load_encoders(plan)
    except EncoderError as problem:
        fetch, is_away, _ = problem.message.partition(" are not in the cache")
        if not is_away:
            raise
        fetch += is_away
    images, captions = _sides(encoders, folded, ImageStore(loaded.roots), out)
    disk = _disk(loaded.pairs, len(folded.pair_ids), images, captions, plan.image, recipe)
    return {
        "rows": len(loaded.pairs),
        "status": loaded.counts,
        "pairs": len(folded.pair_ids),
        "images": vars(images),
        "captions": vars(captions),
        "encoders": {"image": plan.image, "text": plan.text},
        "device": plan.device,
        "precision": plan.precision,
        "disk": disk | {"total": sum(disk.values())},
        "memory": {"embeddings": 2 * sum(side.total * (side.dim or 0) for side in (images, captions))},
        "fetch": fetch,
        "notes": loaded.notes,
    }


def _sides(encoders: Encoders | None, folded: Folded, store: ImageStore, out: Path) -> tuple[_Side, _Side]:
    """What is known of the images, and of the captions."""
    if encoders is None:
        return _Side(len(folded.image_ids), 0, None, None), _Side(len(folded.caption_ids), 0, None, None)
    from nc_audit.embed import Decoding
    from nc_audit.encoders import ImageLearner, TextLearner
    from nc_audit.encoders.patches import DIMS as PATCHES
    from nc_audit.encoders.tfidf import DIMS as TFIDF

    image, text = encoders.image, encoders.text
    if isinstance(image, ImageLearner):
        digest = image.digest_for(digest_of(folded.image_ids))
        missing = _missing(out, "image", digest, folded.image_ids)
        images = _Side(len(folded.image_ids), len(folded.image_ids) - len(missing), PATCHES, None)
    else:
        import torch

        encoder = image
        missing = _missing(out, "image", encoder.digest, folded.image_ids)
        decode = Decoding(
            lambda at: store.read(folded.image_uris[at]), encoder.preprocess, encoder.input_size
        )

        def embed(at: Sequence[int]) -> None:
            good = [one for one, _ in map(decode, at) if one is not None]
            if good:
                encoder.encode(torch.stack(good))

        seconds = _scaled(embed, missing, _SAMPLE_IMAGES)
        images = _Side(len(folded.image_ids), len(folded.image_ids) - len(missing), encoder.dim, seconds)
    if isinstance(text, TextLearner):
        digest = text.digest_for(digest_of(folded.caption_ids))
        missing = _missing(out, "caption", digest, folded.caption_ids)
        return images, _Side(len(folded.caption_ids), len(folded.caption_ids) - len(missing), TFIDF, None)
    tower = text
    missing = _missing(out, "caption", tower.digest, folded.caption_ids)
    seconds = _scaled(
        lambda at: tower.encode([folded.captions[one] for one in at]), missing, _SAMPLE_CAPTIONS
    )
    held = len(folded.caption_ids) - len(missing)
    return images, _Side(len(folded.caption_ids), held, tower.dim, seconds)


def _missing(out: Path, side: str, digest: str, ids: list[str]) -> list[int]:
    """Positions of the ids that the shards of a run do not hold."""
    from nc_audit.embed import EmbeddingStore

    folder = out / "embeddings"
    held = EmbeddingStore(folder).ids(side, digest) if folder.is_dir() else set()
    return [at for at, one in enumerate(ids) if one not in held]


def _scaled(embed: Callable[[Sequence[int]], object], missing: list[int], size: int) -> float:
    """Seconds that embedding all that is missing takes, by some of it, evenly spread."""
    if not missing:
        return 0.0
    sample = missing[:: max(1, len(missing) // size)][:size]
    embed(sample[:1])  # what only the first call takes is not scaled
    start = time.perf_counter()
    embed(sample)
    return (time.perf_counter() - start) * len(missing) / len(sample)


def _most_draws(recipe: Recipe, num_pairs: int) -> int:
    from nc_audit.train.self_paced import most_draws

    return most_draws(recipe.train, num_pairs) if recipe.train.method == "self_paced" else 1


def _disk(
    pairs: pa.Table, num_pairs: int, images: _Side, captions: _Side, image_spec: str, recipe: Recipe
) -> dict[str, int]:
    """Expected bytes by file of what the run still needs."""
    sample = pairs.slice(0, _SAMPLE_ROWS)
    sink = pa.BufferOutputStream()
    pq.write_table(sample, sink, compression="zstd")
    embeddings = sum(
        (side.total - side.held) * (2 * side.dim + _PER_ID) for side in (images, captions) if side.dim
    )
    if image_spec == "patches" and images.held < images.total:
        embeddings += _PATCHES + _PATCHES_PER_IMAGE * min(images.total, images.dim or 0)
    epochs, draws = recipe.train.epochs, _most_draws(recipe, num_pairs)
    heads = _HEADS + _PER_HEAD_DIM * ((images.dim or 0) + (captions.dim or 0))
    return {
        "pairs.parquet": int(sink.tell() * len(pairs) / len(sample)),
        "embeddings": embeddings,
        "model": draws * heads + num_pairs * (draws * _PER_PAIR + epochs * _PER_PAIR_AND_EPOCH),
        **{name: len(pairs) * size for name, size in _PER_ROW.items()},
    }
