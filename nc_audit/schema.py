"""The tables of a run: columns, types, and what every number means (unit, range, direction).

The meanings travel in the Arrow field metadata, so that a Parquet file explains itself; the README's column
reference is generated from here.
"""

from __future__ import annotations

import pyarrow as pa

from nc_audit.errors import SchemaError

TAGS_KNOWN = ("clean", "ambiguous", "noisy")

STATUSES = {
    "ok": "audited",
    "missing_image": "the image file does not exist where the dataset says",
    "corrupt_image": "the image cannot be decoded",
    "outside_root": "the image lies outside the dataset's folder and no --image-root holds it",
    "remote_image": "the image is a URL; nothing is fetched without --allow-network",
    "empty_caption": "the caption is empty or only white space",
    "missing_caption": "the caption cell is null",
}


def _field(name: str, type_: pa.DataType, meaning: str, *, unit: str = "", nullable: bool = True) -> pa.Field:
    metadata = {"meaning": meaning}
    if unit:
        metadata["unit"] = unit
    return pa.field(name, type_, nullable=nullable, metadata=metadata)


def list_of(type_: pa.DataType) -> pa.DataType:
    """A list type that equals itself after a Parquet round trip (the child is called `element`)."""
    return pa.list_(pa.field("element", type_, nullable=False))


_ROW = _field("row", pa.int64(), "0-based position in the whole input; joins the tables", nullable=False)
_PAIR = _field(
    "pair_id",
    pa.string(),
    "hash of image and caption; equal pairs share it, order does not matter",
    nullable=False,
)

PAIRS = pa.schema(
    [
        _ROW,
        _PAIR,
        _field("image_id", pa.string(), "hash of the image file's bytes; null where it cannot be read"),
        _field("caption_id", pa.string(), "hash of the caption, normalised; null where there is none"),
        _field("image", pa.string(), "path, member or URL as the dataset gives it"),
        _field("caption", pa.string(), "caption as the dataset gives it"),
        _field("split", pa.string(), "split as the dataset names it"),
        _field("source", pa.string(), "file of the dataset that holds the row", nullable=False),
        _field("status", pa.string(), "ok, or why the row cannot be audited", nullable=False),
        _field("status_detail", pa.string(), "what exactly was found, where status is not ok"),
        _field(
            "image_uri", pa.string(), "where the bytes are: root name, colon, path below it, optional #row"
        ),
        _field(
            "resolved_by",
            pa.string(),
            "how the image was found: path, image_root, base_name, file_name, embedded, downloaded",
        ),
        _field("duplicate_of", pa.int64(), "row of the first equal pair; null for the first"),
        _field("known_noise", pa.bool_(), "ground truth of injected noise, where the dataset states it"),
    ]
)

_F = pa.float32()

SCORES = pa.schema(
    [
        _PAIR,
        _ROW,
        _field("similarity", _F, "cosine of the pair's two embeddings; higher = fits better", unit="-1..1"),
        _field("loss", _F, "mean cross-entropy of both directions; higher = fits worse", unit="nats, 0.."),
        _field("relative_loss", _F, "loss / ln M; 1 = chance", unit="0.."),
        _field(
            "energy",
            _F,
            "-logsumexp of the pair's logits over the candidates, mean of both directions; higher = less certain",
            unit="nats",
        ),
        _field(
            "swapped_entropy",
            _F,
            "mean match entropy, each direction weighing the other; higher = less decided",
            unit="0..1",
        ),
        _field(
            "caption_rank", pa.int32(), "rank of the own caption among the candidates of its image; 1 = best"
        ),
        _field(
            "image_rank", pa.int32(), "rank of the own image among the candidates of its caption; 1 = best"
        ),
        _field(
            "weight", _F, "self-paced training weight, mean over epochs; higher = trusted more", unit="0..1"
        ),
        _field(
            "noise_score",
            _F,
            "ranks pairs; higher = more likely noisy",
            unit="standard deviations of known swaps",
        ),
        _field(
            "noise_probability",
            _F,
            "probability that the caption does not describe the image, calibrated on known swaps",
            unit="0..1",
        ),
        _field(
            "clean_posterior",
            _F,
            "1 - noise probability before training, from the embeddings alone",
            unit="0..1",
        ),
        _field(
            "mi_variation", _F, "mutual-information variation; higher = image and caption agree", unit="nats"
        ),
        _field(
            "neighbour_distance", _F, "how far the neighbours' captions and images are; higher = disagree"
        ),
        _field("best_caption", pa.string(), "caption that fits the image best, not one of its own"),
        _field("best_caption_margin", _F, "cosine of best_caption minus the own caption's", unit="-2..2"),
        _field("best_image", pa.string(), "image that fits the caption best, not one of its own"),
        _field("best_image_margin", _F, "cosine of best_image minus the own image's", unit="-2..2"),
    ]
)

