"""How close embedding real images comes to the encoder's pure forward rate on random tensors; JSON out.

    python tests/benchmarks/throughput.py DATASET [--encoder open_clip:ViT-B-32] [--images 2000] [--device auto]

Both sides use the same loaded encoder, device, precision and batch, one after the other; the images are read once
before, so that they come from memory. Without weights in the spec an open_clip model has random ones, which take as
long as learnt ones. A ratio of 1 means that the encoder never waits for images.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from nc_audit.bench.speed import random_weights
from nc_audit.dataset import ImageStore, LoadOptions, fold, load_pairs
from nc_audit.embed import EmbeddingStore, batch_that_fits, embed_images
from nc_audit.encoders import load_encoders, plan_encoders


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--encoder", default="open_clip:ViT-B-32")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = parser.parse_args()
    loaded = load_pairs(asked.dataset, LoadOptions())
    folded, store = fold(loaded.pairs), ImageStore(loaded.roots)
    ids, uris = folded.image_ids[: asked.images], folded.image_uris[: asked.images]
    for uri in uris:
        store.read(uri)
    with tempfile.TemporaryDirectory() as scratch:
        spec = asked.encoder
        if spec.startswith("open_clip:") and "@" not in spec and "/" not in spec:
            weights = random_weights(spec.removeprefix("open_clip:"), Path(scratch) / "random.pt")
            spec = f"{spec}@{weights}"
        plan = plan_encoders(spec, device=asked.device)
        encoder = load_encoders(plan).image
        batch = batch_that_fits(encoder)
        blank = torch.randint(0, 256, (batch, 3, *encoder.input_size), dtype=torch.uint8)
        encoder.encode(blank)
        start, num = time.perf_counter(), 0
        while num < len(ids):
            encoder.encode(blank)
            num += batch
        forward = num / (time.perf_counter() - start)
        start = time.perf_counter()
        folder = Path(scratch) / "store"
        folder.mkdir()
        embed_images(encoder, ids, lambda at: store.read(uris[at]), EmbeddingStore(folder), batch_size=batch)
        real = len(ids) / (time.perf_counter() - start)
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else None
    facts = {"device": gpu or plan.device, "processors": os.cpu_count(), "precision": plan.precision}
    rates = {"forward_images_s": round(forward, 1), "embed_images_s": round(real, 1)}
    print(
        json.dumps(facts | {"batch": batch, "images": len(ids)} | rates | {"ratio": round(real / forward, 3)})
    )


if __name__ == "__main__":
    main()
