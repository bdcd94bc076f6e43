"""Stage 1: any ordinary caption-image dataset as the `pairs` table, one row per pair, in its order, none ever lost."""

from __future__ import annotations

import os
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.dataset.extras import append_extras
from nc_audit.dataset.fetch import fetch_images, is_fetchable
from nc_audit.dataset.ids import content_id, normalise_caption, says_nothing
from nc_audit.dataset.images import Found, ImageFinder, fingerprint
from nc_audit.dataset.layouts import DatasetFile, Plan, read_file, recognise
from nc_audit.dataset.rows import Batch, LoadOptions, counted, is_split_word
from nc_audit.dataset.tables import num_parquet_rows
from nc_audit.errors import DatasetError
from nc_audit.schema import PAIRS, STATUSES

Progress = Callable[[int, int | None], None]

_DEFAULTS = LoadOptions()
_FILES_AT_ONCE = 64
_SLOW = 0.0005  # seconds a file: most of it is waiting and hashing, which threads do side by side
_HOW = {
    "image_root": "{} with an image found below --image-root by the path as given",
    "ending": "{} with an image whose path does not exist here, found by the path's ending",
    "base_name": "{} with an image whose path does not exist here, found by its base name, which is unique",
    "file_name": "{} with an image named by its file name alone, found in a subfolder",
    "one_of_several": "{} with a file name that several images share: the shallowest, first by name, was taken; "
    "check these, or give paths",
    "downloaded": "{} with an image fetched by its URL",
    "refused": "{} with an image that could not be fetched; `status_detail` says why, and --force tries again",
}


@dataclass(frozen=True)
class LoadedDataset:
    """The pairs, and what a user should know about how they were read.

    `layout` names what was recognised; `notes` are plain sentences, every assumption and count worth telling;
    `roots` are the absolute folders behind the root names in `image_uri`; `counts` are the rows of each status.
    """

    pairs: pa.Table
    layout: str
    notes: list[str]
    roots: dict[str, str]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Image:
    """An image as rows refer to it: where it was found, its content hash, and its name in the dataset."""

    found: Found
    image_id: str | None = None
    name: str | None = None


def load_pairs(
    path: Path, options: LoadOptions = _DEFAULTS, progress: Progress | None = None
) -> LoadedDataset:
    """The pairs of a dataset.

    Images are hashed and their headers read; their pixels are not decoded (`mark_corrupt` takes what decoding
    finds). A row with several problems has the status of its image. An image is never read from outside the
    dataset's folder and --image-root, symbolic links followed. Nothing is fetched without `options.downloads`.

    Args:
        path: a folder, or the file that states the pairs.
        options: columns, split, number of rows, and where else images may lie.
        progress: told how many images are read, of how many; None while that is unknown.

    Raises:
        DatasetError: nothing is recognised, a column or split is absent, a file is malformed, or no pair is usable.
    """
    path = Path(path)
    if options.image_root is not None and not Path(options.image_root).is_dir():
        raise DatasetError(
            f"--image-root {options.image_root} is not a folder", "name the folder that holds the images"
        )
    if options.limit is not None and options.limit < 1:
        raise DatasetError(f"the limit is {options.limit} rows", "give at least 1, or leave it out")
    plan = recognise(path, options)
    finder = ImageFinder(plan.root, Path(options.image_root) if options.image_root is not None else None)
    notes = list(plan.notes)
    rows, sources = _gathered(plan, options, finder, notes, progress)
    if not len(rows):
        raise DatasetError(f"{path} has no rows", "check that it is the file you mean")
    _make_storable(rows, notes)
    images, row_image = _images_of(rows, sources, finder, options.downloads, progress)
    pairs = _table(rows, sources, images, row_image)
    counts = {one["values"]: one["counts"] for one in pc.value_counts(pairs["status"]).to_pylist()}
    counts = {status: counts[status] for status in STATUSES if status in counts}
    if not counts.get("ok"):
        raise _nothing_usable(path, counts, pairs, options)
    notes += _notes_on(pairs, images, row_image, finder, options)
    return LoadedDataset(pairs, plan.layout, list(dict.fromkeys(notes)), finder.roots, counts)


