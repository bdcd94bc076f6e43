"""Finding image files below the allowed roots, reading them by `image_uri`, and decoding hostile bytes.

Two roots exist: `dataset`, the folder of the dataset, and `image_root`, the folder given by --image-root. A file
is read only when its real path, symbolic links followed, lies below one of them, or, for a dataset in the hub's
cache, below its `blobs` (the root `hub`). Fetched images lie below `downloads`.
"""

# ruff: noqa: PTH114, PTH116, PTH117, PTH118
# Paths stay strings here: a million of them are joined and compared as text, which Path does twenty times slower.

from __future__ import annotations

import bisect
import contextlib
import functools
import gzip
import io
import os
import re
import stat
import threading
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nc_audit.dataset.ids import content_id
from nc_audit.dataset.places import blobs_of
from nc_audit.errors import DatasetError

MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 30
MANIFEST = "run.json"
PARQUET_ENDINGS = (".parquet", ".pq")

# Formats whose decoders run no outside program and read no other file; Pillow knows more.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "JPEG2000", "PPM", "AVIF", "ICO")
_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DRIVE = re.compile(r"[a-z]:(?=[/\\])", re.IGNORECASE)
_EMBEDDED = re.compile(r"(.+\.(?:parquet|pq|arrow))#(\d+)(?::(.+))?", re.IGNORECASE | re.DOTALL)
_MEMBER = re.compile(r"(.+?\.(?:tar|tar\.gz|tgz))#(\d{1,18})\+(\d{1,18}):(.*)", re.IGNORECASE | re.DOTALL)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CACHED_ROW_GROUP = 256 << 20
_STREAMED_ROWS = 32


@dataclass(frozen=True)
class Found:
    """Where an image is, or why it is not to be had.

    `how` counts towards the notes (`path`, `ending`, `image_root`, `base_name`, `file_name`, `one_of_several`);
    `mapped_from` is the folder, as the dataset names it, of a path that was found by its base name only.
    """

    status: str
    detail: str | None = None
    uri: str | None = None
    path: str | None = None
    resolved_by: str | None = None
    how: str = ""
    mapped_from: str | None = None


