"""The whole audit against a plain loop that only computes CLIP scores: seconds of both, their ratio, JSON out.

    python tests/benchmarks/speed.py DATASET [--images 420] [--model ViT-B-32]

DATASET is a Karpathy-type folder, of which every so many images with all their captions are taken. Both sides use the
same random weights of the model, the same images and the same machine, one after the other. The plain loop, as one
would write it: float32, batches of 64, each image encoded once, every caption row encoded, padded to 77 tokens. Its
imports and the loading of weights are not counted; the audit is a command and counts everything.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 64


def take(dataset: Path, num_images: int, folder: Path) -> tuple[int, int]:
    """A csv of some images with their captions in `folder`; how many images and rows."""
    source = next(path for path in sorted(dataset.glob("dataset*.json")))
    images = json.loads(source.read_text(encoding="utf-8"))["images"]
    images = images[:: max(1, len(images) // num_images)][:num_images]
    (folder / "images").mkdir(parents=True)
    rows = []
    for image in images:
        name = f"images/{image['filename']}"
        shutil.copyfile(dataset / name, folder / name)
        rows += [(name, sentence["raw"]) for sentence in image["sentences"]]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["image", "caption"])
        out.writerows(rows)
    return len(images), len(rows)


def plain_loop(table: Path, weights: Path, model_name: str) -> None:
    """Print the seconds that CLIP scores alone take."""
    import open_clip
    import torch
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=str(weights))
    model.eval()
    tokenise = open_clip.get_tokenizer(model_name)
    with table.open(newline="", encoding="utf-8") as file:
        rows = [(table.parent / name, caption) for name, caption in list(csv.reader(file))[1:]]
    paths = list(dict.fromkeys(path for path, _ in rows))
    start = time.perf_counter()
    vectors, scores = {}, []
    with torch.inference_mode():
        for first in range(0, len(paths), BATCH):
            some = paths[first : first + BATCH]
            images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in some])
            vectors |= dict(zip(some, model.encode_image(images, normalize=True), strict=True))
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            captions = model.encode_text(tokenise([caption for _, caption in part]), normalize=True)
            scores += [float(vectors[path] @ one) for (path, _), one in zip(part, captions, strict=True)]
    print(time.perf_counter() - start)


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=int, default=420)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.weights:
        plain_loop(asked.dataset, asked.weights, asked.model)
        return
    import open_clip
    import torch

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        weights, folder, run = place / "random.pt", place / "set", place / "run"
        torch.manual_seed(0)
        torch.save(open_clip.create_model(asked.model, pretrained=None).state_dict(), weights)
        num_images, num_rows = take(asked.dataset, asked.images, folder)
        alone = [
            sys.executable,
            __file__,
            folder / "captions.csv",
            "--model",
            asked.model,
            "--weights",
            weights,
        ]
        plain = float(subprocess.run(alone, check=True, capture_output=True, text=True).stdout)
        audit = [sys.executable, "-m", "nc_audit", "score", folder, "--out", run]
        start = time.perf_counter()
        subprocess.run(
            [*audit, "--encoder", f"open_clip:{asked.model}@{weights}"], check=True, capture_output=True
        )
        whole = time.perf_counter() - start
        stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    seconds = {stage: facts["seconds"] for stage, facts in stages.items()}
    result = {
        "images": num_images,
        "rows": num_rows,
        "processors": os.cpu_count(),
        "precision": stages["embed"]["plan"]["precision"],
        "plain_s": plain,
        "audit_s": whole,
        "ratio": whole / plain,
        "not_embedding": 1 - seconds["embed"] / whole,
        "stages": seconds,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
