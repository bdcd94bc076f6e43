"""The whole audit against a plain loop that only computes CLIP scores: seconds of both, their ratio, JSON out.

    python tests/benchmarks/speed.py DATASET [--images 420] [--model ViT-B-32]

The same as `nc-audit bench DATASET --speed --json`; see `nc_audit/bench/speed.py` for what is compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nc_audit.bench.speed import MODEL, NUM_IMAGES, measure_speed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--model", default=MODEL)
    asked = parser.parse_args()
    print(
        json.dumps(
            measure_speed(asked.dataset, f"open_clip:{asked.model}", num_images=asked.images), indent=1
        )
    )
