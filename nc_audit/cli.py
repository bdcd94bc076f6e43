"""The `nc-audit` command: arguments in, one call into the library, words out. No logic lives here.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from nc_audit import __version__
from nc_audit.errors import AuditError, DatasetError, RecipeError, nearest
from nc_audit.process import set_up

app = typer.Typer(
    name="nc-audit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run directory; the run scored last when not given."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")
]

RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="Recipe; repeatable, later ones override earlier ones."
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", metavar="SPEC", help="Encoder of images and captions, e.g. auto, builtin."),
]
ImageEncoderOption = Annotated[
    str | None, typer.Option("--image-encoder", metavar="SPEC", help="Image encoder.")
]
ImageWeightsOption = Annotated[
    Path | None,
    typer.Option("--image-weights", metavar="FILE", help="Local weights of the image encoder."),
]
TextEncoderOption = Annotated[
    str | None, typer.Option("--text-encoder", metavar="SPEC", help="Text encoder.")
]
TextWeightsOption = Annotated[
    Path | None, typer.Option("--text-weights", metavar="FILE", help="Local weights of the text encoder.")
]
SubsetOption = Annotated[
    str | None,
    typer.Option("--subset", metavar="NAME", help="This subset of those the dataset's card lists."),
]
SplitOption = Annotated[str | None, typer.Option("--split", metavar="NAME", help="This split only.")]
LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", help="The first N rows only.")]
ImageRootOption = Annotated[
    Path | None, typer.Option("--image-root", metavar="DIR", help="Folder with the images.")
]
AllowNetworkOption = Annotated[
    bool,
    typer.Option(
        "--allow-network",
        help="Fetch a dataset of the hub or a bucket, and images given by http or https URL.",
    ),
]
ImageColumnOption = Annotated[
    str | None, typer.Option("--image-column", metavar="NAME", help="Column with the image.")
]
CaptionColumnOption = Annotated[
    str | None, typer.Option("--caption-column", metavar="NAME", help="Column with the caption.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Precision of the encoders.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", help="Override a setting; repeatable."),
]

_ENGINES = ("local", "ray")
EXIT_GATE, EXIT_FIXABLE, EXIT_UNEXPECTED, EXIT_INTERRUPTED = 1, 2, 70, 130


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors end as two lines and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            from nc_audit import console

            try:
                function(*args, **kwargs)
                sys.stdout.flush()  # what cannot be written is told here, not on the way out
            except typer.Exit:
                raise
            except AuditError as problem:
                console.show_error(problem)
                raise typer.Exit(EXIT_FIXABLE) from None
            except BrokenPipeError:
                # The reader (head, less) has what it wanted.
                _silence_stdout()
                raise typer.Exit(0) from None
            except KeyboardInterrupt:
                console.show_error(AuditError("interrupted", "the same command resumes where it stopped"))
                raise typer.Exit(EXIT_INTERRUPTED) from None
            except OSError as problem:
                if _is_full(problem):
                    raise typer.Exit(_lost_output()) from None
                where = f"{problem.filename}: " if problem.filename else ""
                console.show_error(
                    AuditError(
                        f"{where}{problem.strerror or problem}", "mend it; the same command then resumes"
                    )
                )
                raise typer.Exit(EXIT_FIXABLE) from None
            except Exception as problem:
                console.show_error(
                    AuditError(
                        f"unexpected {type(problem).__name__}: {problem}", f"details: {_log_failure()}"
                    )
                )
                raise typer.Exit(EXIT_UNEXPECTED) from None

        return app.command(name)(guarded)

    return register


def _is_full(problem: OSError) -> bool:
    """Whether nothing more can be printed: files of ours are named by who writes them."""
    return problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not problem.filename


def _lost_output() -> int:
    """Say that the output could not be written; the exit code."""
    from nc_audit import console

    _silence_stdout()
    console.show_error(
        AuditError(
            "the output could not be written: its disk is full", "send it elsewhere, or make room there"
        )
    )
    return EXIT_FIXABLE


def _silence_stdout() -> None:
    """Send what is left to be printed nowhere, so that it does not fail again on the way out."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_failure() -> str:
    """Keep the traceback in a file, and say where; on stderr where no file can be written."""
    import tempfile

    text = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("w", prefix="nc-audit-", suffix=".log", delete=False) as log:
            log.write(text)
        return log.name
    except OSError:
        sys.stderr.write(text)
        return "above"


