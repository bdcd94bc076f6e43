"""The whole audit against a plain loop that only computes CLIP scores: seconds of both, and where the audit's went.

Both sides use the same weights of an open_clip model, the same images and the same machine, one after the other, each
in a process of its own. The plain loop is what one would write: float32, batches of 64, each image encoded once, every
caption row encoded, padded to the model's context. Its imports and the loading of weights are not counted; the audit
is a command and counts everything.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from nc_audit.dataset import ImageStore, LoadOptions, load_pairs
from nc_audit.errors import DatasetError, EncoderError
from nc_audit.process import ENVIRONMENT
from nc_audit.run import writing

MODEL = "ViT-B-32"
NUM_IMAGES = 420
BATCH = 64


def measure_speed(
    dataset: Path,
    encoder: str = f"open_clip:{MODEL}",
    *,
    num_images: int = NUM_IMAGES,
    options: LoadOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time both sides on evenly spread images of a dataset with all their captions.

    Args:
        dataset: folder or file.
        encoder: `open_clip:MODEL@FILE`, or `open_clip:MODEL` for random weights, which take as long as learnt ones.
        num_images: how many, at most.
        options: how the dataset is read.
        note: told what is going on.

    Returns:
        `images`, `rows`, `processors`, `encoder`, `precision`, `plain_s`, `audit_s` (seconds), `ratio` (audit_s /
        plain_s), `not_embedding` (share of the audit's time outside embed, 0..1), `stages` (seconds by stage), and
        `shares` (of the audit's time, 0..1: decode, encode, train, score and the rest).

    Raises:
        DatasetError: it has no usable pair. EncoderError: the encoder is not of open_clip, or one of the sides failed.
    """
    model, _, file = encoder.removeprefix("open_clip:").partition("@")
    if not encoder.startswith("open_clip:") or "/" in model:
        raise EncoderError(
            f"the speed of {encoder} has no plain loop to be set against", f"give --encoder open_clip:{MODEL}"
        )
    if file and not Path(file).is_file():
        raise EncoderError(f"there is no file {file}", "give open_clip:MODEL for random weights")
    with tempfile.TemporaryDirectory(prefix="nc-audit-speed-") as name:
        folder = Path(name)
        counts = _take(dataset, num_images, folder / "set", options or LoadOptions())
        weights = Path(file) if file else random_weights(model, folder / "random.pt")
        note(f"plain loop of {counts['images']:,} images and {counts['rows']:,} captions")
        loop = [sys.executable, "-m", "nc_audit.bench.speed", folder / "set" / "captions.csv", weights, model]
        plain = float(_run(loop, without=tuple(ENVIRONMENT)))
        note(f"plain loop: {plain:.1f} s; now the whole audit")
        audit = [sys.executable, "-m", "nc_audit", "score", folder / "set", "--out", folder / "run", "--json"]
        start = time.perf_counter()
        found = json.loads(_run([*audit, "--encoder", f"open_clip:{model}@{weights}"]))
        whole = time.perf_counter() - start
        stages = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["stages"]
    seconds = found["seconds"]
    spent = {name: found["embed_seconds"][name] for name in ("decode", "encode")}
    spent |= {name: seconds[name] for name in ("train", "score")}
    shares = {name: value / whole for name, value in spent.items()}
    return {
        **counts,
        "processors": os.cpu_count(),
        "encoder": f"open_clip:{model}, {'given' if file else 'random'} weights",
        "precision": stages["embed"]["plan"]["precision"],
        "device": stages["embed"]["plan"]["device"],
        "plain_s": plain,
        "audit_s": whole,
        "ratio": whole / plain,
        "not_embedding": 1 - seconds["embed"] / whole,
        "stages": seconds,
        "shares": shares | {"rest": 1 - sum(shares.values())},
    }


def _take(dataset: Path, num_images: int, folder: Path, options: LoadOptions) -> dict[str, int]:
    """A csv of some images with all their captions in `folder`; how many images and rows."""
    loaded = load_pairs(dataset, options)
    ok = loaded.pairs.filter(pc.equal(loaded.pairs["status"], "ok"))
    ids = list(dict.fromkeys(ok["image_id"].to_pylist()))
    if not ids:
        raise DatasetError(f"{dataset} has no usable pair", "nc-audit score says why")
    chosen = {
        one: f"images/{at}" for at, one in enumerate(ids[:: max(1, len(ids) // num_images)][:num_images])
    }
    with writing(folder):
        (folder / "images").mkdir(parents=True)
    store, rows = ImageStore(loaded.roots), []
    for image_id, uri, caption in zip(
        *(ok[name].to_pylist() for name in ("image_id", "image_uri", "caption")), strict=True
    ):
        if image_id in chosen:
            name = chosen[image_id] + (Path(uri.partition("#")[0]).suffix or ".jpg")
            if not (folder / name).exists():
                (folder / name).write_bytes(store.read(uri))
            rows.append((name, caption))
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return {"images": len(chosen), "rows": len(rows)}


def random_weights(model: str, path: Path) -> Path:
    """A file of random weights, always the same, for an open_clip model.

    Raises:
        EncoderError: open_clip does not know the model.
    """
    import open_clip
    import torch

    if model not in open_clip.list_models():
        raise EncoderError(f"open_clip has no model {model!r}", f"for example open_clip:{MODEL}")
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip's own, that the weights are random
    try:
        with writing(path):
            torch.save(open_clip.create_model(model, pretrained=None).state_dict(), path)
    finally:
        logging.disable(logging.NOTSET)
    return path


def _run(command: list[Any], without: tuple[str, ...] = ()) -> str:
    """What a command prints."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise EncoderError(f"{' '.join(map(str, command[2:4]))} failed: {last}", "see what it says alone")
    return done.stdout


def _plain_loop(table: Path, weights: Path, model_name: str) -> float:
    """The seconds that CLIP scores alone take."""
    import open_clip
    import torch
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, preprocess = open_clip.create_model_and_transforms(
        model_name, pretrained=str(weights), device=device
    )
    model.eval()
    tokenise = open_clip.get_tokenizer(model_name)
    with table.open(newline="", encoding="utf-8") as file:
        rows = [(table.parent / name, caption) for name, caption in list(csv.reader(file))[1:]]
    paths = list(dict.fromkeys(path for path, _ in rows))
    start = time.perf_counter()
    vectors: dict[Path, torch.Tensor] = {}
    scores: list[float] = []
    with torch.inference_mode():
        for first in range(0, len(paths), BATCH):
            some = paths[first : first + BATCH]
            images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in some]).to(device)
            vectors |= dict(zip(some, model.encode_image(images, normalize=True), strict=True))
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            tokens = tokenise([caption for _, caption in part]).to(device)
            captions = model.encode_text(tokens, normalize=True)
            scores += [float(vectors[path] @ one) for (path, _), one in zip(part, captions, strict=True)]
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(f"{_plain_loop(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])}\n")
