"""What people see in a terminal: progress, notes, summaries, tables. The only module that imports rich.

Data goes to stdout, everything else to stderr. Captions and file names are shown as plain text: no markup of
theirs is ever interpreted, and control characters are made visible.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from nc_audit.errors import AuditError, RecipeError

if TYPE_CHECKING:
    from nc_audit.dataset.images import ImageStore
    from nc_audit.diff import Difference, Verdict
    from nc_audit.export import ExportResult
    from nc_audit.gate import Check
    from nc_audit.report import ReportRow
    from nc_audit.report.terminal import Screen

_TAG_STYLES = {"clean": "green", "ambiguous": "yellow", "noisy": "red"}

err = Console(stderr=True, highlight=False, soft_wrap=True)


_WIDTH_OFF_TERMINAL = 180
_TABLE_WIDTH = 100
_NUMBER = re.compile(r"[-+]?\d[\d,.]*( ?%)?( ± [\d.]+)?\*?|-?")


def out() -> Console:
    """The console for data; made when asked for, so that it sees today's terminal. Wide when piped."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OFF_TERMINAL
    return console


def _note(text: Text) -> None:
    """A line to stderr, broken between words in a terminal and never elsewhere; lost where stderr takes none."""
    with suppress(OSError):
        err.print(text, soft_wrap=not err.is_terminal)


def _hanging(console: Console, head: str, text: Text) -> None:
    """Text behind a head, its further lines below its first word rather than below the head."""
    room = width = max(20, console.width - cell_len(head))
    lines = text.wrap(console, width)
    # Terminals disagree about some scripts and emoji; what is counted too low here would run over the edge.
    while (
        width > 2
        and (over := max((_most_cells(line.plain.rstrip()) for line in lines), default=0) - room) > 0
    ):
        width = max(2, width - over)
        lines = text.wrap(console, width)
    for at, line in enumerate(lines):
        line.rstrip()
        console.print(Text.assemble(head if at == 0 else " " * cell_len(head), line), soft_wrap=True)


def _most_cells(text: str) -> int:
    """The cells that a text takes in a terminal that joins no emoji and gives every vowel sign a cell of its own."""
    return sum(_lone_cells(one) for one in text)


def _lone_cells(character: str) -> int:
    if "\U0001f1e6" <= character <= "\U0001f1ff" or "\U0001f3fb" <= character <= "\U0001f3ff":
        return 2  # the letters of flags, the tones of skins
    if character == "\ufe0f" or unicodedata.category(character) == "Mc":
        return 1
    return cell_len(character)


def _is_steady(text: str) -> bool:
    """Whether every terminal shows a text equally wide and from left to right, so that columns hold."""
    return text.isascii() or (
        _most_cells(text) == cell_len(text)
        and not any(unicodedata.bidirectional(one) in ("R", "AL", "AN") for one in text)
    )


def _next(console: Console, *commands: str) -> None:
    """What to type next: side by side where they fit, else each whole on a line of its own, fit to be copied."""
    one = "next: " + "    ".join(commands)
    text = one if cell_len(one) <= console.width else "next: " + "\n      ".join(commands)
    console.print(Text(text), soft_wrap=True)