def _version(value: bool) -> None:
    if value:
        from nc_audit.console import print_data

        print_data(f"nc-audit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Find the captions that do not describe their images, before you train on them.

    Example: nc-audit score rsitmd/
    """


@command("score")
def score(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Folder or file with captions and images, a pattern of files, hf:OWNER/NAME, or s3://BUCKET/PATH.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run directory; runs/NAME when not given.")
    ] = None,
    recipe: RecipeOption = None,
    encoder: EncoderOption = None,
    image_encoder: ImageEncoderOption = None,
    image_weights: ImageWeightsOption = None,
    text_encoder: TextEncoderOption = None,
    text_weights: TextWeightsOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    image_root: ImageRootOption = None,
    image_column: ImageColumnOption = None,
    caption_column: CaptionColumnOption = None,
    trusted: Annotated[
        Path | None,
        typer.Option(
            "--trusted", metavar="FILE", help="Pairs known to be right: csv, jsonl or Parquet (recipe chnr)."
        ),
    ] = None,
    allow_network: AllowNetworkOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Work in this process, or in one on each GPU of a Ray cluster (RAY_ADDRESS).",
        ),
    ] = "local",
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")
    ] = None,
    set_: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Start over instead of resuming.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done and what it would take; write nothing."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Load, embed, train, score and tag a dataset into a run directory; rerunning resumes or does nothing.

    Example: nc-audit score rsitmd/ --recipe mobilenet_tfidf
    """
    from nc_audit import console
    from nc_audit.dataset import find_dataset
    from nc_audit.pipeline import help_embed, score_dataset
    from nc_audit.recipe import build_recipe
    from nc_audit.run import RUNS, remember_latest
    from nc_audit.team import of_torchrun

    settings = {
        "dataset": {
            "image_root": _path(image_root),
            "image_column": image_column,
            "caption_column": caption_column,
            "subset": subset,
            "split": split,
            "limit": limit,
            "trusted": _path(trusted),
            "allow_network": allow_network or None,
        },
        **_encoder_settings(encoder, image_encoder, image_weights, text_encoder, text_weights),
        "train": {"seed": seed},
    }
    built = build_recipe(recipe or (), set_ or (), settings)
    team = of_torchrun()
    if engine not in _ENGINES:
        raise RecipeError(f"unknown engine {engine!r}", nearest(engine, _ENGINES))
    if engine == "ray" and team.size > 1:
        raise RecipeError("torchrun and --engine ray both share out the work", "take one of them")
    if not team.is_first:
        if not dry_run:
            help_embed(team, built, device, precision)
        return
    with console.Watch(quiet=json) as watch:
        place = find_dataset(
            dataset,
            allow_network=built.dataset.allow_network,
            progress=lambda done, total: watch.progress("fetch", done, total),
        )
        run = out or RUNS / place.name
        for note in place.notes:
            watch.note(note)
        if dry_run:
            from nc_audit.forecast import forecast_score

            facts = forecast_score(place.path, run, built, device=device, precision=precision, watch=watch)
        else:
            if engine == "ray":
                from nc_audit.cluster import score_on_cluster as score_there
            else:
                score_there = partial(score_dataset, team=team)
            facts = score_there(
                place.path,
                run,
                built,
                recipe_names=tuple(recipe or ()),
                device=device,
                precision=precision,
                force=force,
                watch=watch,
                given=dataset if dataset != str(place.path) and not Path(dataset).exists() else None,
            )
    if not dry_run:
        remember_latest(run)
    if json:
        console.print_json({"run": str(run), **facts})
    elif dry_run:
        console.show_forecast(facts, str(run))
    else:
        console.show_summary(facts, str(run), is_default=True)


@command("report")
def report(
    run: RunOption = None,
    top: Annotated[
        int | None,
        typer.Option("--top", metavar="N", min=1, help="How many pairs, worst first; 20, in html 500."),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="TAGS", help="Only these tags, comma separated.")
    ] = None,
    finding: Annotated[
        str | None,
        typer.Option(
            "--finding", metavar="KINDS", help="Only pairs with such findings, e.g. disagrees,unlikely_word."
        ),
    ] = None,
    sort: Annotated[
        str, typer.Option("--sort", metavar="COLUMN", help="Column of scores.parquet to sort by.")
    ] = "noise_probability",
    format: Annotated[
        str, typer.Option("--format", metavar="table|json|csv|md|html", help="How to show the pairs.")
    ] = "table",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write to a file instead of stdout; html: report/ of the run."
        ),
    ] = None,
    thumbnails: Annotated[
        bool,
        typer.Option("--thumbnails", help="Small pictures: in the terminal; in html as files in a folder."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show the worst pairs with their captions, probabilities, tags and reasons.

    Example: nc-audit report --format html --top 500 --tag noisy
    """
    from nc_audit import console
    from nc_audit.report import report_rows, summary, to_csv, to_json, to_markdown

    form = "json" if json else format
    formats = ["table", "json", "csv", "md", "html"]
    if form not in formats:
        raise DatasetError(f"unknown report format {form!r}", nearest(form, formats))
    opened = _open(run)
    rows = report_rows(
        opened,
        top=top or (500 if form == "html" else 20),
        tags=_listed(tag),
        findings=_listed(finding),
        sort=sort,
    )
    counts = summary(opened)
    if thumbnails and form not in ("table", "html"):
        raise DatasetError(f"--thumbnails does not go with --format {form}", "use --format html, or none")
    if form == "html":
        from nc_audit.pipeline import open_images
        from nc_audit.report.html import MAX_INLINED_BYTES, html_report, write_page

        page = html_report(opened, rows, open_images(opened), as_files=thumbnails, sort=sort)
        if not thumbnails and len(page.html) > MAX_INLINED_BYTES:
            console.show_large_page(len(page.html))
        console.print_data(str(write_page(page, opened, out)))
        return
    if form == "table" and out is None:
        if thumbnails:
            from nc_audit.pipeline import open_images

            console.show_thumbnails(rows, open_images(opened))
        else:
            console.show_rows(rows, counts)
        return
    if form == "table":
        raise DatasetError("a table goes to the terminal only", "add --format html, json, csv or md to --out")
    text = {
        "json": lambda: to_json(rows, counts),
        "csv": lambda: to_csv(rows),
        "md": lambda: to_markdown(rows, counts),
    }[form]()
    if out is None:
        console.print_data(text)
        return
    from nc_audit.run import replacing

    if out.exists() and not out.is_file():
        raise DatasetError(f"{out} is a folder", "name a file")
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")


@command("export")
def export(
    run: RunOption = None,
    drop: Annotated[
        str | None,
        typer.Option("--drop", metavar="TAGS", help="Leave out these tags, comma separated, e.g. noisy."),
    ] = None,
    reweight: Annotated[bool, typer.Option("--reweight", help="Add a weight column, 0..1.")] = False,
    rematch: Annotated[
        bool,
        typer.Option(
            "--rematch", help="Give pairs the caption that surely fits, where one was found; each is listed."
        ),
    ] = False,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Names in the place of the images; parquet only.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="parquet (default), imagefolder, webdataset, coco, karpathy, csv, jsonl, datacomp or hf.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; RUN/export when not given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", "--force", help="Replace a folder that is no export of ours.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write the dataset without the tags you drop, or with a weight for each pair.

    What people decided in review counts more than tags.

    Example: nc-audit export --drop noisy --format webdataset --out cleaned
    """
    from nc_audit import console
    from nc_audit.export import export_run, recipe_defaults
    from nc_audit.pipeline import open_images

    opened = _open(run)
    defaults = recipe_defaults(opened)
    with console.Watch(quiet=json) as watch:
        result = export_run(
            opened,
            out or opened.path / "export",
            format=format or defaults.format,
            drop=defaults.drop if drop is None else _listed(drop) or [],
            reweight=reweight or defaults.reweight,
            rematch=rematch,
            with_images=not no_images,
            overwrite=overwrite,
            read_image=open_images(opened).read,
            progress=lambda done, total: watch.progress("export", done, total),
        )
        for note in result.notes:
            watch.warn(note)
    if json:
        console.print_json(
            {
                "out": str(result.out),
                "rows": result.rows,
                "kept": result.kept,
                "dropped": result.dropped,
                "rematched": result.num_rematched,
                "files": result.files,
                "notes": result.notes,
            }
        )
    else:
        console.show_export(result)


@command("tag")
def tag(
    run: RunOption = None,
    target_precision: Annotated[
        float | None,
        typer.Option(
            "--target-precision", metavar="P", min=0, max=1, help="Share of noise expected among noisy tags."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="5%", help="Tag this share of the rows noisy, the worst first."),
    ] = None,
    noisy_at: Annotated[
        float | None,
        typer.Option("--noisy-at", metavar="P", min=0, max=1, help="Noisy from this probability."),
    ] = None,
    clean_at: Annotated[
        float | None,
        typer.Option("--clean-at", metavar="P", min=0, max=1, help="Clean up to this probability."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Tag a run anew, without rescoring.

    Example: nc-audit tag --target-precision 0.95
    """
    from nc_audit import console
    from nc_audit.pipeline import retag

    if target_precision is not None and (budget is not None or noisy_at is not None):
        raise DatasetError(
            "--target-precision decides what is noisy", "give it without --budget and --noisy-at"
        )
    if budget is not None and noisy_at is not None:
        raise DatasetError("--budget decides what is noisy", "give it without --noisy-at")
    opened = _open(run)
    summary = retag(
        opened,
        target_precision=target_precision,
        budget=None if budget is None else _share(budget),
        clean_at=clean_at,
        noisy_at=noisy_at,
    )
    if json:
        console.print_json({"run": str(opened.path), **summary})
    else:
        console.show_summary(summary, str(opened.path), is_default=run is None)


@command("review")
def review(
    run: RunOption = None,
    reviewer: Annotated[
        str | None,
        typer.Option(
            "--reviewer", metavar="NAME", help="Who decides; the name of the account when not given."
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="TAGS", help="Only these tags, e.g. noisy,ambiguous.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", metavar="N", min=1, help="Pairs drawn at random, tags hidden, to measure the tags."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address; do not open a browser.")
    ] = False,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print what the random sample says, and who decided what; then stop."),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the decisions to a file; then stop."),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Take decisions from a csv, jsonl or Label Studio json file; then stop.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="csv|jsonl|labelstudio|argilla",
            help="Of --export; by its ending when not given.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Let people keep, drop or correct pairs in a local web page; what they decide wins over the tags.

    Example: nc-audit review --tag noisy,ambiguous
    """
    from nc_audit import console
    from nc_audit.pipeline import open_images
    from nc_audit.review import (
        Review,
        ReviewServer,
        export_decisions,
        import_decisions,
        review_facts,
    )

    if sum((stats, export is not None, import_ is not None)) > 1:
        raise DatasetError("--stats, --export and --import each stop when done", "give one of them")
    if format is not None and export is None:
        raise DatasetError(
            "--format goes with --export", "for example --export tasks.json --format labelstudio"
        )
    if tag is not None and sample is not None:
        raise DatasetError("--sample draws from all pairs", "give it without --tag")
    opened = _open(run)
    name = reviewer or _account()
    if export is not None:
        count = export_decisions(opened, export, form=format, tags=_listed(tag))
        facts: dict[str, Any] = {"out": str(export), "entries": count}
        console.print_json(facts) if json else console.print_data(f"{count:,} entries written to {export}")
        return
    if import_ is not None:
        facts = import_decisions(opened, import_, reviewer=name)
        _follow(opened)
        console.print_json(facts) if json else console.show_import(facts)
        return
    if not stats:
        held = Review(opened, name, tags=_listed(tag), sample=sample, read_image=open_images(opened).read)
        server = ReviewServer(held, port)
        console.show_address(server.url, len(held.queue), json=json)
        if not no_browser:
            _browse(server.url)
        _until_stopped(server.serve_until_finished)
        _follow(opened)
    facts = review_facts(opened)
    if json:
        console.print_json({"run": str(opened.path), **facts})
    else:
        console.show_review(facts)


def _follow(run: Any) -> None:
    """Let the tags follow the decisions; these are safe in any case."""
    from nc_audit import console
    from nc_audit.pipeline import apply_decisions

    try:
        apply_decisions(run)
    except AuditError as problem:
        console.show_error(
            AuditError(
                f"the tags do not follow yet: {problem.message}",
                "decisions are saved; " + (problem.hint or "nc-audit tag"),
            )
        )


def _account() -> str:
    """The name of the account, for decisions that name nobody."""
    from getpass import getuser

    try:
        return getuser()
    except (KeyError, OSError):
        return "reviewer"


def _browse(url: str) -> None:
    """Open a browser beside us, where there is a screen for one: a text browser would take the terminal."""
    import threading
    import webbrowser

    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & os.environ.keys():
        return
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _until_stopped(serve: Callable[[], None]) -> None:
    """Serve until it is over; Ctrl-C and a plain kill end it in good order, since every decision is saved."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        serve()
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


@command("bench")
def bench(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Folder, file, pattern, hf:OWNER/NAME or s3://BUCKET/PATH, taken as clean.",
        ),
    ],
    kinds: Annotated[
        str,
        typer.Option(
            "--kinds", help="Comma list of caption, image, donor, class, block, truncated, mixture, word."
        ),
    ] = "caption",
    rates: Annotated[
        str, typer.Option("--rates", help="Comma list of shares, 0 to 0.95.")
    ] = "0,0.2,0.4,0.6,0.8",
    recipes: Annotated[
        str,
        typer.Option(
            "--recipes", metavar="NAMES", help="Comma list of recipes, each NAME or NAME+section.key=value."
        ),
    ] = "self_paced,similarity",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="How many, from 0 on.")] = 1,
    test_split: Annotated[
        str | None,
        typer.Option(
            "--test-split", metavar="NAME", help="Keep this split clean and measure retrieval on it."
        ),
    ] = None,
    downstream: Annotated[
        bool,
        typer.Option(
            "--downstream", help="Also train plain models on raw and on cleaned pairs (--test-split)."
        ),
    ] = False,
    trusted_share: Annotated[
        float,
        typer.Option(
            "--trusted-share",
            min=0,
            max=0.9,
            help="Share of the clean pairs given to recipes that need trusted ones.",
        ),
    ] = 0.2,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Time the whole audit against a plain loop of CLIP scores instead, on 420 images or --limit; "
            "--encoder open_clip:MODEL or open_clip:MODEL@FILE.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Bench folder; bench/NAME when not given.")
    ] = None,
    recipe: RecipeOption = None,
    encoder: EncoderOption = None,
    image_encoder: ImageEncoderOption = None,
    image_weights: ImageWeightsOption = None,
    text_encoder: TextEncoderOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    image_root: ImageRootOption = None,
    allow_network: AllowNetworkOption = False,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="table|md|long",
            help="A matrix per quantity, the same in Markdown, or a line per cell.",
        ),
    ] = "table",
    json: JsonOption = False,
) -> None:
    """Put known noise into a dataset taken as clean, and measure how well recipes find it.

    With --speed it times the whole audit against a plain loop that only computes CLIP scores.

    Example: nc-audit bench ucm_captions/ --rates 0.2,0.4 --recipes self_paced,similarity --seeds 3
    """
    from nc_audit import console
    from nc_audit.bench.runner import Grid, bench_dataset
    from nc_audit.dataset import find_dataset
    from nc_audit.recipe import build_recipe

    if format not in ("table", "md", "long"):
        raise DatasetError(f"unknown table format {format!r}", "table, md or long")
    settings = {
        "dataset": {
            "image_root": _path(image_root),
            "subset": subset,
            "split": split,
            "limit": None if speed else limit,
            "allow_network": allow_network or None,
        },
        **_encoder_settings(encoder, image_encoder, image_weights, text_encoder, None),
    }
    grid = Grid(
        kinds=tuple(_listed(kinds) or ()),
        rates=tuple(_share(one) for one in _listed(rates) or ()),
        recipes=tuple(_listed(recipes) or ()),
        seeds=tuple(range(seeds)),
        test_split=test_split,
        with_downstream=downstream,
        trusted_share=trusted_share,
    )
    built = build_recipe(recipe or (), set_ or (), settings)
    with console.Watch(quiet=json) as watch:
        place = find_dataset(
            dataset,
            allow_network=built.dataset.allow_network,
            progress=lambda done, total: watch.progress("fetch", done, total),
        )
        for note in place.notes:
            watch.note(note)
        if speed:
            from nc_audit.bench.speed import MODEL, NUM_IMAGES, measure_speed
            from nc_audit.pipeline import load_options

            facts = measure_speed(
                place.path,
                encoder or f"open_clip:{MODEL}",
                num_images=limit or NUM_IMAGES,
                options=load_options(built),
                note=watch.note,
            )
            console.print_json(facts) if json else console.show_speed(facts)
            return
        results = bench_dataset(
            place.path,
            out or Path("bench") / place.name,
            grid,
            base=tuple(recipe or ()),
            settings=settings,
            overrides=tuple(set_ or ()),
            device=device,
            precision=precision,
            watch=watch,
        )
    if json:
        console.print_json(results)
    else:
        console.show_bench(results, format)


@command("evaluate")
def evaluate(
    run: RunOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Split of the run's dataset; all rows when not given."),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure retrieval by the run's trained model: R@1/5/10 both ways, mR, rSum; mAP@20 of hashing recipes.

    Example: nc-audit score rsitmd/ --split train; nc-audit evaluate --split test
    """
    from nc_audit import console
    from nc_audit.bench.evaluate import evaluate_run

    opened = _open(run)
    with console.Watch(quiet=json) as watch:
        result = evaluate_run(opened, split, device=device, precision=precision, progress=watch.progress)
    if json:
        console.print_json({"run": str(opened.path), **result})
    else:
        console.show_evaluation(result)


@command("gate")
def gate(
    run: RunOption = None,
    max_noisy: Annotated[
        str | None, typer.Option("--max-noisy", metavar="N|P%", help="Rows tagged noisy.")
    ] = None,
    max_ambiguous: Annotated[
        str | None, typer.Option("--max-ambiguous", metavar="N|P%", help="Rows tagged ambiguous.")
    ] = None,
    max_unusable: Annotated[
        str | None, typer.Option("--max-unusable", metavar="N|P%", help="Rows that could not be audited.")
    ] = None,
    max_rate: Annotated[
        str | None, typer.Option("--max-rate", metavar="5%", help="Estimated noise rate, a share.")
    ] = None,
    max_duplicates: Annotated[
        str | None,
        typer.Option(
            "--max-duplicates", metavar="N|P%", help="Rows with a duplicate or near-duplicate image."
        ),
    ] = None,
    max_leakage: Annotated[
        str | None,
        typer.Option("--max-leakage", metavar="N|P%", help="Rows whose image is also in another split."),
    ] = None,
    max_contradicting_captions: Annotated[
        str | None,
        typer.Option(
            "--max-contradicting-captions", metavar="N|P%", help="Equal images whose captions disagree."
        ),
    ] = None,
    max_block_shift: Annotated[
        str | None, typer.Option("--max-block-shift", metavar="N|P%", help="Rows in a shifted block.")
    ] = None,
    max_placeholder_image: Annotated[
        str | None,
        typer.Option("--max-placeholder-image", metavar="N|P%", help="Rows of placeholder images."),
    ] = None,
    max_file_name_caption: Annotated[
        str | None,
        typer.Option("--max-file-name-caption", metavar="N|P%", help="Captions that are file names or URLs."),
    ] = None,
    max_empty_caption: Annotated[
        str | None, typer.Option("--max-empty-caption", metavar="N|P%", help="Empty captions.")
    ] = None,
    max_other_script: Annotated[
        str | None, typer.Option("--max-other-script", metavar="N|P%", help="Captions in another script.")
    ] = None,
    max_disagrees: Annotated[
        str | None,
        typer.Option("--max-disagrees", metavar="N|P%", help="Captions unlike the image's others."),
    ] = None,
    max_unlikely_word: Annotated[
        str | None,
        typer.Option("--max-unlikely-word", metavar="N|P%", help="Captions with a word unlike the image."),
    ] = None,
    max_duplicate_image: Annotated[
        str | None,
        typer.Option("--max-duplicate-image", metavar="N|P%", help="Equal images under several names."),
    ] = None,
    max_near_duplicate_image: Annotated[
        str | None,
        typer.Option("--max-near-duplicate-image", metavar="N|P%", help="Images that look the same."),
    ] = None,
    max_copied_caption: Annotated[
        str | None, typer.Option("--max-copied-caption", metavar="N|P%", help="Captions on many images.")
    ] = None,
    max_generic_caption: Annotated[
        str | None,
        typer.Option("--max-generic-caption", metavar="N|P%", help="Captions that fit many images."),
    ] = None,
    max_short_caption: Annotated[
        str | None, typer.Option("--max-short-caption", metavar="N|P%", help="Captions of one word.")
    ] = None,
    max_cut_caption: Annotated[
        str | None,
        typer.Option("--max-cut-caption", metavar="N|P%", help="Captions longer than the encoder reads."),
    ] = None,
    max_rematch: Annotated[
        str | None, typer.Option("--max-rematch", metavar="N|P%", help="Pairs that another caption fits.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a run against limits, each a number of rows or a percentage: exit code 1 when one is broken, else 0.

    Example: nc-audit gate --max-noisy 2% --max-unusable 0 --max-leakage 0
    """
    from nc_audit import console
    from nc_audit.gate import check_run

    limits = {
        "noisy": max_noisy,
        "ambiguous": max_ambiguous,
        "unusable": max_unusable,
        "rate": max_rate,
        "duplicates": max_duplicates,
        "leakage": max_leakage,
        "contradicting_captions": max_contradicting_captions,
        "block_shift": max_block_shift,
        "placeholder_image": max_placeholder_image,
        "file_name_caption": max_file_name_caption,
        "empty_caption": max_empty_caption,
        "other_script": max_other_script,
        "disagrees": max_disagrees,
        "unlikely_word": max_unlikely_word,
        "duplicate_image": max_duplicate_image,
        "near_duplicate_image": max_near_duplicate_image,
        "copied_caption": max_copied_caption,
        "generic_caption": max_generic_caption,
        "short_caption": max_short_caption,
        "cut_caption": max_cut_caption,
        "rematch": max_rematch,
    }
    opened = _open(run)
    checks = check_run(opened, {name: text for name, text in limits.items() if text is not None})
    is_kept = all(check.is_kept for check in checks)
    if json:
        console.print_json(
            {"run": str(opened.path), "kept": is_kept, "checks": [check.as_json() for check in checks]}
        )
    else:
        console.show_gate(checks)
    if not is_kept:
        raise typer.Exit(EXIT_GATE)


@command("diff")
def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run before.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run after.")],
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=0, help="How many pairs of each list to show.")
    ] = 20,
    json: JsonOption = False,
) -> None:
    """Show which pairs changed tag between two runs, and why; findings never fail it.

    Example: nc-audit diff runs/before runs/after --top 50
    """
    from nc_audit import console
    from nc_audit.diff import diff_runs
    from nc_audit.run import Run

    difference = diff_runs(Run.open(run_a), Run.open(run_b))
    if json:
        console.print_json({"run_a": str(run_a), "run_b": str(run_b), **difference.as_json(top)})
    else:
        console.show_diff(difference, top)


@command("runs")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of runs, or one run.")] = Path(
        "runs"
    ),
    json: JsonOption = False,
) -> None:
    """List the runs of a folder, or show one.

    Example: nc-audit runs
    """
    from nc_audit import console
    from nc_audit.run import MANIFEST, Run, list_runs

    if (folder / MANIFEST).exists():
        opened = Run.open(folder)
        if json:
            console.print_json(opened.manifest)
        elif "summary" in opened.manifest:
            console.show_summary(opened.manifest["summary"], str(folder), is_default=False)
        else:
            console.show_listing(
                ["stage", "seconds"], [[k, str(v["seconds"])] for k, v in opened.manifest["stages"].items()]
            )
        return
    found = list_runs(folder)
    if json:
        console.print_json([{"run": str(r.path), **r.manifest.get("summary", {})} for r in found])
        return
    if not found:
        raise DatasetError(f"no run under {folder}/", "nc-audit score DATASET makes one")
    rows = []
    for one in found:
        summary = one.manifest.get("summary")
        tags = summary["tags"] if summary else {}
        done = "complete" if summary else "unfinished: " + ", ".join(one.manifest["stages"])
        rows.append(
            [
                str(one.path),
                done,
                f"{summary['rows']:,}" if summary else "",
                f"{tags.get('noisy', 0):,}" if summary else "",
            ]
        )
    console.show_listing(["run", "state", "rows", "noisy"], rows)


@command("recipes")
def recipes(
    action: Annotated[str, typer.Argument(metavar="[list|show|copy]", help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Recipe to show or copy.")] = None,
    to: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to copy it; NAME.toml when not given.")
    ] = None,
) -> None:
    """List the recipes that come with the tool, show one with every setting, or copy one to edit.

    Example: nc-audit recipes show self_paced
    """
    from nc_audit import console
    from nc_audit.recipe import build_recipe, find_recipe, list_recipes, show
    from nc_audit.run import replacing

    if action == "list":
        rows = [
            [known, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")]
            for known, path in list_recipes().items()
        ]
        console.show_listing(["recipe", "does"], rows)
        return
    if action not in ("show", "copy"):
        raise RecipeError(f"recipes cannot {action}", nearest(action, ["list", "show", "copy"]))
    if name is None:
        raise RecipeError(f"recipes {action} needs a name", "nc-audit recipes lists them")
    source = find_recipe(name)
    if action == "show":
        console.print_data(show(build_recipe([name])))
        return
    target = to or Path(f"{source.stem}.toml")
    if target.exists():
        raise RecipeError(f"{target} exists", "name another file")
    with replacing(target) as partial:
        partial.write_bytes(source.read_bytes())
    console.err.print(
        f"copied to {target}; use it with nc-audit score DATASET --recipe {target}", markup=False
    )


@command("demo")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to draw into; must be new or empty.")],
    num_images: Annotated[int, typer.Option("--images", metavar="N", min=40, help="How many images.")] = 600,
    noise: Annotated[
        float, typer.Option("--noise", metavar="RATE", min=0, max=0.8, help="Share of planted mismatches.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the drawing.")] = 0,
    json: JsonOption = False,
) -> None:
    """Draw a small captioned dataset with planted noise, to try everything offline in a minute.

    Example: nc-audit demo demo-data && nc-audit score demo-data
    """
    from nc_audit import console
    from nc_audit.demo import draw_demo

    facts = draw_demo(folder, num_images=num_images, noise=noise, seed=seed)
    if json:
        console.print_json(facts)
    else:
        console.print_data(
            f"drew {facts.get('rows', '?'):,} captioned rows into {folder}\nnext: nc-audit score {folder}"
        )


def _open(run: Path | None) -> Any:
    from nc_audit.run import Run

    return Run.latest() if run is None else Run.open(run)


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _path(path: Path | None) -> str | None:
    return str(path) if path else None


def _encoder_settings(
    encoder: str | None,
    image_encoder: str | None,
    image_weights: Path | None,
    text_encoder: str | None,
    text_weights: Path | None,
) -> dict[str, Any]:
    return {
        "image": {"encoder": image_encoder or encoder, "weights": _path(image_weights)},
        "text": {"encoder": text_encoder or encoder, "weights": _path(text_weights)},
    }


def _share(text: str) -> float:
    """`5%` or `0.05` as a share, 0..1."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise DatasetError(f"{text!r} is not a share", "for example 5% or 0.05")
    return value


def main() -> None:
    """Entry point of the `nc-audit` command."""
    set_up()
    try:
        app()
    except OSError as problem:
        # What no command of ours prints: help and usage.
        if not _is_full(problem):
            raise
        sys.exit(_lost_output())
    except SystemExit as end:
        if "torch" not in sys.modules or not isinstance(end.code, int | None):
            raise
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            raise end from None
        # What was registered for the end is done; taking torch apart, for a second, is left to the system.
        atexit._run_exitfuncs()
        os._exit(end.code or 0)
