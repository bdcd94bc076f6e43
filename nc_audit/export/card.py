"""The dataset card of an export: a README that says what the data are, how they were made and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nc_audit.report import noise_rate_text
from nc_audit.report.text import markdown_cell
from nc_audit.schema import STATUSES, TABLES

_CAPTION = "the caption as the dataset gives it"
_FILE = "name of the image file"
_OWN_MEANINGS = {
    "image": "the image: the file itself with its base name, where it lies in this folder, or its name in the dataset",
    "file_name": _FILE,
    "filename": _FILE,
    "caption": _CAPTION,
    "text": _CAPTION,
    "raw": _CAPTION,
    "weight": "training weight, 0..1: 1 - noise_probability of the pair as it is here; 1 or 0 where a person decided",
    "original_caption": "the caption that was replaced; null where the caption is the dataset's own",
    "tag": "clean, ambiguous or noisy, as audited; clean or noisy where a person decided",
    "noise_probability": "probability that the caption as audited does not describe the image, 0..1",
    "uid": "id of the pair in the input",
}
_CAPTIONS = {"caption", "text", "raw"}
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
        about: what is in the folder and how to read it, as Markdown.
        status: rows of the dataset by status.
        tags: rows of the dataset by tag.
        noise_rate: estimate, low, high, level; None where the run has none.
        dropped: dropped rows by reason.
        splits: exported rows by split.
        hub: for each split, patterns of the files that `datasets` reads; none where it cannot read the folder.
        columns: names of the exported columns, in order.
        num_rematched: exported rows whose caption was replaced.
        num_decided: rows of the dataset that people decided about.
        changes_list: the file that lists replaced captions; None where there is none.
    """

    tool: str
    dataset: str
    recipe: str
    options: Sequence[str]
    about: str
    rows: int
    kept: int
    status: Mapping[str, int]
    tags: Mapping[str, int]
    noise_rate: Mapping[str, float] | None
    dropped: Mapping[str, int]
    splits: Mapping[str, int]
    hub: Mapping[str, Sequence[str]]
    columns: Sequence[str]
    num_rematched: int
    num_decided: int
    changes_list: str | None


def card(facts: CardFacts) -> str:
    """The card as Markdown with the YAML head that `datasets` and the hub read."""
    head = ["---"]
    if facts.hub:
        head += ["configs:", "- config_name: default", "  data_files:"]
    for split, patterns in facts.hub.items():
        # JSON strings are YAML strings; a name in another script needs no quoting rules then.
        head += [f"  - split: {json.dumps(split)}"]
        path = patterns[0] if len(patterns) == 1 else list(patterns)
        head += [f"    path: {json.dumps(path)}"]
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
    if facts.num_decided:
        lines.append(f"- decided by people: {facts.num_decided:,} rows; they count more than tags")
    if facts.num_rematched:
        lines.append(f"- captions replaced: {facts.num_rematched:,}, each listed in `{facts.changes_list}`")
    lines += ["", "## What is here", "", facts.about]
    lines += ["", "## What was dropped", ""]
    lines += _counts("reason", facts.dropped, {}) if facts.dropped else ["Nothing."]
    if facts.dropped:
        lines += ["", "Each dropped row is listed in `dropped.csv`, which is no part of the data."]
    lines += ["", "## The dataset before the export", ""]
    lines += _counts("status", facts.status, STATUSES)
    lines += [""]
    lines += _counts("tag", facts.tags, {})
    lines += ["", "## Splits", ""]
    lines += _counts("split", facts.splits, {})
    lines += ["", "## Columns", "", "| column | meaning |", "| --- | --- |"]
    lines += [f"| {_code(name)} | {markdown_cell(meaning(name, facts.columns))} |" for name in facts.columns]
    lines += [
        "",
        "A tag is a statement about a pair, made by a model that was trained on this very dataset; it is not a proof.",
        "Terms of use are those of the original dataset.",
    ]
    return "\n".join([*head, *lines]) + "\n"


def meaning(name: str, columns: Sequence[str]) -> str:
    """What an exported column holds, in words."""
    if name in _CAPTIONS and "original_caption" in columns:
        return "the caption, replaced where original_caption is given, else as the dataset gives it"
    if name == "pair_id" and "original_caption" in columns:
        return f"{_PAIR_MEANINGS[name]}; of the original caption where that was replaced"
    return _OWN_MEANINGS.get(name) or _PAIR_MEANINGS.get(name) or "a column of the input"


def _code(name: str) -> str:
    return f"`{name}`" if name.isidentifier() else markdown_cell(name)


def _counts(name: str, counts: Mapping[str, int], meanings: Mapping[str, str]) -> list[str]:
    more = " meaning |" if meanings else ""
    lines = [f"| {name} | rows |{more}", f"| --- | ---: |{' --- |' if meanings else ''}"]
    for key, count in counts.items():
        meaning = f" {meanings.get(key, '')} |" if meanings else ""
        lines.append(f"| {markdown_cell(key)} | {count:,} |{meaning}")
    return lines
