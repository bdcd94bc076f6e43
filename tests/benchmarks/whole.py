"""The whole command line on many pairs of small drawn pictures: seconds by stage, peak memory, what is found; JSON out.

    python tests/benchmarks/whole.py FOLDER [--pairs 100000] [--per-image 5] [--noise 0.2] [-- --recipe NAME ...]

Pictures are mosaics and captions are words, both drawn from the same 24 latent directions; a share of the captions is
moved to other pictures. They are written to FOLDER/data once. Then `nc-audit score` runs in a process of its own, with
what follows `--`, into FOLDER/run, which must not be there yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

_LATENT, _WORDS, _SAID, _AT_ONCE = 24, 600, 8, 20_000
_SIDE = 64  # pixels; a mosaic of 8 x 8 stones


def draw(folder: Path, num_pairs: int, per_image: int, noise: float) -> None:
    """Write the pictures and `captions.csv`, whose column `is_wrong` holds the truth."""
    from PIL import Image

    random = np.random.default_rng(0)
    num_images = num_pairs // per_image
    latent = random.normal(size=(num_images, _LATENT)).astype(np.float32)
    mosaic = random.normal(size=(_LATENT, 8 * 8 * 3)).astype(np.float32)
    meaning = random.normal(size=(_LATENT, _WORDS)).astype(np.float32)
    words = ["".join(chr(97 + int(digit)) for digit in f"{number:03d}") + "x" for number in range(_WORDS)]
    (folder / "images").mkdir(parents=True)
    for number in range(num_images):
        seen = latent[number] @ mosaic + 2 * random.normal(size=mosaic.shape[1])
        stones = (128 + 18 * seen).clip(0, 255).astype(np.uint8).reshape(8, 8, 3)
        picture = Image.fromarray(stones).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        picture.save(folder / "images" / f"{number:07d}.png", compress_level=1)
    true_image = np.arange(num_images * per_image) // per_image
    shown = true_image.copy()
    moved = random.permutation(len(shown))[: int(noise * len(shown))]
    shown[moved] = true_image[moved[random.permutation(len(moved))]]
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "caption", "is_wrong"])
        for start in range(0, len(shown), _AT_ONCE):
            true = true_image[start : start + _AT_ONCE]
            fits = latent[true] @ meaning + 3 * random.gumbel(size=(len(true), _WORDS))
            said = np.argpartition(-fits, _SAID, axis=1)[:, :_SAID]
            for number, some in enumerate(said.tolist(), start):
                is_wrong = int(shown[number] != true_image[number])
                caption = f"{' '.join(words[at] for at in some)} {number}"
                table.writerow([f"images/{shown[number]:07d}.png", caption, is_wrong])


def measure(folder: Path, further: list[str]) -> dict[str, object]:
    """Run the command and read what it left."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "nc_audit", "score", str(folder / "data"), "--out", str(folder / "run")]
    subprocess.run([*command, *further], check=True)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)

    from nc_audit.bench.metrics import auroc
    from nc_audit.run import Run

    run = Run.open(folder / "run")
    rows = run.table("pairs", ["row"])["row"].to_numpy()
    with (folder / "data" / "captions.csv").open(newline="") as file:
        is_wrong = np.array([line["is_wrong"] == "1" for line in csv.DictReader(file)])[rows]
    scores = run.table("scores", ["noise_score"])["noise_score"].to_numpy()
    stages = {name: entry["seconds"] for name, entry in run.manifest["stages"].items()}
    return {
        "pairs": len(rows),
        "seconds": round(seconds, 1),
        "stages": {name: round(taken, 1) for name, taken in stages.items()},
        "embed": run.stage("embed")["embed_seconds"],
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "auroc": round(float(auroc(is_wrong, scores)), 4),
        "rate": round(run.stage("score")["noise_rate"]["estimate"], 4),
        "true_rate": round(float(is_wrong.mean()), 4),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--per-image", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.2)
    arguments = [*sys.argv[1:], "--"]
    at = arguments.index("--")
    asked = parser.parse_args(arguments[:at])
    if (asked.folder / "run").exists():
        sys.exit(f"{asked.folder / 'run'} is there: what it holds would not be timed")
    if not (asked.folder / "data" / "captions.csv").exists():
        draw(asked.folder / "data", asked.pairs, asked.per_image, asked.noise)
    print(json.dumps(measure(asked.folder, arguments[at + 1 : -1])))


if __name__ == "__main__":
    main()
