"""The dataset card of an export: a README that says what the data are, how they were made and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nc_audit.report import noise_rate_text
from nc_audit.report.text import markdown_cell
from nc_audit.schema import STATUSES, TABLES

_OWN_MEANINGS = {
    "image": "the image file as it was (`bytes`) and its base name (`path`)",
    "weight": "training weight, 0..1: 1 - noise_probability; for a re-matched pair noise_probability, "
    "since its new caption is trusted as much as the old one was distrusted",
    "original_caption": "the caption that was replaced; null where `caption` is the dataset's own",
    "tag": "clean, ambiguous or noisy, as audited",
    "noise_probability": "probability that the caption as audited does not describe the image, 0..1",
}
_PAIR_MEANINGS = {
    name: (TABLES["pairs"].field(name).metadata or {}).get(b"meaning", b"").decode()
    for name in TABLES["pairs"].names
}


@dataclass(frozen=True)
class CardFacts:
    """What the card states; counts are input rows.

    Attributes:
        tool: version of nc-audit.
        dataset: name of the dataset, without its folder.
        recipe: name and digest of the recipe.
        options: the options of the export as words.
        status: rows of the dataset by status.
        tags: rows of the dataset by tag.
        noise_rate: estimate, low, high, level; None where the run has none.
        dropped: dropped rows by reason.
        splits: exported rows by split.
        columns: names of the exported columns, in order.
        num_rematched: exported rows whose caption was replaced.
    """

    tool: str
    dataset: str
    recipe: str
    options: Sequence[str]
    rows: int
    kept: int
    status: Mapping[str, int]
    tags: Mapping[str, int]
    noise_rate: Mapping[str, float] | None
    dropped: Mapping[str, int]
    splits: Mapping[str, int]
    columns: Sequence[str]
    num_rematched: int


def card(facts: CardFacts) -> str:
    """The card as Markdown with the YAML head that `datasets` and the hub read."""
    head = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in facts.splits:
        # JSON strings are YAML strings; a name in another script needs no quoting rules then.
        head += [f"  - split: {json.dumps(split)}", f"    path: {json.dumps(f'data/{split}-*')}"]
    head += ["tags:", "- nc-audit", "---", ""]

    dataset = markdown_cell(facts.dataset)
    lines = [
        f"# {dataset}, audited for noisy correspondence",
        "",
        f"Caption-image pairs of {dataset}, scored with nc-audit {facts.tool}.",
        f"Of {facts.rows:,} rows, {facts.kept:,} are here and {facts.rows - facts.kept:,} were dropped.",
        "",
        f"- recipe: {markdown_cell(facts.recipe)}",
        f"- options: {', '.join(markdown_cell(option) for option in facts.options) or 'none'}",
    ]
    rate = noise_rate_text(facts.noise_rate)
    lines.append(f"- estimated noise rate before the export: {rate or 'not stated by the run'}")
    if facts.num_rematched:
        lines.append(f"- captions replaced: {facts.num_rematched:,}, each listed in `rematched.csv`")
    lines += ["", "## What was dropped", ""]
    lines += _counts("reason", facts.dropped, {}) if facts.dropped else ["Nothing."]
    if facts.dropped:
        lines += ["", "Each dropped row is listed in `dropped.csv`, which `datasets` does not load."]
    lines += ["", "## The dataset before the export", ""]
    lines += _counts("status", facts.status, STATUSES)
    lines += [""]
    lines += _counts("tag", facts.tags, {})
    lines += ["", "## Splits", ""]
    lines += _counts("split", facts.splits, {})
    lines += ["", "## Columns", "", "| column | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {_meaning(name, facts.columns)} |" for name in facts.columns]
    lines += [
        "",
        "A tag is a statement about a pair, made by a model that was trained on this very dataset; it is not a proof.",
        "Terms of use are those of the original dataset.",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _meaning(name: str, columns: Sequence[str]) -> str:
    if name == "caption" and "original_caption" in columns:
        return "the caption, re-matched where `original_caption` is given, else as the dataset gives it"
    return _OWN_MEANINGS.get(name) or _PAIR_MEANINGS[name]


def _counts(name: str, counts: Mapping[str, int], meanings: Mapping[str, str]) -> list[str]:
    more = " meaning |" if meanings else ""
    lines = [f"| {name} | rows |{more}", f"| --- | ---: |{' --- |' if meanings else ''}"]
    for key, count in counts.items():
        meaning = f" {meanings.get(key, '')} |" if meanings else ""
        lines.append(f"| {markdown_cell(key)} | {count:,} |{meaning}")
    return lines
