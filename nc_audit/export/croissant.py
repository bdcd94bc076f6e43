"""Croissant 1.0 metadata of an export: what files there are and, where they are tables, what each column holds.

What is not known (creator, date, licence, address) is left out rather than invented; who publishes the export adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from nc_audit.export.card import CardFacts, meaning
from nc_audit.export.names import IMAGE_ENDINGS
from nc_audit.report.text import json_text
from nc_audit.run import file_digest

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"

_OF_CROISSANT = (
    "citeAs", "column", "extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated",
    "replace", "separator", "source", "subField", "transform",
)  # fmt: skip
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _OF_CROISSANT},
}
_FORMATS = {
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".npy": "application/octet-stream",
    ".parquet": "application/x-parquet",
    ".tar": "application/x-tar",
    ".arrow": "application/vnd.apache.arrow.stream",
    **IMAGE_ENDINGS,
}
_TABLES = {"text/csv", "application/jsonlines", "application/x-parquet"}
_SHARDS = {".parquet", ".tar", ".arrow"}
_LISTS = {"dropped.csv", "rematches.csv", "state.json", "dataset_info.json", "dataset_dict.json"}


def croissant(facts: CardFacts, folder: Path, schema: pa.Schema, *, images_inside: bool = True) -> str:
    """The metadata as JSON-LD.

    Args:
        facts: what the card states.
        folder: the export, its data files written.
        schema: of the kept rows; gives the types of the columns.
        images_inside: whether Parquet holds the images themselves, not their names.

    Returns:
        A JSON document that ends with a line break.
    """
    tables, others = _distribution(folder)
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": f"{facts.dataset}, audited for noisy correspondence",
        "description": f"{facts.kept:,} caption-image pairs of {facts.dataset}, scored with nc-audit {facts.tool}; "
        f"{facts.rows - facts.kept:,} of {facts.rows:,} rows were left out.",
        "conformsTo": CONFORMS_TO,
        "distribution": [*tables, *others],
    }
    # Several tables are the splits of one only as shards, which one file set holds.
    if len(tables) == 1:
        document["recordSet"] = [_record_set(tables[0], facts.columns, schema, images_inside)]
    return json_text(document) + "\n"


def _distribution(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The files that are tables of pairs, and all others: shards and images as sets, single files with digests."""
    sets: dict[tuple[str, str], None] = {}
    objects: list[str] = []
    for path in sorted(folder.rglob("*")):
        ending, name = path.suffix.lower(), path.relative_to(folder).as_posix()
        if not path.is_file() or ending not in _FORMATS or path.name in _LISTS:
            continue
        if ending in _SHARDS or ending in IMAGE_ENDINGS or path.name == "metadata.jsonl":
            parent = path.parent.relative_to(folder).as_posix()
            inside = "" if parent == "." else f"{parent}/"
            # Metadata of all splits is one table; its folders are the splits.
            pattern = "*/metadata.jsonl" if path.name == "metadata.jsonl" else f"{inside}*{path.suffix}"
            sets[pattern, _FORMATS[ending]] = None
        else:
            objects.append(name)
    found: list[dict[str, Any]] = [
        {"@type": "cr:FileSet", "@id": pattern, "includes": pattern, "encodingFormat": kind}
        for pattern, kind in sets
    ]
    found += [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "encodingFormat": _FORMATS[Path(name).suffix.lower()],
            "sha256": file_digest(folder / name),
        }
        for name in objects
    ]
    tables = [one for one in found if one["encodingFormat"] in _TABLES]
    return tables, [one for one in found if one not in tables]


def _record_set(
    table: dict[str, Any], columns: Sequence[str], schema: pa.Schema, images_inside: bool
) -> dict[str, Any]:
    kind = "fileSet" if table["@type"] == "cr:FileSet" else "fileObject"
    has_images = images_inside and table["encodingFormat"] == "application/x-parquet"
    fields = []
    for name in columns:
        source: dict[str, Any] = {kind: {"@id": table["@id"]}, "extract": {"column": name}}
        if name == "image" and has_images:
            source["transform"] = {"jsonPath": "bytes"}
        fields.append(
            {
                "@type": "cr:Field",
                "@id": f"pairs/{name}",
                "name": name,
                "description": meaning(name, columns),
                "dataType": "sc:ImageObject" if name == "image" and has_images else _data_type(name, schema),
                "source": source,
            }
        )
    return {"@type": "cr:RecordSet", "@id": "pairs", "name": "pairs", "field": fields}


def _data_type(name: str, schema: pa.Schema) -> str:
    kind = schema.field(name).type if name in schema.names else pa.string()
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "sc:Float"
    return "sc:Boolean" if pa.types.is_boolean(kind) else "sc:Text"
