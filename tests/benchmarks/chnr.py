"""CHNR's own protocol: how well hash codes retrieve when a share of the training captions belongs to another class.

    python tests/benchmarks/chnr.py DATASET --image-weights FILE [--rates 0.05,0.5] [--weightings ew,dw,ones]

DATASET is a Karpathy-type folder whose file names tell the classes. One caption is drawn per image; half of the images
train, a tenth asks, the rest is searched. With probability p a training pair takes the caption of an image of another
class; a trusted subset is left alone, as in the authors' published code (--corrupt-all strikes it too, which costs
the method its trusted pairs, so that it learns from what is left of them). Reported: mAP@20 over Hamming distance, as
the author computes it (the first 20 relevant items wherever they rank), beside the author's figures.

Not the same: features (MobileNetV2 and n-grams here; ResNet-18 and BERT there), the second view of each side (features
left out here; cropped images there), width and learning rates (fitted to these features).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nc_audit.bench.classes import classes_of_names
from nc_audit.bench.retrieval import mean_average_precision
from nc_audit.dataset import normalise_caption
from nc_audit.embed import EmbeddingStore, embed_all
from nc_audit.encoders import ImageOptions, load_encoders, plan_encoders
from nc_audit.methods.hashing import WEIGHTINGS, binary_codes, pair_weight
from nc_audit.methods.matching import Pairs
from nc_audit.methods.projections import principal_projection
from nc_audit.recipe import ChnrSection, build_recipe
from nc_audit.train.chnr import Phase, standardised, train_discriminator, train_hash_heads

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DIRECTIONS = ("image to caption", "caption to image")

# The author's repository, mAP@20 at 64 bits by rate; `ones` is pre-trained on the trusted pairs, without weights.
AUTHOR = {
    "rsicd": {
        "image to caption": {
            "nw": (0.779, 0.753, 0.731, 0.720, 0.669, 0.617),
            "ew": (0.743, 0.724, 0.742, 0.729, 0.713, 0.688),
            "dw": (0.786, 0.770, 0.739, 0.732, 0.718, 0.709),
            "ones": (0.772, 0.750, 0.699, 0.661, 0.582, 0.525),
        },
        "caption to image": {
            "nw": (0.779, 0.768, 0.745, 0.737, 0.704, 0.664),
            "ew": (0.748, 0.753, 0.746, 0.740, 0.718, 0.688),
            "dw": (0.783, 0.782, 0.755, 0.747, 0.721, 0.719),
            "ones": (0.777, 0.767, 0.727, 0.709, 0.648, 0.615),
        },
    },
    "ucm": {
        "image to caption": {
            "nw": (0.868, 0.844, 0.846, 0.829, 0.794, 0.779),
            "ew": (0.851, 0.851, 0.862, 0.820, 0.839, 0.821),
            "dw": (0.844, 0.832, 0.844, 0.823, 0.822, 0.797),
            "ones": (0.849, 0.828, 0.804, 0.740, 0.713, 0.614),
        },
        "caption to image": {
            "nw": (0.922, 0.912, 0.908, 0.884, 0.856, 0.811),
            "ew": (0.916, 0.918, 0.902, 0.896, 0.882, 0.876),
            "dw": (0.929, 0.912, 0.909, 0.892, 0.885, 0.850),
            "ones": (0.911, 0.907, 0.869, 0.851, 0.766, 0.689),
        },
    },
}
TRUSTED_SHARE = {"rsicd": 0.2, "ucm": 0.3}


@dataclass(frozen=True)
class Material:
    """Embeddings, one caption and a class of each image."""

    image_ID: Tensor
    caption_CD: Tensor
    caption_I: Tensor
    class_I: Tensor


def read_material(dataset: Path, weights: Path, store: Path, seed: int) -> Material:
    """Draw one caption per image and embed both through the tool's own encoders."""
    source = next(path for path in sorted(dataset.glob("dataset*.json")))
    images = json.loads(source.read_text(encoding="utf-8"))["images"]
    names = [image["filename"] for image in images]
    classes = classes_of_names(names)
    if classes is None or (classes < 0).any():
        sys.exit(f"{dataset}: the file names do not tell the classes")
    pick = np.random.default_rng(seed)
    drawn = [
        normalise_caption(image["sentences"][pick.integers(len(image["sentences"]))]["raw"])
        for image in images
    ]
    captions = sorted(set(drawn))
    place = {caption: at for at, caption in enumerate(captions)}
    recipe = build_recipe(["mobilenet_tfidf"])
    half = (0.5, 0.5, 0.5)
    plan = plan_encoders(
        image_encoder=recipe.image.encoder,
        text_encoder=recipe.text.encoder,
        image_weights=weights,
        image_options=ImageOptions(recipe.image.options, half, half, recipe.image.size),
        device="cpu",
    )
    store.mkdir(parents=True, exist_ok=True)
    found = embed_all(
        load_encoders(plan),
        [hashlib.sha256(f"{dataset.name}/{name}".encode()).hexdigest() for name in names],
        lambda at: (dataset / "images" / names[at]).read_bytes(),
        [hashlib.sha256(caption.encode()).hexdigest() for caption in captions],
        captions,
        EmbeddingStore(store),
    )
    return Material(
        found.image, found.caption, torch.tensor([place[one] for one in drawn]), torch.from_numpy(classes)
    )