METHOD_COLUMNS: dict[str, pa.Field] = {
    field.name: field
    for field in (
        _field(
            "zero_shot_loss",
            _F,
            "self_paced: loss by the cosine of aligned encoders, untrained; higher = fits worse",
            unit="nats, 0..",
        ),
        _field("image_novelty", _F, "tsvc: how unusual the image is; higher = rarer", unit="nats"),
        _field("caption_novelty", _F, "tsvc: how unusual the caption is; higher = rarer", unit="nats"),
        _field(
            "energy_posterior",
            _F,
            "srem: posterior of the lower-energy component; higher = cleaner",
            unit="0..1",
        ),
        _field("soft_label", _F, "tsvc: soft correspondence label; higher = cleaner", unit="0..1"),
        _field(
            "trusted_probability",
            _F,
            "chnr: discriminator's probability of a match; higher = cleaner",
            unit="0..1",
        ),
        _field(
            "image_noise",
            _F,
            "lemon: how far the captions of nearby images are; higher = noisier",
            unit="0..",
        ),
        _field(
            "caption_noise",
            _F,
            "lemon: how far the images of nearby captions are; higher = noisier",
            unit="0..",
        ),
        _field("confident_flag", pa.bool_(), "confident: pruned by noise rate", unit=""),
        _field("fused_similarity", _F, "rrsitr: global and local similarity together; higher = fits better"),
        _field(
            "hardest_gap",
            _F,
            "rrsitr: hardest negative minus own cosine, mean of both directions",
            unit="-2..2",
        ),
    )
}
"""Columns of `scores` that only some methods fill; they follow the others."""

TAGS = pa.schema(
    [
        _PAIR,
        _ROW,
        _field("tag", pa.string(), "clean, ambiguous or noisy; null where status is not ok"),
        _field("reasons", list_of(pa.string()), "what a person can check, strongest first", nullable=False),
        _field("decided_by", pa.string(), "model, or the reviewer's name", nullable=True),
        _field(
            "rematch_row", pa.int64(), "row whose caption fits this row's image; null where none is known"
        ),
        _field("rematch_probability", _F, "probability that it does", unit="0..1"),
    ]
)

FINDING_KINDS: dict[str, tuple[str, str]] = {
    "contradicting_captions": ("warn", "equal or near-equal images whose captions disagree"),
    "block_shift": ("warn", "runs of rows whose images fit the captions a constant number of rows away"),
    "leakage": ("warn", "equal or near-equal images in different splits"),
    "placeholder_image": ("warn", "one image under unusually many captions"),
    "file_name_caption": ("warn", "captions that are file names or URLs"),
    "empty_caption": ("warn", "captions that are empty or missing"),
    "other_script": ("warn", "captions in another script or language than the rest"),
    "disagrees": ("warn", "captions unlike the others of their image"),
    "unlikely_word": ("info", "captions that seem right but for a word"),
    "duplicate_image": ("info", "equal images under several names"),
    "near_duplicate_image": ("info", "images that look the same"),
    "copied_caption": ("info", "captions on ten or more images"),
    "generic_caption": ("info", "captions that fit many images better than their own"),
    "short_caption": ("info", "captions of a single word"),
    "cut_caption": ("info", "captions longer than the encoder reads"),
    "rematch": ("info", "noisy pairs whose image another displaced caption fits"),
}
"""Severity and meaning of each kind of finding, strongest first."""

FINDINGS = pa.schema(
    [
        _PAIR,
        _ROW,
        _field("kind", pa.string(), "what was found, one of the kinds of the README", nullable=False),
        _field("partner_row", pa.int64(), "the other row it is about, where there is one"),
        _field("detail", pa.string(), "in words, for a person to check", nullable=False),
        _field("severity", pa.string(), "warn: likely an error; info: worth knowing", nullable=False),
        _field("probability", _F, "of a re-match or block shift to be right; else null", unit="0..1"),
    ]
)

TRAJECTORY = pa.schema(
    [
        _PAIR,
        _field(
            "epoch",
            pa.int32(),
            "1-based; folds are scored by heads that did not train on the pair",
            nullable=False,
        ),
        _field(
            "loss",
            _F,
            "loss of the pair after this epoch; held out in the default method",
            unit="nats, 0..",
            nullable=False,
        ),
        _field("weight", _F, "training weight in this epoch's batches", unit="0..1", nullable=False),
        _field(
            "division", pa.string(), "clean, ambiguous or noisy by the pace's two thresholds", nullable=False
        ),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "pairs": PAIRS,
    "scores": SCORES,
    "findings": FINDINGS,
    "tags": TAGS,
    "trajectory": TRAJECTORY,
}


def check_table(name: str, table: pa.Table) -> pa.Table:
    """The table, when its columns, types and nulls are what the schema says; extra columns may follow.

    Raises:
        SchemaError: a column is missing or has another type, or a non-nullable column holds nulls.
    """
    for expected in TABLES[name]:
        if expected.name not in table.column_names:
            raise SchemaError(
                f"{name}: column {expected.name} is missing", "score the dataset again with --force"
            )
        actual = table.schema.field(expected.name)
        if actual.type != expected.type:
            raise SchemaError(f"{name}: column {expected.name} is {actual.type}, not {expected.type}")
        nulls = table[expected.name].null_count
        if nulls and not expected.nullable:
            raise SchemaError(f"{name}: column {expected.name} has {nulls:,} nulls", num_bad_rows=nulls)
    return table


def columns_markdown(name: str) -> str:
    """The columns of a table as a Markdown table: name, type, unit or range, meaning; for the README."""
    lines = ["| column | type | unit, range | meaning |", "|---|---|---|---|"]
    for field in TABLES[name]:
        metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        type_ = "list of string" if pa.types.is_list(field.type) else str(field.type)
        lines.append(f"| `{field.name}` | {type_} | {metadata.get('unit', '')} | {metadata['meaning']} |")
    return "\n".join(lines)