def print_data(text: str) -> None:
    """Data as it is, to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_json(value: Any) -> None:
    """One JSON document, to stdout."""
    print_data(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_error(problem: AuditError) -> None:
    """Two lines: what is wrong, what to do."""
    from nc_audit.report.text import plain

    if isinstance(problem, RecipeError) and len(problem.problems) > 1:
        _note(Text.assemble(("error: ", "bold red"), f"the recipe has {len(problem.problems)} problems"))
        for one in problem.problems:
            _note(Text(f"  {plain(one)}"))
    else:
        _note(Text.assemble(("error: ", "bold red"), plain(problem.message)))
    if problem.hint:
        with suppress(OSError):
            err.print(Text.assemble(("fix: ", "bold"), plain(problem.hint)))


_LOG_EVERY = 30.0
_UNITS = {
    "images": "images",
    "captions": "captions",
    "patches": "images",
    "words": "captions",
    "train": "pairs",
}


class Watch:
    """Shows notes and progress of a run on stderr; use it as a context.

    In a terminal progress is a bar; elsewhere, as in a log file, a line every half a minute of one and the same work.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._is_live = err.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(24),
            TextColumn("{task.fields[state]}"),
            console=err,
            transient=True,
            disable=not self._is_live,
        )
        self._tasks: dict[str, tuple[Any, Pace]] = {}
        self._said = time.monotonic()

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that explains."""
        if not self.quiet:
            self._line(("· ", "dim"), text)

    def warn(self, text: str) -> None:
        """A line that matters."""
        self._line(("! ", "bold yellow"), text)

    def _line(self, mark: tuple[str, str], text: str) -> None:
        from nc_audit.report.text import plain

        _note(Text.assemble(mark, plain(text)))

    def progress(self, what: str, done: int, total: int | None) -> None:
        """How far a stage is; one bar for each."""
        now = time.monotonic()
        if what not in self._tasks:
            for other, _ in self._tasks.values():
                self._progress.update(other, visible=False)
            bar = self._progress.add_task(what, total=total, completed=done, state="")
            self._tasks[what] = bar, Pace(what, done, now)
            self._said = now
        bar, pace = self._tasks[what]
        state = pace.state(done, total, now)
        self._progress.update(bar, completed=done, total=total, state=state)
        is_over = done == total and now - pace.start >= _LOG_EVERY
        if not (self._is_live or self.quiet) and (is_over or now - self._said >= _LOG_EVERY):
            self._said = now
            self.note(f"{what}: {state}")


class Pace:
    """How fast one piece of work goes, by what was done since it was first seen.

    Args:
        what: it is; a word of it tells what is counted.
        first: done already when it was first seen, as from an earlier run.
        start: when that was, in seconds.
    """

    def __init__(self, what: str, first: int, start: float) -> None:
        self.first, self.start = first, start
        self.unit = next((unit for word, unit in _UNITS.items() if word in what.split()), "")

    def state(self, done: int, total: int | None, now: float) -> str:
        """How far it is, how fast it goes, and how long it will still take, in words.

        Example:
            >>> Pace("embed images", 100, 0.0).state(300, 1_300, 4.0)
            '300 of 1,300, 50 images/s, 20 s left'
        """
        parts = [f"{done:,}" if total is None else f"{done:,} of {total:,}"]
        seconds, new = now - self.start, done - self.first
        if new > 0 and seconds >= 0.5:
            rate = new / seconds
            if self.unit:
                parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.1f} {self.unit}/s")
            if total is not None and total > done:
                parts.append(f"{duration((total - done) / rate)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A length of time for people.

    Example:
        >>> duration(42), duration(130), duration(7_500)
        ('42 s', '2 min 10 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _pairs(count: int) -> str:
    return "pair" if count == 1 else "pairs"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def show_summary(summary: Mapping[str, Any], run: str, *, is_default: bool) -> None:
    """What a run found, where its time went and what to type next, to stdout."""
    console = out()
    rows, status = summary["rows"], summary["status"]
    console.print(
        f"{rows:,} rows, {summary['pairs']:,} distinct pairs of {summary['images']:,} images and "
        f"{summary['captions']:,} captions"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    ok = max(1, status.get("ok", 0))
    for tag, count in summary["tags"].items():
        table.add_row(Text(tag, _TAG_STYLES[tag]), f"{count:,}", percent(count / ok))
    for name, count in status.items():
        if name != "ok":
            table.add_row(Text(name, "magenta"), f"{count:,}", "not audited")
    console.print(table)
    if summary.get("decided_rows"):
        console.print(Text(f"decided by people: {summary['decided_rows']:,} rows"))
    for line in rate_lines(summary):
        _hanging(console, "", Text(line))
    for found in summary["findings"]:
        rows = "1 row" if found["count"] == 1 else f"{found['count']:,} rows"
        _hanging(console, "found: ", Text(f"{rows}  {found['kind']}: {found['detail']}"))
    held = summary.get("held", {})
    if any(held.values()) and "embed" in summary.get("did", ["embed"]):
        new = summary["embedded"]
        parts = [f"{new[side]:,} of {new[side] + held[side]:,} {side}" for side in ("images", "captions")]
        console.print(Text(f"embedded anew: {' and '.join(parts)}", "dim"))
    console.print(Text(time_line(summary), "dim"))
    where = "" if is_default else f" --run {run}"
    console.print(Text(f"run: {run}", "dim"))
    _next(console, f"nc-audit report{where} --top 200", f"nc-audit export{where} --drop noisy")


def show_forecast(facts: Mapping[str, Any], run: str) -> None:
    """What a score would do, to stdout."""
    console = out()
    console.print(
        f"{facts['rows']:,} rows, {facts['pairs']:,} distinct pairs of {facts['images']['total']:,} images and "
        f"{facts['captions']['total']:,} captions"
    )
    for name, count in facts["status"].items():
        if name != "ok":
            console.print(Text(f"{name}: {count:,}, not audited"))
    for side, spec in (("images", "image"), ("captions", "text")):
        known = facts[side]
        new = known["total"] - known["held"]
        text = f"{side}: {new:,} to embed with {facts['encoders'][spec]}"
        text += f", {known['held']:,} held by the run" if known["held"] else ""
        text += f", about {duration(known['seconds'])}" if known["seconds"] else ""
        _hanging(console, "", Text(text))
    console.print(f"device: {facts['device']}, {facts['precision']}")
    sizes = facts["disk"]
    largest = sorted((name for name in sizes if name != "total"), key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} {sizes[name] / 1e6:,.1f}" for name in largest)
    console.print(Text(f"disk: about {sizes['total'] / 1e6:,.1f} MB in {run} ({named}, ...)"))
    if facts["memory"]["embeddings"]:
        size = facts["memory"]["embeddings"] / 1e6
        console.print(
            Text(f"memory: {size:,.1f} MB for the embeddings alone, beside the encoders and training")
        )
    if facts["fetch"]:
        _hanging(console, "", Text(f"not known: sizes and times of embeddings; {facts['fetch']}"))
    console.print(Text("nothing was written; the same command without --dry-run does it", "dim"))


def time_line(summary: Mapping[str, Any]) -> str:
    """Where the time of a command went; within embed, what its encoders learnt, waited for and computed.

    Of a command that found everything done, or where it is not known, where that of the run went.
    """
    did = summary.get("did") or list(summary["seconds"])
    seconds = {stage: value for stage, value in summary["seconds"].items() if stage in did}
    parts = []
    for stage, value in seconds.items():
        inner = summary.get("embed_seconds", {}) if stage == "embed" else {}
        spent = ", ".join(f"{what} {part:.1f}" for what, part in inner.items() if part >= 0.05)
        parts.append(f"{stage} {value:.1f}" + (f": {spent};" if spent else ","))
    kept = ", ".join(stage for stage in summary["seconds"] if stage not in did)
    more = f"; {kept} done before" if kept else ""
    return f"time: {sum(seconds.values()):.1f} s ({' '.join(parts).rstrip(',;')}{more})"


def rate_lines(summary: Mapping[str, Any]) -> list[str]:
    """The estimated noise rate in words, with what it rests on."""
    rate = summary["noise_rate"]
    if rate["evidence"] == "none":
        return [
            "noise rate: cannot be told. The scores do not tell the given pairs from deliberate mismatches: either "
            "nearly all captions are wrong, or the encoder sees too little.",
            "every pair is ambiguous; use a better encoder (--encoder), or look at some pairs with nc-audit report",
        ]
    interval = f"{percent(rate['low'])} to {percent(rate['high'])}"
    if rate["evidence"] == "uncalibrated":
        return [
            f"noise rate by this recipe's own rule: {percent(rate['estimate'])} (sampling alone {interval}); "
            "its probabilities are not calibrated on known swaps, the default recipe's are"
        ]
    lines = [
        f"estimated noise rate: {percent(rate['estimate'])} ({100 * rate['level']:.0f} % interval {interval}, "
        "errors harder than random mismatches are not counted)"
    ]
    if rate["expected_auroc"] is not None:
        lines.append(f"expected AUROC of noise_score: {rate['expected_auroc']:.3f}")
    if rate["evidence"] == "weak":
        lines.append(
            "the evidence is weak: the encoder tells mismatches from matches poorly here, so the rate may be "
            "overstated and tags need a look; a pretrained encoder helps (--encoder open_clip:MODEL@FILE)"
        )
    if summary["whole_images"]:
        lines.append("noise strikes whole images here: all captions of an image are judged together")
    elif summary.get("by_image_share"):
        lines.append(
            f"noise strikes whole images as well as single pairs here: some {percent(summary['by_image_share'])} of it"
        )
    return lines


def show_rows(rows: Sequence[ReportRow], summary: Mapping[str, Any]) -> None:
    """The pairs, worst first, to stdout: a table, or one below the other where a table would be narrow or crooked."""

    console = out()
    texts = [one for row in rows for one in (row.image or "", _caption(row), *row.reasons)]
    if console.width < _TABLE_WIDTH or not all(map(_is_steady, texts)):
        for row in rows:
            console.print(_head(row))
            _show_words(console, row, "  ")
    else:
        console.print(_rows_table(rows, console.width))
    tags = ", ".join(f"{count:,} {tag}" for tag, count in summary["tags"].items())
    _note(Text(f"{len(rows):,} of {summary['pairs']:,} distinct pairs shown; rows by tag: {tags}", "dim"))


def _rows_table(rows: Sequence[ReportRow], width: int) -> Table:
    from nc_audit.report.text import plain

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("tag", no_wrap=True)
    table.add_column("image", overflow="fold", max_width=width // 4)
    table.add_column("caption", overflow="fold", ratio=4)
    table.add_column("reasons", overflow="fold", ratio=6)
    for row in rows:
        tag = row.tag or "-"
        table.add_row(
            f"{row.row}",
            "" if row.noise_probability is None else f"{row.noise_probability:.2f}",
            Text(tag, _TAG_STYLES.get(tag, "")),
            Text(plain(row.image or "")),
            Text(_caption(row)),
            Text("; ".join(plain(reason) for reason in row.reasons)),
        )
    return table


def _head(row: ReportRow) -> Text:
    """Tag, probability, row and image of a pair."""
    from nc_audit.report.text import plain

    tag = row.tag or "-"
    p = "" if row.noise_probability is None else f" p {row.noise_probability:.2f}"
    return Text.assemble((tag, _TAG_STYLES.get(tag, "")), f"{p} row {row.row} {plain(row.image or '')}")


def _caption(row: ReportRow) -> str:
    from nc_audit.report.text import plain

    return plain(row.caption or "") + (f" (x{row.copies})" if row.copies > 1 else "")


def _show_words(console: Console, row: ReportRow, indent: str) -> None:
    """Caption and reasons of a pair, and an empty line."""
    from nc_audit.report.text import plain

    _hanging(console, indent, Text(_caption(row)))
    for reason in row.reasons:
        _hanging(console, f"{indent}- ", Text(plain(reason), "dim"))
    console.print()


def show_thumbnails(rows: Sequence[ReportRow], images: ImageStore) -> None:
    """Each pair as a picture with its words below, to stdout; the words alone without colours."""
    from nc_audit.errors import DatasetError
    from nc_audit.report.terminal import Screen, ask_terminal, screen_of
    from nc_audit.report.text import plain

    console = out()
    screen: Screen | None = None
    if console.color_system and not console.no_color:
        screen = screen_of(os.environ, ask_terminal) if sys.stdout.isatty() else Screen("blocks")
    for row in rows:
        console.print(_head(row))
        if row.image_uri and screen:
            try:
                _show_picture(console, images.read(row.image_uri), screen)
            except (DatasetError, OSError) as problem:
                console.print(Text(f"no picture: {plain(str(problem))}", "dim"))
        _show_words(console, row, "")


def _show_picture(console: Console, data: bytes, screen: Screen) -> None:
    from nc_audit.report.terminal import kitty, sixel
    from nc_audit.report.thumbnails import half_blocks

    columns = min(24, console.width)
    if screen.form == "blocks":
        for line in half_blocks(data, columns):
            shown = Text(no_wrap=True)
            for upper, lower in line:
                shown.append("\u2580", f"{upper} on {lower}")
            console.print(shown)
    else:
        print_data(
            kitty(data, columns) if screen.form == "kitty" else sixel(data, columns, screen.cell_width)
        )


def show_large_page(size: int) -> None:
    """A warning to stderr that a page with its pictures inside is large.

    Args:
        size: of the page, in bytes.
    """
    _note(
        Text(
            f"! the page is {size / 1e6:,.0f} MB; --thumbnails puts its pictures into files beside it",
            "yellow",
        )
    )


def show_export(result: ExportResult) -> None:
    """What an export wrote, to stdout; the counts reconcile."""
    console = out()
    console.print(Text(f"{result.kept:,} of {result.rows:,} rows exported to {result.out}"))
    for reason, count in result.dropped.items():
        console.print(Text(f"  left out: {count:,}  {reason}"))
    if result.num_rematched:
        console.print(Text(f"  captions replaced: {result.num_rematched:,}"))


def show_address(url: str, num_pairs: int, *, json: bool) -> None:
    """Where the review page is; to stderr where stdout is for one JSON document."""
    text = f"{num_pairs:,} pairs to review at {url}"
    if json:
        err.print(Text(text))
    else:
        print_data(text)
        sys.stdout.flush()
    _note(Text("every decision is saved at once; Finish in the page, or Ctrl-C here, ends the review", "dim"))


def show_review(facts: Mapping[str, Any]) -> None:
    """Who decided what, and what a random sample says, to stdout."""
    from nc_audit.report.text import plain

    console = out()
    reviewers = facts["reviewers"]
    if reviewers:
        names = ("keep", "drop", "fix", "rematch")
        show_listing(
            ["reviewer", *names],
            [[name, *(f"{counts.get(one, 0):,}" for one in names)] for name, counts in reviewers.items()],
        )
    console.print(
        Text(
            f"{facts['decided']:,} {_pairs(facts['decided'])} decided by people; their word wins over the tags"
        )
    )
    if facts["num_conflicts"]:
        shown = ", ".join(plain(one) for one in facts["conflicts"][:5])
        more = ", ..." if facts["num_conflicts"] > 5 else ""
        console.print(Text(f"reviewers disagree about {facts['num_conflicts']:,}: {shown}{more}", "yellow"))
    if facts["num_torn"]:
        console.print(Text(f"{facts['num_torn']:,} torn lines of decisions.jsonl were passed over", "yellow"))
    for line in facts["statement"]:
        _hanging(console, "", Text(line))
    if not facts["statement"]:
        err.print(Text("next: nc-audit review --sample 150 measures the tags", "dim"))


def show_import(facts: Mapping[str, Any]) -> None:
    """What an import of decisions took, to stdout."""
    counts = ", ".join(f"{count:,} {name}" for name, count in facts["by_decision"].items())
    text = f"{facts['imported']:,} decisions imported" + (f": {counts}" if counts else "")
    if facts["unchanged"]:
        text += f"; {facts['unchanged']:,} stood already"
    out().print(Text(text))


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Retrieval of a run's model, to stdout."""
    console, recall = out(), result["retrieval"]
    which = f"split {result['split']}" if result["split"] else "all rows"
    console.print(
        Text(
            f"{which}: {result['images']:,} images, {result['captions']:,} captions, {result['pairs']:,} pairs"
        )
    )
    show_listing(
        ["", "R@1", "R@5", "R@10"],
        [
            [name, *(f"{recall[f'{key}_r{k}']:.1f}" for k in (1, 5, 10))]
            for name, key in (("image to caption", "i2t"), ("caption to image", "t2i"))
        ],
    )
    console.print(Text(f"mR {recall['mr']:.2f}, rSum {recall['rsum']:.1f} (per cent; ties count against)"))
    hashing = result.get("hashing")
    if hashing:
        console.print(
            Text(
                f"mAP@20 over Hamming distance, {hashing['bits']} bits: image to caption {hashing['i2t_map20']:.3f}, "
                f"caption to image {hashing['t2i_map20']:.3f}"
            )
        )
    if result["trained_on"] > 0:
        console.print(
            Text(
                f"{percent(result['trained_on'])} of these pairs sat in the training of the run: the figures flatter; "
                "score with --split train and evaluate another split",
                "yellow",
            )
        )