class ImageFinder:
    """Looks for the images that a dataset names, below its folder and below --image-root.

    In this order: the path as given (below --image-root, below the folder of the file that names it, below the
    dataset's folder); the longest ending of the path, two parts or more, that exists there; a file with the same
    base name anywhere below --image-root, then below the dataset's folder. A path with folders is found by its
    base name only when that is unique. A bare file name may be ambiguous: then the file whose folders name the
    row's split is taken, else the shallowest, else the first by name.
    """

    def __init__(self, dataset: Path, image_root: Path | None = None) -> None:
        self.roots: dict[str, str] = {"dataset": str(dataset.resolve())}
        blobs = blobs_of(dataset)
        if blobs is not None:
            self.roots["hub"] = str(blobs)
        if image_root is not None:
            self.roots["image_root"] = str(image_root.resolve())
        self.num_mapped: dict[str, int] = {}
        self.linked_outside: dict[str, str] = {}
        self._real_folders: dict[str, str] = {}
        self._indices: dict[str, dict[str, list[str]]] = {}

    def find(self, image: str, folder: str = "", split: str | None = None) -> Found:
        """Where an image is.

        Args:
            image: path, file name or URL as the dataset gives it.
            folder: folder, relative to the dataset's, of the file that names the image.
            split: split of the row, to tell files of one name apart.
        """
        if image.lower().startswith("file:"):
            image = unquote(re.sub(r"^file:(//[^/]*)?", "", image, flags=re.IGNORECASE))
        if _REMOTE.match(image):
            return Found("remote_image", "the image is a URL; nothing is fetched")
        if not image.strip():
            return Found("missing_image", "the row names no image")
        if "\0" in image:
            return Found("missing_image", "the path holds a null character")
        given = image.strip() if not self._exists_as_given(image, folder) else image
        problems: list[Found] = []
        for path in dict.fromkeys((given, given.replace("\\", "/"))):
            found = self._by_path(path, folder, problems)
            if found:
                return found
        path = _DRIVE.sub("", given.replace("\\", "/"))
        found = self._by_ending(path, folder, problems) or self._by_base_name(path, split, problems)
        if found:
            return found
        return self._not_found(given, path, folder, problems)

    def outside_or_missing(self, found: Found) -> Found:
        """A path outside every root is `missing_image` when its folder is known to stand for one of ours.

        That is so when --image-root is given, or when other images of the same foreign folder were found by their
        base name. Call it when every image has been looked for, so that the order of rows does not matter.
        """
        if found.status != "outside_root" or found.how != "foreign":
            return found
        if "image_root" in self.roots or self.num_mapped.get(found.mapped_from or ""):
            return Found("missing_image", "no file with this base name below " + self._names_of_roots())
        return found

    def _names_of_roots(self) -> str:
        words = {"dataset": "the dataset's folder", "image_root": "--image-root"}
        return " or ".join(words[name] for name in self.roots if name in words)

    def _exists_as_given(self, image: str, folder: str) -> bool:
        return image != image.strip() and os.path.lexists(os.path.join(self.roots["dataset"], folder, image))

    def _bases(self, folder: str) -> list[tuple[str, str]]:
        bases = [("image_root", self.roots["image_root"])] if "image_root" in self.roots else []
        bases.append(
            ("dataset", os.path.join(self.roots["dataset"], folder) if folder else self.roots["dataset"])
        )
        return bases if not folder else [*bases, ("dataset", self.roots["dataset"])]

    def _by_path(self, path: str, folder: str, problems: list[Found]) -> Found | None:
        if os.path.isabs(path):
            plain = os.path.normpath(path)
            # The dataset itself may be named through a symbolic link.
            targets = [(root, target) for target in (plain, self.real_path(plain)) for root in self.roots]
        else:
            bases = self._bases(folder)
            targets = [(root, os.path.normpath(os.path.join(base, path))) for root, base in bases]
            if ".." in path:
                targets += [
                    (other, target) for root, target in targets for other in self.roots if other != root
                ]
        for root, target in targets:
            if _is_below(target, self.roots[root]):
                found = self._take(root, target, "path" if root == "dataset" else "image_root", problems)
                if found:
                    return found
        return None

    def _by_ending(self, path: str, folder: str, problems: list[Found]) -> Found | None:
        parts = _parts(path)
        first = 0 if path.startswith("/") or ".." in path.split("/") else 1
        for start in range(first, len(parts) - 1):
            ending = os.path.join(*parts[start:])
            for root, base in self._bases(folder):
                found = self._take(root, os.path.join(base, ending), "ending", problems)
                if found:
                    return found
        return None

    def _by_base_name(self, path: str, split: str | None, problems: list[Found]) -> Found | None:
        parts = _parts(path)
        if not parts:
            return None
        is_bare = "/" not in path
        for root in ("image_root", "dataset"):
            candidates = self._index(root).get(_spelt(parts[-1]), []) if root in self.roots else []
            if not candidates:
                continue
            if len(candidates) > 1 and not is_bare:
                some = ", ".join(candidates[:3]) + (", ..." if len(candidates) > 3 else "")
                detail = f"{len(candidates)} files are called {parts[-1]}: {some}"
                problems.append(Found("missing_image", detail))
                return None
            chosen, how = candidates[0], "file_name" if is_bare else "base_name"
            if len(candidates) > 1:
                of_split = [
                    one for one in candidates if split and split.lower() in one.lower().split("/")[:-1]
                ]
                chosen = of_split[0] if of_split else chosen
                how = "file_name" if len(of_split) == 1 else "one_of_several"
            found = self._take(root, os.path.join(self.roots[root], chosen), how, problems)
            if found:
                if not is_bare:
                    parent = path.rpartition("/")[0]
                    self.num_mapped[parent] = self.num_mapped.get(parent, 0) + 1
                return found
        return None

    def _take(self, root: str, target: str, how: str, problems: list[Found]) -> Found | None:
        """The file at `target` when it is a regular file whose real path lies below a root."""
        try:
            facts = os.stat(target)
        except (OSError, ValueError):
            return None
        real = self.real_path(target)
        relative = target[len(self.roots[root].rstrip("/")) + 1 :]
        if not any(_is_below(real, top) for top in self.roots.values()):
            detail = f"{relative} leads through a symbolic link to {real}, outside " + self._names_of_roots()
            problems.append(Found("outside_root", detail))
            return None
        if stat.S_ISDIR(facts.st_mode):
            problems.append(Found("missing_image", f"{relative} is a folder"))
            return None
        if not stat.S_ISREG(facts.st_mode):
            problems.append(Found("missing_image", f"{relative} is not a regular file"))
            return None
        resolved_by = {
            "one_of_several": "file_name",
            "ending": "path" if root == "dataset" else "image_root",
        }.get(how, how)
        return Found("ok", None, f"{root}:{relative}", real, resolved_by, how)

    def real_path(self, target: str) -> str:
        """The path with symbolic links followed; folders are remembered, as many images share one."""
        folder, name = os.path.split(target)
        if os.path.islink(target):
            return os.path.realpath(target)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)

    def _not_found(self, given: str, path: str, folder: str, problems: list[Found]) -> Found:
        for status in ("outside_root", "missing_image"):
            for problem in problems:
                if problem.status == status:
                    return problem
        if "/" not in path:
            for link, target in self.linked_outside.items():
                if os.path.lexists(os.path.join(target, path)):
                    return Found(
                        "outside_root",
                        f"{link} is a symbolic link to {target}, outside " + self._names_of_roots(),
                    )
        targets = (
            [given] if os.path.isabs(given) else [os.path.join(base, path) for _, base in self._bases(folder)]
        )
        if _DRIVE.match(given) or not any(
            _is_below(os.path.normpath(target), top) for target in targets for top in self.roots.values()
        ):
            try:
                exists = any(os.path.lexists(target) for target in targets)
            except ValueError:
                exists = False
            parent = path.rpartition("/")[0]
            how = "outside" if exists else "foreign"
            return Found(
                "outside_root",
                "the path leads outside " + self._names_of_roots(),
                how=how,
                mapped_from=parent,
            )
        return Found("missing_image", f"no such file below {self._names_of_roots()}")

    def _index(self, root: str) -> dict[str, list[str]]:
        """Relative paths of the files below a root by base name, the shallowest first.

        Hidden folders are left out, and runs: their exports may hold copies of the images.
        """
        if root in self._indices:
            return self._indices[root]
        top = self.roots[root]
        names: dict[str, list[str]] = {}
        for folder, folders, files in os.walk(top):
            if folder != top and MANIFEST in files:
                folders.clear()
                continue
            for name in folders:
                full = os.path.join(folder, name)
                if os.path.islink(full):
                    real = os.path.realpath(full)
                    if not any(_is_below(real, allowed) for allowed in self.roots.values()):
                        self.linked_outside[os.path.relpath(full, top)] = real
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            prefix = "" if folder == top else os.path.relpath(folder, top) + "/"
            for name in files:
                names.setdefault(_spelt(name), []).append(prefix + name)
        for paths in names.values():
            paths.sort(key=lambda path: (path.count("/"), path))
        self._indices[root] = names
        return names


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _parts(path: str) -> list[str]:
    """The parts of a path after its last step upwards."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        parts = parts[len(parts) - parts[::-1].index("..") :]
    return parts


def _spelt(name: str) -> str:
    """A file name with its accents composed: macOS stores them decomposed."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def fingerprint(path: str) -> tuple[str | None, str | None]:
    """Content hash of an image file, and what is wrong with it, if anything; its header is read, not its pixels.

    Returns:
        `image_id` (None where the file cannot be read) and the problem (None where there is none).
    """
    try:
        data = _read_file(path)
    except (OSError, DatasetError) as problem:
        return None, problem.message if isinstance(
            problem, DatasetError
        ) else f"cannot be read: {problem.strerror}"
    return content_id(data), header_problem(data)


