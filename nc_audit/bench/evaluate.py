"""Retrieval by the trained model of a run, on a split of its dataset.

Shapes: I = images; C = captions; N = pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from nc_audit.bench.classes import classes_of_names
from nc_audit.bench.retrieval import mean_average_precision, recall_at_k
from nc_audit.dataset import Folded, ImageStore, check_exists, fold, load_pairs
from nc_audit.embed import EmbeddingStore, embed_captions, embed_images, fit_captions, fit_images
from nc_audit.encoders import load_encoders
from nc_audit.errors import DatasetError, RunError
from nc_audit.methods.matching import Pairs
from nc_audit.model import Model
from nc_audit.pipeline import load_options, plan_of, with_corrupt
from nc_audit.recipe import build_recipe
from nc_audit.run import Run


def evaluate_run(
    run: Run,
    split: str | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Recall of matching captions and images, with several captions per image, by the run's final model.

    Args:
        run: a trained run; its dataset must still stand where it was.
        split: of the dataset, as it names it; all rows when not given.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
        progress: told what is done and how far.

    Returns:
        split, images, captions, pairs, trained_on (share of these pairs that sat in the run's training, 0..1),
        `retrieval` (per cent: i2t_r1 ... t2i_r10, mr, rsum), and for a hashing model `hashing`: bits and mean average
        precision at 20 over Hamming distance in both directions, 0..1, relevance being an equal class by file or
        folder name; None where names tell no classes.

    Raises:
        RunError: the run is not trained, its dataset has gone, or another process holds it.
        DatasetError: the split does not exist.
    """
    with run.locked():  # what the split has beyond the run's own images goes into the run's embeddings
        run.manifest = Run.open(run.path).manifest
        return _evaluate(run, split, device, precision, progress)


def _evaluate(
    run: Run,
    split: str | None,
    device: str,
    precision: str,
    progress: Callable[[str, int, int | None], None] | None,
) -> dict[str, Any]:
    run.stage("train")
    tell = progress or (lambda _what, _done, _total: None)
    recipe = build_recipe(settings=run.manifest["recipe"]["settings"])
    dataset = Path(run.manifest["dataset"]["path"])
    try:
        check_exists(dataset)
    except DatasetError:
        raise RunError(
            f"the dataset of the run, {dataset}, does not exist", "put it back, or score it anew"
        ) from None
    recipe = recipe.model_copy(
        update={"dataset": recipe.dataset.model_copy(update={"split": split, "limit": None})}
    )
    loaded = load_pairs(
        dataset, load_options(recipe, run.path / "downloads"), lambda done, total: tell("load", done, total)
    )
    asked = loaded.pairs.filter(pc.equal(loaded.pairs["status"], "ok"))
    if not len(asked):
        raise DatasetError(
            "not one row of the split has both an image and a caption", "nc-audit runs shows them"
        )
    images, store = ImageStore(loaded.roots), EmbeddingStore(run.path / "embeddings")
    encoders = load_encoders(plan_of(recipe, device, precision))
    learnt_from = fold(with_corrupt(run.table("pairs")))
    uris = learnt_from.image_uris
    image_encoder = fit_images(encoders.image, learnt_from.image_ids, lambda at: images.read(uris[at]), store)
    text_encoder = fit_captions(encoders.text, learnt_from.caption_ids, learnt_from.captions, store)
    wide = fold(asked)
    image, failures = embed_images(
        image_encoder,
        wide.image_ids,
        lambda at: images.read(wide.image_uris[at]),
        store,
        batch_size=recipe.image.batch,
        progress=lambda done, total: tell("embed images", done, total),
    )
    is_good = pc.invert(pc.is_in(asked["image_id"], pa.array(list(failures), pa.string())))
    asked = asked.filter(is_good)
    folded = fold(asked)
    place = {one: at for at, one in enumerate(wide.image_ids)}
    image_ID = torch.from_numpy(image)[
        torch.tensor([place[one] for one in folded.image_ids], dtype=torch.long)
    ]
    caption = embed_captions(text_encoder, folded.caption_ids, folded.captions, store)
    model = Model.load(run.path / "model" / "heads.safetensors")
    pairs = Pairs.of_arrays(
        folded.pair_image, folded.pair_caption, len(folded.image_ids), len(folded.caption_ids)
    )
    with torch.inference_mode():
        vectors = model.embed(image_ID, torch.from_numpy(caption))
    trained_on = set(fold(run.table("pairs")).pair_ids)
    result: dict[str, Any] = {
        "split": split,
        "images": pairs.num_images,
        "captions": pairs.num_captions,
        "pairs": len(pairs),
        "trained_on": sum(one in trained_on for one in folded.pair_ids) / len(folded.pair_ids),
        "retrieval": recall_at_k(*vectors, pairs.image_N, pairs.caption_N).columns(),
    }
    bits = run.stage("train").get("bits")
    if bits:
        result["hashing"] = _hashing(vectors, pairs, asked, folded, bits)
    return result


def _hashing(
    vectors: tuple[torch.Tensor, torch.Tensor], pairs: Pairs, asked: pa.Table, folded: Folded, bits: int
) -> dict[str, float | int] | None:
    """mAP@20 of the codes, where the images' names tell their classes; a caption has the class of its first image."""
    names = dict(zip(asked["image_id"].to_pylist(), asked["image"].to_pylist(), strict=True))
    classes = classes_of_names([names[one] for one in folded.image_ids])
    if classes is None or (classes < 0).any():
        return None
    of_image = torch.from_numpy(classes)
    of_caption = torch.empty(pairs.num_captions, dtype=torch.long)
    of_caption[pairs.caption_N.flip(0)] = of_image[pairs.image_N.flip(0)]
    image, caption = (torch.where(side >= 0, 1.0, -1.0) for side in vectors)
    return {
        "bits": bits,
        "i2t_map20": mean_average_precision(image, caption, of_image, of_caption),
        "t2i_map20": mean_average_precision(caption, image, of_caption, of_image),
    }