def corrupted(class_N: np.ndarray, spared_N: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Whose caption each training pair gets: with probability `rate` one of another class, else its own."""
    pick = np.random.default_rng([seed, round(1000 * rate)])
    donor = np.arange(len(class_N))
    for at in np.flatnonzero((pick.random(len(class_N)) < rate) & ~spared_N):
        donor[at] = pick.choice(np.flatnonzero(class_N != class_N[at]))
    return donor


def phase(pairs: Pairs, weight_N: Tensor, epochs: int, batch: int) -> Phase:
    """Whole epochs over some pairs."""
    batch = min(batch, len(pairs))
    return Phase(pairs, weight_N, epochs, len(pairs) // batch, batch)


@dataclass(frozen=True)
class Protocol:
    """One split of a dataset, ready to train on.

    Attributes:
        image_IV: standardised vectors of all images.
        caption_CV: standardised vectors of all captions.
        train_N: the training images.
        query_Q: the images (and their captions) that ask.
        database_G: those that are searched.
        is_trusted_N: the training pairs known to be right.
    """

    material: Material
    image_IV: Tensor
    caption_CV: Tensor
    train_N: Tensor
    query_Q: Tensor
    database_G: Tensor
    is_trusted_N: np.ndarray

    @classmethod
    def prepare(
        cls, material: Material, trusted_share: float, components: tuple[int, ...] | None, seed: int
    ) -> Protocol:
        """Split, and reduce the features: roots of the image's (none is negative), leading components.

        As many components of the images as an eighth of the training pairs, 256 at most, and half as many of the
        captions, unless told.
        """
        num = len(material.class_I)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(num))
        train, query, database = order.split([num // 2, num // 10, num - num // 2 - num // 10])
        wide = min(256, len(train) // 8)
        components = components or (wide, wide // 2)
        image, caption = material.image_ID.float().clamp_min(0).sqrt(), material.caption_CD
        images = principal_projection(image[train], components[0], 0.0)(image)
        captions = principal_projection(caption[material.caption_I[train]], components[1], 0.0)(caption)
        trusted = np.zeros(len(train), bool)
        trusted[
            np.random.default_rng(seed + 1).permutation(len(train))[: int(trusted_share * len(train))]
        ] = True
        return cls(material, standardised(images), standardised(captions), train, query, database, trusted)

    def pairs(self, donor_N: np.ndarray) -> Pairs:
        """The training pairs with the captions of their donors."""
        captions = self.material.caption_I[self.train_N[torch.from_numpy(donor_N)]]
        return Pairs(self.train_N, captions, len(self.image_IV), len(self.caption_CV))

    def retrieval(self, phases: Sequence[Phase], settings: ChnrSection, seed: int) -> tuple[float, float]:
        """mAP@20 of heads trained through the phases: image to caption, caption to image."""
        heads = train_hash_heads(self.image_IV, self.caption_CV, phases, settings, seed)
        soft = heads.soft_codes(self.image_IV, self.caption_CV)
        image, caption = binary_codes(soft[0]), binary_codes(soft[1])[self.material.caption_I]
        q, g, classes = self.query_Q, self.database_G, self.material.class_I
        known = {"query_class": classes[q], "database_class": classes[g], "full_ranking": True}
        return (
            mean_average_precision(image[q], caption[g], **known),
            mean_average_precision(caption[q], image[g], **known),
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--image-weights", type=Path, required=True)
    parser.add_argument("--store", type=Path, help="keep embeddings here; by default nowhere")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--weightings", default=",".join(WEIGHTINGS))
    parser.add_argument("--seed", type=int, default=42, help="of captions, split, noise and training")
    parser.add_argument("--trusted-share", type=float, help="by default the author's: .2 RSICD, .3 UCM")
    parser.add_argument(
        "--corrupt-all", action="store_true", help="the trusted subset is struck like the rest"
    )
    parser.add_argument("--epochs", type=int, default=150, help="half of them on trusted pairs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--components", help="of images and of captions; see Protocol.prepare for the default"
    )
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of train.chnr")
    given = parser.parse_args()
    which = "ucm" if "ucm" in given.dataset.name.lower() else "rsicd"
    changes = ["all_views=true", "discriminator_steps=400", *given.set]
    settings = build_recipe(["chnr"], [f"train.chnr.{one}" for one in changes]).train.chnr
    share = TRUSTED_SHARE[which] if given.trusted_share is None else given.trusted_share
    seed, start = given.seed, time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        material = read_material(given.dataset, given.image_weights, given.store or Path(place), seed)
    components = tuple(map(int, given.components.split(","))) if given.components else None
    protocol = Protocol.prepare(material, share, components, seed)
    class_N = material.class_I[protocol.train_N].numpy()
    clean = protocol.pairs(np.arange(len(class_N)))
    rates, weightings = [float(one) for one in given.rates.split(",")], given.weightings.split(",")
    found: dict[tuple[str, str, float], float] = {}
    detection = []
    own_epochs = given.epochs // 2

    def phases(pairs: Pairs, trusted_T: Tensor, weight_N: Tensor) -> list[Phase]:
        trusted = pairs.select(trusted_T)
        return [
            phase(trusted, torch.ones(len(trusted)), own_epochs, given.batch),
            phase(pairs, weight_N, given.epochs - own_epochs, given.batch),
        ]

    def verdict_on(trusted_T: Tensor):
        kept = clean.select(trusted_T)
        return train_discriminator(
            protocol.image_IV,
            protocol.caption_CV,
            kept,
            torch.arange(len(kept)),
            material.class_I,
            settings,
            seed,
        )

    trusted_N = protocol.is_trusted_N
    trusted_T = torch.from_numpy(np.flatnonzero(trusted_N))
    verdict = verdict_on(trusted_T)
    for rate in rates:
        donor = corrupted(class_N, np.zeros_like(trusted_N) if given.corrupt_all else trusted_N, rate, seed)
        pairs, is_noisy = protocol.pairs(donor), donor != np.arange(len(donor))
        at_T = trusted_T
        if given.corrupt_all:
            at_T = trusted_T[torch.from_numpy(~is_noisy[trusted_T.numpy()])]
            verdict = verdict_on(at_T)
        probability_N, logit_N = verdict.judge(protocol.image_IV, protocol.caption_CV, pairs)
        asked = ~trusted_N
        detection.append(roc_auc_score(is_noisy[asked], -logit_N.numpy()[asked]))
        for weighting in weightings:
            weight_N = pair_weight(probability_N, weighting, verdict.threshold)
            values = protocol.retrieval(phases(pairs, at_T, weight_N), settings, seed)
            for direction, value in zip(DIRECTIONS, values, strict=True):
                found[direction, weighting, rate] = value
            told = f"{values[0]:.3f} {values[1]:.3f} ({time.perf_counter() - start:.0f} s)"
            print(f"p {rate:g} {weighting}: {told}", file=sys.stderr, flush=True)
    ceiling = protocol.retrieval(phases(clean, trusted_T, torch.ones(len(clean))), settings, seed)
    report(which, rates, weightings, found, detection, ceiling)


def report(
    which: str,
    rates: Sequence[float],
    weightings: Sequence[str],
    found: dict[tuple[str, str, float], float],
    detection: Sequence[float],
    ceiling: tuple[float, float],
) -> None:
    """Print Markdown: ours, and the author's in brackets where it is known."""
    print(f"| {which}, mAP@20: ours (author's) | " + " | ".join(f"p = {rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for direction, best in zip(DIRECTIONS, ceiling, strict=True):
        for weighting in weightings:
            theirs = dict(zip(RATES, AUTHOR[which][direction].get(weighting, ()), strict=False))
            cells = [
                f"{found[direction, weighting, rate]:.3f}"
                + (f" ({theirs[rate]:.3f})" if rate in theirs else "")
                for rate in rates
            ]
            print(f"| {direction}, {weighting} | " + " | ".join(cells) + " |")
        print(f"| {direction}, no noise, no weights | {best:.3f}" + " |" * len(rates))
    print(
        "| discriminator, AUROC on untrusted pairs | " + " | ".join(f"{one:.3f}" for one in detection) + " |"
    )


if __name__ == "__main__":
    main()
