"""Write the HTML report of many pairs and open it and the review page: seconds and MB, and what a browser waits.

    python tests/benchmarks/report.py [--pairs 100000] [--top 500] [--gallery 10000]

The run is written by hand, without a dataset's model; the pictures of the gallery are real small files. The browser is
Chromium by way of playwright; without them its lines are left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
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
    options = parser.parse_args()
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "review")]
    measure(options.pairs, min(options.top, options.pairs), min(options.gallery, options.pairs))
