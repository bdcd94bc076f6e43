"""Writes a random part of a dataset, for `nc-audit bench`: how well does the default do on few pairs?

    python tests/benchmarks/small_sets.py DATASET OUT --images 150 [--captions 5] [--seed 7]
    nc-audit bench OUT --recipe mobilenet_tfidf --image-weights FILE --recipes self_paced,lemon --kinds caption,image

DATASET is a Karpathy-type folder. Images are drawn at random, each with its first captions.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path


def main() -> None:
    """Write the folder, and print how many images and captions it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--captions", type=int, default=5, help="of each image, at most")
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    found = next(path for path in sorted(asked.dataset.glob("*.json")) if '"sentences"' in path.read_text())
    images = random.Random(asked.seed).sample(json.loads(found.read_text())["images"], asked.images)
    (asked.out / "images").mkdir(parents=True)
    for image in images:
        image["sentences"] = image["sentences"][: asked.captions]
        shutil.copy(asked.dataset / "images" / image["filename"], asked.out / "images")
    (asked.out / found.name).write_text(json.dumps({"images": images, "dataset": asked.out.name}))
    print(len(images), "images,", sum(len(image["sentences"]) for image in images), "captions")


if __name__ == "__main__":
    main()
