"""A scored and tagged run written by hand, without a dataset or a model behind it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from nc_audit.run import Run
from nc_audit.schema import PAIRS, SCORES, TAGS


def picture(seed: int, *, side: int = 8, form: str = "PNG") -> bytes:
    """A small image of one colour, another one for each seed below 256."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (seed % 256, 255 - seed % 256, 90)).save(out, form)
    return out.getvalue()


@dataclass
class Pair:
    """One input row with what the audit said of it; image `number` n has the bytes `picture(n)`.

    `columns` are further columns of the input. The tags have the columns of re-matches when a pair sets one.
    """

    number: int = 0
    caption: str | None = "a red house"
    image: str | None = None
    split: str | None = None
    status: str = "ok"
    tag: str | None = "clean"
    probability: float | None = 0.1
    noise_score: float | None = 0.0
    best_caption: str | None = None
    best_caption_margin: float | None = None
    duplicate_of: int | None = None
    reasons: Sequence[str] = ()
    more: dict[str, Any] = field(default_factory=dict)
    rematch_row: int | None = None
    rematch_probability: float | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"


def pair_id(pair: Pair) -> str:
    return hashlib.sha256(f"{pair.number} {pair.caption}".encode()).hexdigest()[:32]


def make_run(path: Path, pairs: Sequence[Pair], **manifest: Any) -> Run:
    """A run directory with the three tables of these pairs and the manifest entries given."""
    rows = range(len(pairs))
    ids = [pair_id(pair) for pair in pairs]
    table = {
        "row": list(rows),
        "pair_id": ids,
        "image_id": [f"image{pair.number:04d}" if pair.is_ok else None for pair in pairs],
        "caption": [pair.caption for pair in pairs],
        "image": [pair.image or f"images/{pair.number}.png" for pair in pairs],
        "image_uri": [f"dataset:images/{pair.number}.png" if pair.is_ok else None for pair in pairs],
        "split": [pair.split for pair in pairs],
        "source": ["captions.csv"] * len(pairs),
        "status": [pair.status for pair in pairs],
        "status_detail": [None if pair.is_ok else "as the test says" for pair in pairs],
        "duplicate_of": [pair.duplicate_of for pair in pairs],
    }
    scores = {
        "row": list(rows),
        "pair_id": ids,
        "noise_probability": [pair.probability if pair.is_ok else None for pair in pairs],
        "noise_score": [pair.noise_score if pair.is_ok else None for pair in pairs],
        "best_caption": [pair.best_caption for pair in pairs],
        "best_caption_margin": [pair.best_caption_margin for pair in pairs],
    }
    for name in {name for pair in pairs for name in pair.more}:
        scores[name] = [pair.more.get(name) for pair in pairs]
    tags = {
        "row": list(rows),
        "pair_id": ids,
        "tag": [pair.tag if pair.is_ok else None for pair in pairs],
        "reasons": [list(pair.reasons) for pair in pairs],
        "decided_by": ["model" if pair.is_ok else None for pair in pairs],
        "rematch_row": [pair.rematch_row for pair in pairs],
        "rematch_probability": [pair.rematch_probability for pair in pairs],
    }
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    run.manifest |= {"recipe": {"name": "self_paced", "digest": "0f0f"}, **manifest}
    run.save()
    pairs_table = _table(PAIRS, table, len(pairs))
    for name in dict.fromkeys(name for pair in pairs for name in pair.columns):
        pairs_table = pairs_table.append_column(name, pa.array([pair.columns.get(name) for pair in pairs]))
    run.write_table("pairs", pairs_table)
    run.write_table("scores", _table(SCORES, scores, len(pairs)))
    run.write_table("tags", _table(TAGS, tags, len(pairs)))
    return run


def _table(schema: pa.Schema, values: dict[str, list[Any]], num_rows: int) -> pa.Table:
    columns = [pa.array(values.get(column.name, [None] * num_rows), column.type) for column in schema]
    return pa.table(columns, schema=schema)


def reader(calls: list[str] | None = None, gone: Sequence[int] = ()) -> Callable[[str], bytes]:
    """Reads `picture(n)` for the uri of image n; notes each call; images in `gone` are not there."""

    def read(uri: str) -> bytes:
        if calls is not None:
            calls.append(uri)
        number = int(Path(uri).stem)
        if number in gone:
            raise FileNotFoundError(f"{uri} is gone")
        return picture(number)

    return read
