"""How well planted noise is found in a real dataset, through the real command: the figures of the README.

    python tests/benchmarks/detection.py DATASET [--rates 0,0.4] [--seed 3] [-- further options of nc-audit score]

DATASET is a Karpathy-type folder. Repeated captions of an image are folded first; then the given share of the caption
rows is permuted. A row is noise when its caption is not among its image's own, as lower-case words without full
stops. All rates go through one run directory, so images are embedded once. Prints one Markdown row per rate.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import average_precision_score, roc_auc_score

HEADER = (
    "| dataset | injected | true rate | AUROC | AP | estimated rate | tagged noisy | precision | recall | seconds |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def folded(caption: str) -> str:
    """A caption as the truth compares it."""
    return " ".join(caption.lower().replace(".", " ").split())


def read_karpathy(folder: Path) -> list[tuple[str, list[str]]]:
    """File name and distinct captions of every image."""
    source = next(path for path in sorted(folder.glob("dataset*.json")))
    images = json.loads(source.read_text(encoding="utf-8"))["images"]
    return [
        (
            image["filename"],
            list({folded(s["raw"]): s["raw"] for s in image["sentences"] if folded(s["raw"])}.values()),
        )
        for image in images
    ]


def permuted(rows: list[tuple[str, str]], rate: float, seed: int) -> list[tuple[str, str]]:
    """The rows with the captions of a random share of them permuted among themselves."""
    pick = random.Random(seed)
    chosen = pick.sample(range(len(rows)), int(rate * len(rows)))
    captions = [rows[at][1] for at in chosen]
    pick.shuffle(captions)
    swapped = dict(zip(chosen, captions, strict=True))
    return [(image, swapped.get(at, caption)) for at, (image, caption) in enumerate(rows)]


def measure(dataset: Path, rate: float, seed: int, place: Path, options: list[str]) -> str:
    """One row of the table."""
    images = read_karpathy(dataset)
    own = {name: {folded(caption) for caption in captions} for name, captions in images}
    rows = permuted([(name, caption) for name, captions in images for caption in captions], rate, seed)
    with (place / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "nc_audit",
        "score",
        "captions.csv",
        "--image-root",
        str(dataset.resolve() / "images"),
    ]
    subprocess.run([*command, "--out", "run", *options], cwd=place, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    scores, tags = pq.read_table(place / "run/scores.parquet"), pq.read_table(place / "run/tags.parquet")
    truth = np.array([folded(caption) not in own[image] for image, caption in rows])
    score = scores["noise_score"].to_numpy()
    noisy = np.array([tag == "noisy" for tag in tags["tag"].to_pylist()])
    summary = json.loads((place / "run/run.json").read_text(encoding="utf-8"))["summary"]
    estimate = summary["noise_rate"]
    cells = [dataset.name, f"{rate:.0%}", f"{truth.mean():.3f}"]
    if truth.any():
        cells += [f"{roc_auc_score(truth, score):.4f}", f"{average_precision_score(truth, score):.3f}"]
    else:
        cells += ["", ""]
    cells += [
        f"{estimate['estimate']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})",
        f"{noisy.mean():.1%}",
    ]
    cells += [f"{truth[noisy].mean():.3f}", f"{noisy[truth].mean():.3f}"] if truth.any() else ["", ""]
    return f"| {' | '.join([*cells, f'{seconds:.0f}'])} |"


def main() -> None:
    """Command line."""
    arguments = sys.argv[1:]
    mine, options = arguments, []
    if "--" in arguments:
        mine, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rates", default="0,0.4")
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args(mine)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    options = [str(Path(o).resolve()) if Path(o).is_file() else o for o in options]
    print(HEADER)
    with tempfile.TemporaryDirectory() as place:
        for rate in given.rates.split(","):
            print(measure(given.dataset, float(rate), given.seed, Path(place), options), flush=True)


if __name__ == "__main__":
    main()