def _gathered(
    plan: Plan, options: LoadOptions, finder: ImageFinder, notes: list[str], progress: Progress | None
) -> tuple[Batch, list[str]]:
    """All rows wanted, and the source of each."""
    rows, sources, splits = Batch(""), list[str](), Counter[str]()
    sizes = [num_parquet_rows(file.path) if file.form == "parquet" else 0 for file in plan.files]
    total = sum(sizes)
    by_name: set[str] = set()
    num_before = 0
    for file, size in zip(plan.files, sizes, strict=True):
        inside = _is_inside(file, finder)

        def on_rows(number: int, before: int = num_before) -> None:
            if progress and total:
                progress(before + number, total)

        batches: Iterator[Batch] = read_file(file, options, notes, inside, on_rows)
        for batch in batches:
            if file.kind == "metadata" and file.split is None:
                _split_by_folder(batch, notes)
            if file.split is not None and file.split in batch.split:
                by_name.add(file.split)
            kept = _wanted(batch, options, splits, len(rows))
            rows.extend(kept)
            sources += [file.source] * len(kept)
            if options.limit is not None and len(rows) >= options.limit:
                break
        num_before += size
        if options.limit is not None and len(rows) >= options.limit:
            notes.append(f"loaded only as far as --limit: {counted(len(rows), 'row')}")
            break
    if by_name:
        notes.append(f"the split is taken from the file's or folder's name: {', '.join(sorted(by_name))}")
    if options.split is not None and not len(rows):
        known = ", ".join(sorted(splits))
        message = f"no row has split {options.split}"
        raise DatasetError(
            message, f"splits: {known}" if known else "the dataset states no splits", splits=sorted(splits)
        )
    return rows, sources


def _is_inside(file: DatasetFile, finder: ImageFinder) -> bool:
    real = str(file.path.resolve())
    return any(real.startswith(top.rstrip("/") + "/") for top in finder.roots.values())


def _split_by_folder(batch: Batch, notes: list[str]) -> None:
    """In an ImageFolder the first folder of an image's path is its split, where it is called like one."""
    is_met = False
    for at, (image, split) in enumerate(zip(batch.image, batch.split, strict=True)):
        if split is None and image and "/" in image:
            first = image.removeprefix("./").split("/", 1)[0]
            if is_split_word(first):
                batch.split[at] = first
                is_met = True
    if is_met:
        notes.append("the split is taken from the first folder of the image's path")


def _wanted(batch: Batch, options: LoadOptions, splits: Counter[str], num_rows: int) -> Batch:
    """The rows of the wanted split, up to the limit."""
    if options.split is None:
        room = None if options.limit is None else options.limit - num_rows
        return batch if room is None or len(batch) <= room else batch.take(list(range(room)))
    splits.update(split for split in batch.split if split is not None)
    positions = [at for at, split in enumerate(batch.split) if split == options.split]
    if options.limit is not None:
        positions = positions[: options.limit - num_rows]
    return batch.take(positions)


def _make_storable(rows: Batch, notes: list[str]) -> None:
    """Replace what no UTF-8 file can hold: halves of surrogate pairs, which json escapes can spell."""
    num_replaced = 0
    for column in (rows.image, rows.caption, rows.split):
        try:
            pa.array(column, pa.large_string())
        except UnicodeEncodeError:
            for at, value in enumerate(column):
                if value is not None:
                    clean = value.encode("utf-8", "replace").decode("utf-8")
                    num_replaced += clean != value
                    column[at] = clean
    if num_replaced:
        cells = counted(num_replaced, "cell")
        notes.append(f"{cells} with characters that are no Unicode text; each was replaced by ?")


def _images_of(
    rows: Batch, sources: list[str], finder: ImageFinder, downloads: Path | None, progress: Progress | None
) -> tuple[list[_Image], np.ndarray]:
    """The images that rows refer to, each looked for and read once, and the index of each row's image, shape [N]."""
    row_image = np.empty(len(rows), np.int64)
    images: list[_Image] = []
    known: dict[tuple[str, str, str | None], int] = {}
    wanted: list[tuple[int, str, str, str | None]] = []
    for at, image in enumerate(rows.image):
        if at in rows.embedded:
            held = rows.embedded[at]
            uri = held.uri if held.status != "outside_root" else None
            images.append(
                _Image(Found(held.status, held.detail, uri, None, "embedded"), held.image_id, image)
            )
            row_image[at] = len(images) - 1
        elif image is None or at in rows.image_remarks:
            detail = rows.image_remarks.get(at, "the row names no image")
            images.append(_Image(Found("missing_image", detail), None, image))
            row_image[at] = len(images) - 1
        else:
            key = (image, sources[at], rows.split[at])
            number = known.get(key)
            if number is None:
                number = known[key] = len(images)
                images.append(_Image(Found("missing_image")))
                wanted.append((number, *key))
            row_image[at] = number
    for number, image, source, split in wanted:
        images[number] = _Image(finder.find(image, posixpath.dirname(source), split), None, image)
    for number, image, *_ in wanted:
        images[number] = _Image(finder.outside_or_missing(images[number].found), None, image)
    if downloads is not None:
        _fetch(images, downloads, finder, progress)
    paths = list(dict.fromkeys(image.found.path for image in images if image.found.path is not None))
    prints = _fingerprints(paths, progress)
    for number, image, *_ in wanted:
        found = images[number].found
        if found.path is not None:
            image_id, problem = prints[found.path]
            found = replace(found, status="corrupt_image", detail=problem) if problem else found
            images[number] = _Image(found, image_id, image)
    return images, row_image


