"""The report as one HTML page that needs nothing else: no network, no server, no other file unless asked for.

Everything a stranger wrote (captions, names, reasons) reaches the page in one of two ways: through Jinja's escaping,
or as JSON that a small script sets as text. A content security policy forbids everything that is not in the page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nc_audit.dataset.images import ImageStore
from nc_audit.errors import DatasetError
from nc_audit.report import ReportRow, noise_rate_text, summary
from nc_audit.report.charts import counted, curves, histogram, reliability
from nc_audit.report.joined import joined
from nc_audit.report.text import json_text, plain
from nc_audit.report.thumbnails import data_uri, thumbnails
from nc_audit.run import Run, replacing
from nc_audit.schema import TAGS_KNOWN

_SHOWN_SCORES = ("similarity", "loss", "swapped_entropy", "caption_rank", "image_rank")
_MAX_GROUPS = 15
# Above this a page with its pictures inside is slow to open and to send.
MAX_INLINED_BYTES = 30_000_000
_DISTRIBUTIONS = (
    ("Loss", "loss", "loss, nats"),
    ("Energy", "energy", "energy, nats"),
    ("Swapped entropy", "swapped_entropy", "swapped entropy, 0 to 1"),
)


@dataclass(frozen=True)
class Page:
    """A report: the page, and the files beside it by relative name (none where the images are in the page)."""

    html: str
    files: dict[str, bytes]


def html_report(
    run: Run, rows: Sequence[ReportRow], images: ImageStore, *, as_files: bool = False, sort: str = ""
) -> Page:
    """The page of a run.

    Args:
        run: a run that is scored and tagged.
        rows: the pairs of the gallery, in the order shown.
        images: reads the images of the run's dataset; those that cannot be read are shown as missing.
        as_files: thumbnails as files below `thumbnails/` instead of inside the page.
        sort: name of the column the rows were sorted by, said in the page.

    Raises:
        RunError: a table is missing or stale.
    """
    facts = summary(run)
    table = joined(
        run,
        pairs=["status", "duplicate_of", "image", "image_uri", "split", "source", "known_noise", "pair_id"],
        scores=["noise_probability", "loss", "energy", "swapped_entropy"],
        tags=["tag"],
    )
    distinct = table.filter(pc.and_(pc.is_valid(table["tag"]), pc.is_null(table["duplicate_of"])))
    gallery, beside = _gallery(table, rows, images, as_files)
    where = "'self' file:" if as_files else "data:"
    style, script = _asset("report.css"), _asset("report.js")
    page = _environment().from_string(_asset("report.html.j2"))
    html = page.render(
        policy=(
            f"default-src 'none'; img-src {where}; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_script_json(gallery)),
        name=plain(str(facts["dataset"] or facts["run"])),
        facts=facts,
        about=_about(run, facts, pc.sum(pc.is_valid(table["duplicate_of"])).as_py() or 0),
        findings=[_finding(one) for one in facts["findings"]],
        charts=_charts(run, distinct),
        groups=_groups(distinct),
        num_rows=len(rows),
        sort=sort.replace("_", " "),
        tags=TAGS_KNOWN,
    )
    return Page(html, beside)


def write_page(page: Page, run: Run, out: Path | None) -> Path:
    """Write a report, the page last, each file atomically; returns where the page is.

    Args:
        page: what to write.
        run: where the report goes when `out` is not given: `report/` of the run.
        out: a file for a page alone; a folder where there are files beside it, or for `index.html` in a folder that
            is there.

    Raises:
        DatasetError: `out` is a file where a folder is needed, or a folder with other things in it.
    """
    if not page.files:
        target = out or run.path / "report" / "report.html"
        target = target / "index.html" if target.is_dir() else target
    else:
        folder = out or run.path / "report" / "pages"
        if folder.exists() and not folder.is_dir():
            raise DatasetError(f"{folder} is a file", "with --thumbnails name a folder: --out DIR")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "index.html").is_file():
            raise DatasetError(f"{folder} holds other things than a report", "name a new folder: --out DIR")
        target = folder / "index.html"
        for name, data in page.files.items():
            with replacing(folder / name, flushed=False) as partial:
                partial.write_bytes(data)
    with replacing(target) as partial:
        partial.write_text(page.html, encoding="utf-8")
    return target


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _asset(name: str) -> str:
    return files("nc_audit.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json_text(value, indent=None)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _about(run: Run, facts: dict[str, Any], num_copies: int) -> list[tuple[str, str]]:
    """What the run was, as name and value."""
    stated = run.manifest.get("summary") or {}
    rate = facts["noise_rate"] or {}
    encoders = stated.get("encoders") or {}
    thresholds = stated.get("thresholds") or {}
    auroc = rate.get("expected_auroc")
    values = {
        "Estimated noise rate": _rate(rate),
        "Copies": f"{counted(num_copies, 'row')} that repeat an earlier pair" if num_copies else None,
        "Evidence": rate.get("evidence"),
        "Expected AUROC": None if auroc is None else f"{auroc:.3f}",
        "Recipe": (run.manifest.get("recipe") or {}).get("name"),
        "Image encoder": encoders.get("image"),
        "Text encoder": encoders.get("text"),
        "Noise probability": ", ".join(
            f"{word} {thresholds[name]:.3g}"
            for word, name in (("clean up to", "clean_at"), ("noisy from", "noisy_at"))
            if thresholds.get(name) is not None
        ),
    }
    return [(name, plain(str(value))) for name, value in values.items() if value]


def _rate(rate: Mapping[str, Any]) -> str:
    if rate.get("evidence") == "none" or not noise_rate_text(rate):
        return "cannot be told: the scores of this run do not say how many pairs are wrong"
    return noise_rate_text(rate)


def _finding(finding: Any) -> dict[str, str]:
    if not isinstance(finding, dict):
        return {"kind": plain(str(finding)), "count": "", "detail": ""}
    count = finding.get("count")
    return {
        "kind": plain(str(finding.get("kind", ""))).replace("_", " "),
        "count": f"{count:,}" if isinstance(count, int) else "",
        "detail": plain(str(finding.get("detail") or "")),
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _by_tag(values: np.ndarray, tag: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[tag == index] for index, name in enumerate(TAGS_KNOWN)}


def _charts(run: Run, table: pa.Table) -> list[dict[str, Any]]:
    """Title, note and drawing of every chart that the run has values for."""
    tag = pc.index_in(table["tag"], value_set=pa.array(TAGS_KNOWN)).to_numpy()
    probability = _numbers(table["noise_probability"])
    stated = (run.manifest.get("summary") or {}).get("thresholds") or {}
    marks = {
        name.replace("_", " "): stated[name]
        for name in ("clean_at", "noisy_at")
        if stated.get(name) is not None
    }
    charts = [
        (
            "Noise probability",
            "Pairs by tag, one on the other. The further from the middle, the more decided.",
            histogram(
                "Noise probability",
                "noise probability, 0 to 1",
                _by_tag(probability, tag),
                limits=(0, 1),
                marks=marks,
                stacked=True,
            ),
        )
    ]
    for title, column, label in _DISTRIBUTIONS:
        values = _numbers(table[column])
        if np.isfinite(values).any():
            drawing = histogram(title, label, _by_tag(values, tag))
            charts.append((title, "Pairs by tag, each from the bottom; a rare tag stays low.", drawing))
    charts += _training(run, table["pair_id"], tag)
    truth = _truth(run, table)
    known = truth >= 0
    judged = known & np.isfinite(probability)
    if judged.any():
        drawing = reliability("Reliability", probability[judged], truth[judged] == 1)
        note = (
            f"Against the truth of {counted(int(judged.sum()))}, in tenths, with counts and 95 % intervals. "
            "On the dotted line the probabilities are right."
        )
        charts.append(("Reliability", note, drawing))
    return [{"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in charts]


def _truth(run: Run, table: pa.Table) -> np.ndarray:
    """1 where a pair is known to be noise, 0 where known not to be, -1 elsewhere; people come before the dataset."""
    truth = np.asarray(pc.fill_null(table["known_noise"].cast(pa.int8()), -1).to_numpy())
    truth = truth.copy()
    for decision, value in (("keep", 0), ("drop", 1), ("fix", 1), ("rematch", 1)):
        decided = run.decided(decision)
        if decided:
            truth[pc.is_in(table["pair_id"], value_set=pa.array(decided)).to_numpy()] = value
    return truth


def _training(run: Run, pair_id: pa.ChunkedArray, tag: np.ndarray) -> list[tuple[str, str, str]]:
    path = run.path / "model" / "trajectory.parquet"
    if not path.is_file():
        return []
    table = pq.read_table(path, columns=["pair_id", "epoch", "loss", "weight"])
    place = pc.index_in(table["pair_id"], value_set=pair_id.combine_chunks())
    known = pc.is_valid(place)
    table, place = table.filter(known), place.filter(known)
    if not table.num_rows:
        return []
    of_pair, epoch = tag[place.to_numpy()], table["epoch"].to_numpy()
    charts = []
    for title, column, label in (
        ("Loss while training", "loss", "loss, nats"),
        ("Weight while training", "weight", "training weight, 0 to 1"),
    ):
        values = _numbers(table[column])
        quartiles = {}
        for index, name in enumerate(TAGS_KNOWN):
            steps = [values[(of_pair == index) & (epoch == at)] for at in np.unique(epoch)]
            if all(len(step) for step in steps):
                quartiles[name] = np.array([np.quantile(step, (0.25, 0.5, 0.75)) for step in steps])
        charts.append(
            (title, "Median and middle half of each tag, over the epochs.", curves(title, label, quartiles))
        )
    return charts


def _groups(table: pa.Table) -> list[dict[str, Any]]:
    """Noise by split, source, folder and file-name class, each where there are several."""
    images = table["image"].to_pylist()
    kinds = {
        "split": table["split"].to_pylist(),
        "source": table["source"].to_pylist(),
        "folder": [image.rpartition("/")[0] if image else None for image in images],
        "file name": [_stem_class(image) for image in images],
    }
    probability = _numbers(table["noise_probability"])
    is_noisy = np.asarray(pc.equal(table["tag"], "noisy").to_numpy())
    found = []
    for kind, names in kinds.items():
        codes: dict[str, int] = {}
        place = np.array(
            [codes.setdefault("(none)" if one is None else one, len(codes)) for one in names], int
        )
        if not 2 <= len(codes) <= max(2, len(names) // 4):
            continue
        count = np.bincount(place)
        noisy = np.bincount(place, is_noisy)
        expected = np.bincount(place, np.nan_to_num(probability)) / count
        order = np.argsort(-expected, kind="stable")
        listed = list(codes)
        lines = [
            {
                "name": plain(listed[at]) or "(top folder)",
                "pairs": f"{count[at]:,}",
                "noisy": f"{int(noisy[at]):,}",
                "percent": f"{100 * expected[at]:.1f}",
                "width": round(float(100 * expected[at]), 1),
            }
            for at in order[:_MAX_GROUPS].tolist()
        ]
        found.append({"kind": kind, "lines": lines, "total": len(codes)})
    return found


def _stem_class(image: str | None) -> str | None:
    """The letters a file name begins with, before its number: `airport` of `images/airport_12.jpg`."""
    match = re.match(r"([^\W\d]+?)[\W_]*\d", (image or "").rpartition("/")[2])
    return match[1] if match else None


def reason_kind(reason: str) -> str:
    """What several reasons have in common, without numbers and captions.

    Example:
        >>> reason_kind("2,271 other captions fit the image better")
        'other captions fit the image better'
        >>> reason_kind("better caption by 0.31: a plane")
        'better caption'
    """
    kind = reason.partition(":")[0]
    kind = re.sub(r"\d[\d,.]*\s*%?\s*", "", kind).strip()
    kind = re.sub(r"^other (caption|image) fits", r"other \1s fit", kind)
    return re.sub(r"\s+(by|at|of)$", "", kind)


def _gallery(
    table: pa.Table, rows: Sequence[ReportRow], images: ImageStore, as_files: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The pairs as the page's script reads them, and the files of their thumbnails."""
    wanted = pa.array([row.best_image for row in rows if row.best_image], pa.string())
    better = table.select(["image", "image_uri"]).filter(
        pc.and_(pc.is_in(table["image"], value_set=wanted), pc.is_valid(table["image_uri"]))
    )
    uri_of = dict(zip(better["image"].to_pylist(), better["image_uri"].to_pylist(), strict=True))
    uris = [row.image_uri for row in rows if row.image_uri]
    uris += [uri_of[row.best_image] for row in rows if row.best_image in uri_of]
    uris = list(dict.fromkeys(uris))
    made = thumbnails([uris[at] for at in images.reading_order(uris)], images.read)
    shown = [uri for uri in uris if uri in made]
    place = {uri: index for index, uri in enumerate(shown)}
    # Named by content: a page that was left behind when a later one was broken off shows no other pair's picture.
    names = [f"thumbnails/{hashlib.blake2b(made[uri], digest_size=10).hexdigest()}.webp" for uri in shown]
    beside = {name: made[uri] for name, uri in zip(names, shown, strict=True)} if as_files else {}
    kinds = Counter(kind for row in rows for kind in {reason_kind(one) for one in row.reasons})
    entries = [
        {
            "row": row.row,
            "image": plain(row.image or ""),
            "caption": plain(row.caption or ""),
            "p": row.noise_probability,
            "tag": row.tag,
            "split": None if row.split is None else plain(row.split),
            "reasons": [plain(reason) for reason in row.reasons],
            "kinds": sorted({plain(reason_kind(reason)) for reason in row.reasons}),
            "thumb": place.get(row.image_uri or ""),
            "copies": row.copies,
            "by": None if row.decided_by in (None, "model") else plain(row.decided_by),
            "bestCaption": plain(row.best_caption)
            if row.best_caption and (row.best_caption_margin or 0) > 0
            else None,
            "captionMargin": row.best_caption_margin,
            "bestImage": plain(row.best_image)
            if row.best_image and (row.best_image_margin or 0) > 0
            else None,
            "imageMargin": row.best_image_margin,
            "bestThumb": place.get(uri_of.get(row.best_image or "", "")),
            "scores": {
                name: row.scores.get(name) for name in _SHOWN_SCORES if row.scores.get(name) is not None
            },
        }
        for row in rows
    ]
    pictures = names if as_files else [data_uri(made[uri]) for uri in shown]
    common = [plain(kind) for kind, _ in kinds.most_common(30) if kind]
    return {"pairs": entries, "pictures": pictures, "kinds": common}, beside
