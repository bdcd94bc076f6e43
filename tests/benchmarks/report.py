"""Write the HTML report of many pairs and open it and the review page: seconds and MB, and what a browser waits.

    python tests/benchmarks/report.py [--pairs 100000] [--top 500] [--gallery 10000]
    python tests/benchmarks/report.py --commands 1000000

The second form times the commands that show, tag and export a run of so many pairs without its images, each a process
of its own, imports included: seconds, seconds of processor, and peak memory, as JSON.

The run is written by hand, without a dataset's model; the pictures of the gallery are real small files. The browser is
Chromium by way of playwright; without them its lines are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The time from an action to the frame that shows it, in milliseconds.
_TIMED = """(act) => new Promise((done) => {
  const start = performance.now();
  (new Function(act))();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
_FILTERED = """
  const field = document.getElementById('{name}');
  field.value = '{value}';
  field.dispatchEvent(new Event('input', {{ bubbles: true }}));
"""
_ACTIONS = {
    "filter by tag": _FILTERED.format(name="f-tag", value="noisy"),
    "filter by words": _FILTERED.format(name="f-text", value="numbered 99"),
    "sort": _FILTERED.format(name="f-sort", value="q"),
    "filter by nothing": _FILTERED.format(name="f-text", value=""),
    "next page": "document.getElementById('next').click();",
}


def written(folder: Path, num_pairs: int, num_pictures: int) -> Any:
    """A scored run of so many pairs, the worst of them with pictures."""
    import numpy as np
    from make_run import Pair, make_run
    from PIL import Image
    from review_runs import LOOKS, STAGES

    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(num_pairs - num_pictures, num_pairs):
        # Shapes and grain: a thumbnail of about 4 kB, as those of photographs.
        drawn = generator.integers(0, 256, (9, 9, 3), np.uint8)
        image = np.asarray(Image.fromarray(drawn).resize((256, 256), Image.Resampling.BICUBIC), np.int16)
        image = image + generator.integers(-40, 41, (256, 256, 1), np.int16)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{number}.png", compress_level=1
        )
    pairs = [
        Pair(
            n,
            caption=f"a house numbered {n} beside a road that leads from the harbour to the forest",
            tag=("clean", "ambiguous", "noisy")[n % 3],
            probability=n / num_pairs,
            best_caption=f"a better caption {n}",
            best_caption_margin=0.25,
            reasons=[
                f"{n + 2:,} other captions fit the image better",
                "better caption by 0.25: a better caption",
            ],
            more=LOOKS | {"loss": n / num_pairs},
        )
        for n in range(num_pairs)
    ]
    return make_run(
        folder / "run", pairs, stages=STAGES, dataset={"path": "drawn", "roots": {"dataset": str(folder)}}
    )


def table_run(folder: Path, num_pairs: int) -> None:
    """The tables of a scored run of so many pairs, five to an image, a fifth of them noisy; no images."""
    import numpy as np
    import pyarrow as pa
    from review_runs import STAGES

    from nc_audit.pipeline import summarise
    from nc_audit.run import Run
    from nc_audit.schema import FINDINGS, PAIRS, SCORES, TAGS

    generator = np.random.default_rng(0)
    row = np.arange(num_pairs)
    words = np.array(["house", "road", "river", "forest", "harbour", "field", "bridge", "hedge"])
    parts = [words[generator.integers(0, len(words), num_pairs)] for _ in range(3)]
    captions = [
        f"a {a} numbered {n} beside a {b} that leads to the {c}"
        for n, (a, b, c) in enumerate(zip(*parts, strict=True))
    ]
    ids = [f"{n:032x}" for n in generator.integers(0, 2**62, num_pairs).tolist()]
    image = [f"images/{n // 5:07d}.jpg" for n in range(num_pairs)]
    probability = np.where(generator.random(num_pairs) < 0.2, 1, 0) + generator.normal(0, 0.08, num_pairs)
    probability = probability.clip(0, 1).astype(np.float32)
    tag = np.where(probability >= 0.8, "noisy", np.where(probability <= 0.2, "clean", "ambiguous"))
    other = generator.permutation(num_pairs)

    def table(schema: pa.Schema, values: dict[str, Any]) -> pa.Table:
        columns = []
        for field in schema:
            value = values.get(field.name)
            if value is None and pa.types.is_floating(field.type):
                value = generator.random(num_pairs, np.float32)
            columns.append(pa.nulls(num_pairs, field.type) if value is None else pa.array(value, field.type))
        return pa.table(columns, schema=schema)

    run = Run(folder / "run")
    pairs = {
        "row": row,
        "pair_id": ids,
        "image_id": [f"{n // 5:032x}" for n in range(num_pairs)],
        "caption_id": ids,
        "image": image,
        "caption": captions,
        "source": ["captions.csv"] * num_pairs,
        "status": ["ok"] * num_pairs,
        "image_uri": [f"dataset:{name}" for name in image],
        "resolved_by": ["path"] * num_pairs,
    }
    rank = np.where(tag == "clean", 1, generator.integers(1, 2000, num_pairs))
    scores = {
        "row": row,
        "pair_id": ids,
        "noise_probability": probability,
        "noise_score": generator.normal(0, 1, num_pairs).astype(np.float32) + 3 * probability,
        "caption_rank": rank,
        "image_rank": rank,
        "best_caption": pa.array(captions).take(pa.array(other)),
        "best_image": pa.array(image).take(pa.array(other)),
    }
    noisy = np.flatnonzero(tag == "noisy")
    findings = pa.table(
        [
            pa.array(ids).take(pa.array(noisy)),
            pa.array(noisy),
            pa.array(["rematch"] * len(noisy)),
            pa.array(other[noisy]),
            pa.array([f"the caption of row {n:,} fits the image" for n in other[noisy].tolist()]),
            pa.array(["info"] * len(noisy)),
            pa.array(generator.random(len(noisy), np.float32)),
        ],
        schema=FINDINGS,
    )
    tags = {
        "row": row,
        "pair_id": ids,
        "tag": tag.tolist(),
        "reasons": [
            [] if one == "clean" else ["1,024 other captions fit the image better"] for one in tag.tolist()
        ],
        "decided_by": ["model"] * num_pairs,
        "rematch_probability": pa.nulls(num_pairs, pa.float32()),
    }
    stages = {name: dict(facts) for name, facts in STAGES.items()}
    stages["train"] |= {"pairs": num_pairs, "images": num_pairs // 5, "captions": num_pairs}
    stages["score"]["noise_rate"] = stages["score"]["noise_rate"] | {"expected_auroc": 0.99}
    stages["score"]["files"] = ["scores.parquet", "findings.parquet"]
    stages["embed"]["cut_captions"] = 0
    run.manifest |= {
        "stages": stages,
        "dataset": {"path": "drawn", "roots": {}},
        "recipe": {"name": "self_paced"},
    }
    run.path.mkdir()
    run.write_table("pairs", table(PAIRS, pairs))
    run.write_table("scores", table(SCORES, scores))
    run.write_table("findings", findings)
    run.write_table("tags", table(TAGS, tags))
    run.manifest["summary"] = summarise(run)
    run.save()


COMMANDS = {
    "report --top 200": ["report", "--top", "200"],
    "report --top 200 --json": ["report", "--top", "200", "--json"],
    "tag --target-precision 0.95": ["tag", "--target-precision", "0.95"],
    "tag --budget 5%": ["tag", "--budget", "5%"],
    "export --drop noisy --no-images": ["export", "--drop", "noisy", "--no-images"],
    "export --format datacomp": ["export", "--format", "datacomp", "--drop", "noisy"],
    "gate --max-noisy 50%": ["gate", "--max-noisy", "50%"],
    "runs": ["runs", "run"],
}


def measure_commands(num_pairs: int) -> dict[str, Any]:
    """Seconds and peak memory in GB of each command on a run of so many pairs."""
    results: dict[str, Any] = {"pairs": num_pairs, "processors": os.cpu_count(), "commands": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = subprocess.run(
            [sys.executable, __file__, "--make", str(folder), "--commands", str(num_pairs)], check=True
        )
        assert made.returncode == 0
        for title, command in COMMANDS.items():
            where = [] if command[0] == "runs" else ["--run", "run"]
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "nc_audit", *command, *where], cwd=folder, stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            results["commands"][title] = {
                "seconds": round(time.perf_counter() - start, 2),
                "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
                "peak_gb": round(usage.ru_maxrss / 1e6, 2),
                "exit_code": process.returncode,
            }
    return results


def measure_pages(run: Any, folder: Path, top: int) -> None:
    """One line for each of the two forms of the report."""
    from nc_audit.dataset.images import ImageStore
    from nc_audit.report import report_rows
    from nc_audit.report.html import html_report, write_page

    for as_files in (False, True):
        start = time.perf_counter()
        rows = report_rows(run, top=top)
        page = html_report(run, rows, ImageStore({"dataset": str(folder)}), as_files=as_files)
        out = folder / f"report-{top}-{as_files}"
        write_page(page, run, out if as_files else out / "index.html")
        seconds = time.perf_counter() - start
        size = len(page.html.encode()) + sum(map(len, page.files.values()))
        form = "files beside the page" if as_files else "one page"
        print(f"report, top {top:,}, {form}: {seconds:.1f} s, {size / 1e6:.2f} MB", flush=True)


def measure_browser(run: Any, folder: Path, gallery: int) -> None:
    """First paint of the review page and of the gallery, and how long the gallery takes to follow."""
    from review_runs import review_of, served

    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return
    chromium = shutil.which("chromium")
    if chromium is None:
        return
    painted = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
    with sync_playwright() as started, served(review_of(run)) as server:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        paints, firsts = [], []
        for _ in range(5):
            context = browser.new_context()
            page = context.new_page()
            start = time.perf_counter()
            page.goto(server.url)
            page.wait_for_function("() => document.getElementById('caption').textContent")
            firsts.append(time.perf_counter() - start)
            paints.append(page.evaluate(painted) / 1000)
            context.close()
        print(
            f"review: first paint {statistics.median(paints):.2f} s, first pair {statistics.median(firsts):.2f} s "
            "(median of 5)"
        )
        for as_files in (False, True):
            page = browser.new_page()
            page.goto((folder / f"report-{gallery}-{as_files}" / "index.html").as_uri())
            page.wait_for_selector(".card")
            form = "files beside the page" if as_files else "one page"
            first = page.evaluate(painted) / 1000
            times = [f"{name} {page.evaluate(_TIMED, act):.0f} ms" for name, act in _ACTIONS.items()]
            print(
                f"gallery of {gallery:,}, {form}: first paint {first:.2f} s, {', '.join(times)}", flush=True
            )
            page.close()
        browser.close()


def measure(num_pairs: int, top: int, gallery: int) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = written(folder, num_pairs, gallery)
        print(f"{num_pairs:,} pairs", flush=True)
        measure_pages(run, folder, top)
        measure_pages(run, folder, gallery)
        measure_browser(run, folder, gallery)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--top", type=int, default=500)
    parser.add_argument("--gallery", type=int, default=10_000)
    parser.add_argument(
        "--commands", type=int, metavar="PAIRS", help="time commands on a run of so many pairs"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "review")]
    if options.make:
        table_run(options.make, options.commands)
    elif options.commands:
        print(json.dumps(measure_commands(options.commands), indent=1))
    else:
        measure(options.pairs, min(options.top, options.pairs), min(options.gallery, options.pairs))