def _fetch(images: list[_Image], downloads: Path, finder: ImageFinder, progress: Progress | None) -> None:
    """Put what the URLs among the images lead to in their place."""
    places: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        if image.found.status == "remote_image" and image.name is not None:
            if is_fetchable(image.name):
                places.setdefault(image.name, []).append(number)
            else:
                found = replace(image.found, detail="the image is a URL; only http and https are fetched")
                images[number] = replace(image, found=found)
    if not places:
        return
    finder.roots["downloads"] = str(downloads.resolve())
    for url, found in fetch_images(list(places), downloads, progress=progress).items():
        for number in places[url]:
            images[number] = replace(images[number], found=found)


def _fingerprints(paths: list[str], progress: Progress | None) -> dict[str, tuple[str | None, str | None]]:
    """Content hash and problem of each file.

    Small files that need no waiting are read by this thread alone: several would mostly wait for Python.
    """
    prints: dict[str, tuple[str | None, str | None]] = {}
    stretches = iter(
        [paths[start : start + _FILES_AT_ONCE] for start in range(0, len(paths), _FILES_AT_ONCE)]
    )

    def read(stretch: list[str]) -> list[tuple[str, tuple[str | None, str | None]]]:
        return [(one, fingerprint(one)) for one in stretch]

    def keep(found: list[tuple[str, tuple[str | None, str | None]]]) -> None:
        prints.update(found)
        if progress:
            progress(len(prints), len(paths))

    slow_in_a_row = 0  # the first stretch is slow in any case: decoders are imported
    for stretch in stretches:
        start = time.perf_counter()
        keep(read(stretch))
        slow_in_a_row = slow_in_a_row + 1 if time.perf_counter() - start > _SLOW * len(stretch) else 0
        if slow_in_a_row == 2:
            break
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for found in pool.map(read, stretches):
            keep(found)
    return prints


def _table(rows: Batch, sources: list[str], images: list[_Image], row_image: np.ndarray) -> pa.Table:
    """The `pairs` table; see `schema.PAIRS`. Other columns of the input follow."""
    num_rows = len(rows)
    caption_ids, caption_status, caption_code = _captions_of(rows)
    at = pa.array(row_image)

    def per_row(values: list[str | None]) -> pa.Array:
        return pa.array(values, pa.string()).take(at)

    image_ok = np.array([image.found.status == "ok" for image in images], dtype=bool)[row_image]
    status = pc.if_else(pa.array(image_ok), caption_status, per_row([image.found.status for image in images]))
    detail = per_row([image.found.detail for image in images]).to_pylist()
    for row in np.flatnonzero(image_ok & ~np.asarray(pc.equal(caption_status, "ok"), dtype=bool)).tolist():
        detail[row] = _caption_problem(rows.caption[row], rows.caption_remarks.get(row))
    pair_ids, first = _pair_ids(images, row_image, caption_ids, caption_code)
    duplicate_of = pa.array(first, mask=first == np.arange(num_rows))
    columns = {
        "row": pa.array(np.arange(num_rows)),
        "pair_id": pair_ids,
        "image_id": per_row([image.image_id for image in images]),
        "caption_id": pa.array(caption_ids, pa.string()).take(pa.array(caption_code, mask=caption_code < 0)),
        "image": pa.array(rows.image, pa.string()),
        "caption": pa.array(rows.caption, pa.string()),
        "split": pa.array(rows.split, pa.string()),
        "source": pa.array(sources, pa.string()),
        "status": status,
        "status_detail": pa.array(detail, pa.string()),
        "image_uri": per_row([image.found.uri for image in images]),
        "resolved_by": per_row([image.found.resolved_by for image in images]),
        "duplicate_of": duplicate_of,
        "known_noise": pa.array(rows.known_noise, pa.bool_()),
    }
    return append_extras(pa.table(columns, schema=PAIRS), rows.extras)