def header_problem(data: bytes) -> str | None:
    """What an image's first bytes already tell against it; None when they promise an image within the pixel limit."""
    try:
        _open(data).close()
    except DatasetError as problem:
        return problem.message
    return None


def promises_image(start: bytes) -> bool:
    """Whether a file's first bytes are those of a format that is read; 16 are looked at, fewer promise nothing."""
    accepts = (Image.OPEN[name][1] for name in _formats())
    return len(start) >= 16 and any(accept is not None and accept(start[:16]) is True for accept in accepts)


def decode_image(data: bytes, size_hint: tuple[int, int] | None = None) -> Image.Image:
    """An image as upright RGB, 8 bits a channel.

    Turned as its EXIF orientation says; transparency laid over white; 16-bit channels scaled from 0..65535;
    integers beyond that, and floats beyond 0..1 and 0..255, stretched from their smallest to their largest value;
    the first frame of an animation; colour profiles not applied.

    Args:
        data: the bytes of an image file.
        size_hint: width and height, in pixels, of what the image will be reduced to. A JPEG may be decoded at a
            half, a quarter or an eighth of its size, never below the hint in either direction.

    Returns:
        The image, its pixels loaded.

    Raises:
        DatasetError: not an image, truncated, broken, or more than 178,956,970 pixels.
    """
    image = _open(data)
    try:
        orientation = _orientation(image)
        if size_hint and image.format in ("JPEG", "MPO"):
            width, height = size_hint
            image.draft(None, (height, width) if orientation >= 5 else (width, height))
        image.load()
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        rgb = _as_rgb(upright)
        rgb.info.clear()  # an orientation left behind would be applied twice
        return rgb
    except Exception as problem:  # decoders of hostile bytes raise anything, from KeyError to struct.error
        raise DatasetError(
            f"the image cannot be decoded: {_one_line(problem)}", "replace the file"
        ) from problem


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DatasetError("the file is empty (0 bytes)", "replace the file")
    if _PILLOW_WARNINGS not in warnings.filters:
        # Pillow warns about metadata and large sizes; what matters of it comes back as a status.
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError as problem:
        raise DatasetError("the file is not an image of a known format", "replace the file") from problem
    except Image.DecompressionBombError as problem:
        raise DatasetError(
            f"the image has more than {MAX_PIXELS:,} pixels", "scale it down first"
        ) from problem
    except Exception as problem:  # header parsers of hostile bytes raise anything too
        raise DatasetError(
            f"the image's header is broken: {_one_line(problem)}", "replace the file"
        ) from problem
    width, height = image.size
    if width * height > MAX_PIXELS:
        message = f"the image has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}"
        raise DatasetError(message, "scale it down first")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata does not make a broken image
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(np.asarray(image))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _scaled(values: np.ndarray) -> Image.Image:
    """Grey levels beyond 8 bits as RGB; see `decode_image`."""
    levels = values.astype(np.float64)
    levels[~np.isfinite(levels)] = 0
    low, high = float(levels.min()), float(levels.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        scaled = levels * (255 if high <= 1 else 1)
    elif values.dtype.kind != "f" and low >= 0 and high <= 65535:
        scaled = levels / 257
    else:
        scaled = (levels - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def _read_file(path: str) -> bytes:
    # O_NONBLOCK: a named pipe put in the place of an image must not hang the run.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise DatasetError("not a regular file", "replace the file")
        if facts.st_size > MAX_BYTES:
            raise DatasetError(
                f"the file has {facts.st_size:,} bytes, more than {MAX_BYTES:,}", "replace the file"
            )
        return file.read()


def open_stream(path: str) -> IO[bytes]:
    """A file's bytes as a stream one can seek in, decompressed where they are gzip's."""
    file = Path(path).open("rb")  # noqa: SIM115
    if file.read(2) == b"\x1f\x8b":
        file.close()
        return cast(IO[bytes], gzip.open(path, "rb"))
    file.seek(0)
    return file


@contextlib.contextmanager
def arrow_batches(path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the batches of an Arrow file, mapped into memory, whether a stream or a file with a footer.

    Nothing is validated; ArrowException where the file is neither, or breaks off.
    """
    with pa.memory_map(path, "rb") as file:
        if file.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(file)
            yield whole.schema, (whole.get_batch(at) for at in range(whole.num_record_batches))
        else:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            yield stream.schema, iter(stream)


def embedded_columns(schema: pa.Schema) -> list[str]:
    """Columns of a Parquet file that can hold images: structs with `bytes`, and binary columns, likely ones first."""
    columns = []
    for column in schema:
        if pa.types.is_struct(column.type):
            names = {child.name: child.type for child in column.type}
            if _is_binary(names.get("bytes")):
                columns.append((0, column.name))
        elif _is_binary(column.type):
            columns.append(
                (1 if re.search("image|img|jpg|png|bytes", column.name, re.IGNORECASE) else 2, column.name)
            )
    return [name for _, name in sorted(columns, key=lambda column: column[0])]


def _is_binary(type_: pa.DataType | None) -> bool:
    return type_ is not None and (pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def bytes_of(column: pa.Array) -> pa.Array:
    """The binary child of an image column (itself when it is binary), nulls of the struct kept."""
    if not pa.types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


class ImageStore:
    """Reads the bytes of images by `image_uri`, only below the named roots; safe to share between threads.

    A URI is the root's name, a colon and the path below it; for an image inside a Parquet or Arrow file
    followed by `#row` (and `:column` where the file holds several image columns), inside a tar shard by
    `#offset+size:member`. The row group of the last such image stays in
    memory, unless it is larger than 256 MB: then rows are streamed. Read embedded images in `reading_order`.
    """

    def __init__(self, roots: Mapping[str, str | Path]) -> None:
        self.roots = {name: str(Path(folder).resolve()) for name, folder in roots.items()}
        self._lock = threading.Lock()
        self._shard: tuple[str, gzip.GzipFile] | None = None
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._rows: tuple[tuple[str, str], int, pa.Array] | None = None
        self._stream: tuple[tuple[str, str, int], int, Iterator[pa.RecordBatch]] | None = None
        self._mapped: tuple[tuple[str, str], list[int], list[pa.Array]] | None = None

    def __reduce__(self) -> tuple[type[ImageStore], tuple[dict[str, str]]]:
        """Workers open their own files."""
        return ImageStore, (self.roots,)

    def read(self, uri: str) -> bytes:
        """The bytes of an image.

        Raises:
            DatasetError: the URI is malformed, leads outside the roots, or its file or row cannot be read.
        """
        member = _MEMBER.fullmatch(uri)
        if member:
            with self._lock:
                return self._read_member(self.path_of(member[1]), int(member[2]), int(member[3]), uri)
        embedded = _EMBEDDED.fullmatch(uri)
        if embedded:
            path, row, column = self.path_of(embedded[1]), int(embedded[2]), embedded[3]
            try:
                with self._lock:
                    read = self._read_mapped if embedded[1].lower().endswith(".arrow") else self._read_row
                    return read(path, row, column, uri)
            except (pa.ArrowException, OSError) as problem:
                raise DatasetError(
                    f"{uri} cannot be read: {_one_line(problem)}", "load the dataset again"
                ) from problem
        path = self.path_of(uri)
        try:
            return _read_file(path)
        except OSError as problem:
            message = f"{uri} cannot be read: {problem.strerror}"
            raise DatasetError(message, "was it moved since the dataset was loaded?") from problem

    def path_of(self, uri: str) -> str:
        """The real path of a URI's file.

        Raises:
            DatasetError: the root is unknown, or the path leads outside every root.
        """
        root, colon, relative = uri.partition(":")
        if not colon or root not in self.roots:
            raise DatasetError(f"{uri} names no known root", "roots: " + ", ".join(sorted(self.roots)))
        try:
            real = os.path.realpath(os.path.join(self.roots[root], relative))
        except (OSError, ValueError) as problem:
            raise DatasetError(f"{uri!r} is not a path: {problem}") from problem
        if not any(_is_below(real, top) for top in self.roots.values()):
            raise DatasetError(
                f"{uri} leads outside the dataset's folder", "name the folder with --image-root DIR"
            )
        return real

    def reading_order(self, uris: Sequence[str]) -> list[int]:
        """Positions of the URIs in the order that reads every file, and every row group, once from its start."""

        def place(at: int) -> tuple[str, int]:
            member = _MEMBER.fullmatch(uris[at])
            if member:
                return member[1], int(member[2])
            embedded = _EMBEDDED.fullmatch(uris[at])
            return (embedded[1], int(embedded[2])) if embedded else (uris[at], -1)

        return sorted(range(len(uris)), key=place)

    def _read_member(self, path: str, offset: int, size: int, uri: str) -> bytes:
        """Bytes of a shard; a compressed one stays open, so that it is decompressed once when read in order."""
        if size > MAX_BYTES:
            raise DatasetError(f"{uri} has {size:,} bytes, more than {MAX_BYTES:,}", "replace the shard")
        try:
            if self._shard is not None and self._shard[0] != path:
                self._shard[1].close()
                self._shard = None
            file = self._shard[1] if self._shard is not None else open_stream(path)
            try:
                file.seek(offset)
                data = file.read(size)
            finally:
                if isinstance(file, gzip.GzipFile):
                    self._shard = (path, file)
                else:
                    file.close()
        except (OSError, EOFError, zlib.error, ValueError) as problem:
            raise DatasetError(
                f"{uri} cannot be read: {_one_line(problem)}", "load the dataset again"
            ) from problem
        if len(data) < size:
            raise DatasetError(f"{uri} is beyond the end of its shard", "load the dataset again")
        return data

    def _read_mapped(self, path: str, row: int, column: str | None, uri: str) -> bytes:
        """Bytes of an Arrow file; its column stays mapped, so that a row is a look into memory."""
        key = (path, column or "")
        if self._mapped is None or self._mapped[0] != key:
            ends, arrays = list[int](), list[pa.Array]()
            with arrow_batches(path) as (schema, batches):
                names = embedded_columns(schema)
                name = column or (names[0] if names else "")
                if name not in names:
                    raise DatasetError(f"{uri} names no image column", "load the dataset again")
                for batch in batches:
                    values = batch.column(name)
                    values.validate(full=True)
                    arrays.append(bytes_of(values))
                    ends.append((ends[-1] if ends else 0) + len(batch))
            self._mapped = (key, ends, arrays)
        _, ends, arrays = self._mapped
        at = bisect.bisect_right(ends, row)
        if at == len(ends):
            rows = ends[-1] if ends else 0
            raise DatasetError(f"{uri} is beyond the {rows:,} rows of its file", "load the dataset again")
        value = arrays[at][row - ends[at]]
        if not value.is_valid:
            raise DatasetError(f"{uri} holds no bytes", "load the dataset again")
        return cast(bytes, value.as_py())

    def _read_row(self, path: str, row: int, column: str | None, uri: str) -> bytes:
        file = self._opened(path)
        names = embedded_columns(file.schema_arrow)
        name = column or (names[0] if names else "")
        if name not in names:
            raise DatasetError(f"{uri} names no image column", "load the dataset again")
        held = self._rows
        if not held or held[0] != (path, name) or not held[1] <= row < held[1] + len(held[2]):
            self._rows = held = self._load_rows(file, path, row, name, uri)
        value = held[2][row - held[1]]
        if not value.is_valid:
            raise DatasetError(f"{uri} holds no bytes", "load the dataset again")
        return cast(bytes, value.as_py())

    def _opened(self, path: str) -> pq.ParquetFile:
        if self._file is None or self._file[0] != path:
            if self._file is not None:
                self._rows = self._stream = None
                self._file[1].close()
            self._file = (path, pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16))
        return self._file[1]

    def _load_rows(
        self, file: pq.ParquetFile, path: str, row: int, name: str, uri: str
    ) -> tuple[tuple[str, str], int, Any]:
        """Rows around `row`: its whole row group, or where that is large a short stretch."""
        start = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if row < start + group.num_rows:
                break
            start += group.num_rows
        else:
            raise DatasetError(f"{uri} is beyond the {start:,} rows of its file", "load the dataset again")
        if group.total_byte_size <= _CACHED_ROW_GROUP:
            table = file.read_row_group(number, columns=[name], use_threads=False)
            return (path, name), start, bytes_of(table.column(0).combine_chunks())
        key = (path, name, number)
        if not self._stream or self._stream[0] != key or self._stream[1] > row:
            batches = file.iter_batches(
                _STREAMED_ROWS, row_groups=[number], columns=[name], use_threads=False
            )
            self._stream = (key, start, batches)
        _, start, batches = self._stream
        for batch in batches:
            first, start = start, start + len(batch)
            self._stream = (key, start, batches)
            if row < start:
                return (path, name), first, bytes_of(batch.column(0))
        raise DatasetError(f"{uri} is beyond the rows of its file", "load the dataset again")