def show_gate(checks: Sequence[Check]) -> None:
    """Each limit with the value and whether it is kept, to stdout."""
    show_listing(
        ["limit", "at most", "found", ""],
        [
            [one.name.replace("_", " "), str(one.limit), one.shown(), "pass" if one.is_kept else "FAIL"]
            for one in checks
        ],
    )


def show_diff(difference: Difference, top: int) -> None:
    """What changed between two runs, to stdout."""
    from nc_audit.report.text import plain

    console = out()
    tags = ["clean", "ambiguous", "noisy", "not audited"]
    show_listing(
        ["before / after", *tags],
        [[one, *(f"{difference.matrix.get((one, other), 0):,}" for other in tags)] for one in tags],
    )

    def line(verdict: Verdict) -> str:
        value = verdict.noise_probability
        told = "" if value is None else f" {value:.2f}"
        because = f"  ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
        return plain(f"{verdict.tag}{told}{because}")

    def pair(verdict: Verdict) -> None:
        text = f"{plain(verdict.image or '')}  {plain(verdict.caption or '')}"
        _hanging(console, f"  row {verdict.row:,}  ", Text(text))

    console.print(Text(f"{len(difference.changes):,} {_pairs(len(difference.changes))} changed tag"))
    for change in difference.changes[:top]:
        after = change.after
        pair(after)
        _hanging(console, "    was ", Text(line(change.before)))
        _hanging(console, "    now ", Text(line(after)))
    for name, only in (("first", difference.only_a), ("second", difference.only_b)):
        console.print(Text(f"{len(only):,} {_pairs(len(only))} in the {name} run only"))
        for _, one in only[:top]:
            pair(one)