def _captions_of(rows: Batch) -> tuple[list[str], pa.Array, np.ndarray]:
    """The distinct caption ids, each row's caption status, and the index of its id (-1: none); shape [N]."""
    known: dict[str, int] = {}
    number_of: dict[str, int] = {}
    code = np.full(len(rows), -1, np.int64)
    is_null = np.zeros(len(rows), dtype=bool)
    for at, caption in enumerate(rows.caption):
        if caption is None:
            is_null[at] = True
            continue
        number = number_of.get(caption)
        if number is None:
            number = -1
            if not says_nothing(caption):
                normal = normalise_caption(caption)
                number = known.setdefault(normal, len(known))
            number_of[caption] = number
        code[at] = number
    status = np.where(is_null, "missing_caption", np.where(code < 0, "empty_caption", "ok"))
    return [content_id(normal) for normal in known], pa.array(status, pa.string()), code


def _caption_problem(caption: str | None, remark: str | None) -> str:
    if caption is None:
        return remark or "the caption cell is null"
    return "the caption holds only punctuation" if caption.strip() else "the caption is empty"


def _pair_ids(
    images: list[_Image], row_image: np.ndarray, caption_ids: list[str], caption_code: np.ndarray
) -> tuple[pa.Array, np.ndarray]:
    """The pair id of each row, and the first row that has it; shape [N]."""
    keys: dict[str, int] = {}
    codes = [keys.setdefault(one.image_id or f"image:{one.name or ''}", len(keys)) for one in images]
    image_code = np.array(codes, np.int64)[row_image]
    names, captions = list(keys), ["", *caption_ids]
    combined = image_code * len(captions) + (caption_code + 1)
    distinct, first, inverse = np.unique(combined, return_index=True, return_inverse=True)
    parts = (divmod(one, len(captions)) for one in distinct.tolist())
    ids = [content_id(names[image], captions[caption]) for image, caption in parts]
    return pa.array(ids, pa.string()).take(pa.array(inverse)), first[inverse]


def _notes_on(
    pairs: pa.Table, images: list[_Image], row_image: np.ndarray, finder: ImageFinder, options: LoadOptions
) -> list[str]:
    """What finding the images and comparing the rows showed."""
    used = Counter({images[number].found.how: 0 for number in range(len(images))})
    for number, times in enumerate(np.bincount(row_image, minlength=len(images)).tolist()):
        used[images[number].found.how] += times
    notes = [sentence.format(counted(used[how], "row")) for how, sentence in _HOW.items() if used[how]]
    for link, target in sorted(finder.linked_outside.items()):
        notes.append(
            f"{link} is a symbolic link to {target}, outside the dataset; --image-root {target} lets it be read"
        )
    statuses = Counter(pairs["status"].to_pylist())
    if statuses["outside_root"]:
        rows = counted(statuses["outside_root"], "row")
        notes.append(
            f"{rows} with an image outside the dataset's folder: name its folder with --image-root DIR"
        )
    num_missing = sum(
        images[number].found.status == "missing_image" and images[number].found.how != "refused"
        for number in row_image.tolist()
    )
    if num_missing and options.image_root is None:
        rows = counted(num_missing, "row")
        notes.append(f"{rows} with an image that is not there; if it lies elsewhere: --image-root DIR")
    if statuses["remote_image"]:
        rows = counted(statuses["remote_image"], "row")
        notes.append(f"{rows} with an image given by URL: --allow-network fetches http and https")
    num_copies = len(pairs) - pairs["duplicate_of"].null_count
    if num_copies:
        notes.append(
            f"copies of an earlier pair, each scored once: {num_copies:,} of {counted(len(pairs), 'row')}"
        )
    return notes


def _nothing_usable(
    path: Path, counts: dict[str, int], pairs: pa.Table, options: LoadOptions
) -> DatasetError:
    said = ", ".join(f"{number:,} {status}" for status, number in counts.items())
    worst = max(counts, key=lambda status: counts[status])
    hint = {
        "missing_image": "name the folder of the images with --image-root DIR",
        "outside_root": "name the folder of the images with --image-root DIR",
        "remote_image": "--allow-network fetches images given by http and https",
        "empty_caption": "name the right column with --caption-column",
        "missing_caption": "name the right column with --caption-column",
        "corrupt_image": "check that the files are images",
    }[worst]
    if options.image_root is not None and "--image-root" in hint:
        hint = f"check that {options.image_root} is the folder of the images"
    example = pairs.filter(pc.equal(pairs["status"], worst)).slice(0, 1).to_pylist()[0]
    shown = f"; row {example['row']:,}: {str(example['image'])[:200]!r}: {example['status_detail']}"
    return DatasetError(
        f"{path} has no usable pair among {len(pairs):,} rows: {said}{shown}", hint, counts=counts
    )
