"""Write the HTML report of many pairs: seconds and MB, with the pictures inside the page and beside it.

    python tests/benchmarks/report.py [--pairs 100000] [--top 500]

The run is written by hand, without a dataset's model; the pictures of the gallery are real small files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path


def measure(num_pairs: int, top: int) -> None:
    """Print one line for each of the two forms."""
    from make_run import Pair, make_run, picture

    from nc_audit.dataset.images import ImageStore
    from nc_audit.report import report_rows
    from nc_audit.report.html import html_report, write_page

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number in range(num_pairs - top, num_pairs):
            (folder / "images" / f"{number}.png").write_bytes(picture(number, side=256))
        pairs = [
            Pair(n, f"a house numbered {n}", probability=n / num_pairs, more={"loss": n / num_pairs})
            for n in range(num_pairs)
        ]
        run = make_run(folder / "run", pairs, dataset={"path": "drawn", "roots": {"dataset": name}})
        for as_files in (False, True):
            start = time.perf_counter()
            rows = report_rows(run, top=top)
            page = html_report(run, rows, ImageStore({"dataset": name}), as_files=as_files)
            write_page(
                page, run, folder / f"out{as_files}" / "index.html" if not as_files else folder / "pages"
            )
            seconds = time.perf_counter() - start
            size = len(page.html.encode()) + sum(map(len, page.files.values()))
            form = "files beside the page" if as_files else "one page"
            print(f"{num_pairs:,} pairs, top {top:,}, {form}: {seconds:.1f} s, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--top", type=int, default=500)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    measure(options.pairs, min(options.top, options.pairs))
