"""Small pictures of a dataset's images, for pages and terminals. What cannot be read is None and never an error."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from nc_audit.dataset.images import decode_image
from nc_audit.errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

SIDE = 144


def small(data: bytes, side: int = SIDE) -> Image.Image:
    """An image reduced so that its longer edge has at most `side` pixels, RGB.

    Raises:
        DatasetError: it cannot be decoded.
    """
    image = decode_image(data, (side, side))
    image.thumbnail((side, side))
    return image


def webp(data: bytes, side: int = SIDE) -> bytes:
    """The same as a WebP file without metadata, about 3 kB at 144 pixels.

    Raises:
        DatasetError: it cannot be decoded.
    """
    out = io.BytesIO()
    small(data, side).save(out, "WEBP", quality=60, method=2)
    return out.getvalue()


def data_uri(image: bytes) -> str:
    """A WebP file as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(image).decode("ascii")


def thumbnails(uris: Iterable[str], read: Callable[[str], bytes], side: int = SIDE) -> dict[str, bytes]:
    """WebP files by URI, each distinct image once; images that cannot be read or decoded are left out.

    Args:
        uris: in the order in which reading is cheap.
        read: gives the bytes of an image, or raises a DatasetError or an OSError.
        side: longer edge, in pixels.
    """

    def make(uri: str) -> bytes | None:
        try:
            return webp(read(uri), side)
        except (DatasetError, OSError):
            return None

    distinct = list(dict.fromkeys(uris))
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(make, distinct)
        return {uri: one for uri, one in zip(distinct, made, strict=True) if one is not None}


def half_blocks(data: bytes, columns: int) -> list[list[tuple[str, str]]]:
    """An image as terminal cells of two colours, upper and lower, each `#rrggbb`.

    Args:
        data: the bytes of an image file.
        columns: how many cells at most across, and twice as many pixels at most in height, 1..

    Raises:
        DatasetError: it cannot be decoded.
    """
    image = small(data, columns)
    width, height = image.size
    colours = [
        f"#{red:02x}{green:02x}{blue:02x}"
        for red, green, blue in zip(*[iter(image.tobytes())] * 3, strict=True)
    ]
    rows = [colours[at * width : (at + 1) * width] for at in range(height)]
    return [
        list(zip(upper, rows[2 * at + 1] if 2 * at + 1 < height else upper, strict=True))
        for at, upper in enumerate(rows[::2])
    ]