def show_bench(results: Sequence[Mapping[str, Any]], form: str) -> None:
    """The tables of a bench, to stdout.

    Args:
        results: its lines.
        form: table (a matrix per quantity), md (the same in Markdown) or long (a line per cell and recipe).
    """
    from nc_audit.bench import tables

    rows = tables.summarise(results)
    parts = [("detection", tables.detection_table(rows))]
    if form != "long":
        parts = [
            ("", tables.matrix(rows, name)) for name in tables.SHOWN if any(name in r.mean for r in rows)
        ]
    retrieval = tables.summarise(results, "retrieval")
    if retrieval:
        parts.append(("retrieval on the clean test split, per cent", tables.retrieval_table(retrieval)))
    downstream = tables.summarise(results, "downstream")
    if downstream:
        ways = ("raw", "random_drop", "drop_noisy", "reweight", "oracle")
        title = "plain models trained on what the recipe would export: mean recall, per cent"
        parts.append((title, tables.named_table(downstream, ways)))
    for title, (heads, cells) in parts:
        if form == "md":
            print_data((f"{title}\n\n" if title else "") + tables.markdown(heads, cells) + "\n")
            continue
        if title:
            out().print(Text(title, "bold"))
        show_listing(heads, cells)
        out().print()
    if form != "md":
        out().print(Text("* best of its kind and rate; ± is the deviation over seeds", "dim"))


def show_speed(facts: Mapping[str, Any]) -> None:
    """Seconds of the plain loop and of the whole audit, and the shares of the latter, to stdout."""
    about = f"{facts['images']:,} images, {facts['rows']:,} captions, {facts['encoder']}, {facts['device']}"
    out().print(Text(f"{about}, {facts['precision']}, {facts['processors']} processors"))
    rows = [
        ["plain loop of CLIP scores", f"{facts['plain_s']:.1f}", ""],
        ["whole audit", f"{facts['audit_s']:.1f}", f"a ratio of {facts['ratio']:.2f}"],
    ]
    rows += [
        [f"  of it {name}", f"{share * facts['audit_s']:.1f}", percent(share)]
        for name, share in facts["shares"].items()
    ]
    show_listing(["", "seconds", ""], rows)


def show_listing(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table, to stdout."""
    from nc_audit.report.text import plain

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for at, name in enumerate(header):
        is_number = bool(rows) and all(_NUMBER.fullmatch(row[at]) for row in rows)
        table.add_column(name, overflow="fold", justify="right" if is_number and at else "left")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    out().print(table)
