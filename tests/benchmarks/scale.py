"""Train, score and search many pairs on synthetic embeddings: seconds, seconds per 100,000 pairs, peak memory.

    python tests/benchmarks/scale.py [--pairs 100000,1000000] [--dims 512] [--per-image 5] [--noise 0.2] [--device auto]

Images and captions share 64 latent directions in `--dims` dimensions; a share of the captions is moved elsewhere.
One image in a hundred is a near-copy of another. Each size runs in a process of its own, so that its peak memory is
its own. Embedding, and decoding near-copies for their hashes, are not part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from nc_audit.process import set_up


def measure(num_pairs: int, dims: int, per_image: int, noise: float, device: str) -> dict[str, float | str]:
    """One size: seconds of each part, peak memory in GB, and how well noise, near-copies and re-matches are found."""
    import numpy as np
    import pyarrow as pa
    import torch

    from nc_audit.encoders.weights import choose_device, choose_precision
    from nc_audit.findings import Vectors, find_all
    from nc_audit.methods.known_swaps import swaps_auroc
    from nc_audit.methods.matching import Pairs
    from nc_audit.recipe import ScoreSection, TrainSection
    from nc_audit.rivals import look_around, reach
    from nc_audit.schema import PAIRS
    from nc_audit.score import Draw, judge
    from nc_audit.train import Inputs, train
    from nc_audit.unlikely_words import WordMaps

    generator = torch.Generator().manual_seed(0)
    num_images = num_pairs // per_image
    latent = torch.randn(num_images, 64, generator=generator)
    true_image = torch.arange(num_pairs) // per_image

    def seen(latent_index: torch.Tensor) -> torch.Tensor:
        """Noisy embeddings of one side in float16, as the store gives them; made a part at a time, to spare memory."""
        mixing = torch.randn(64, dims, generator=generator)
        made = torch.empty(len(latent_index), dims, dtype=torch.float16)
        for at in torch.arange(len(latent_index)).split(65_536):
            clear = latent[latent_index[at]] @ mixing
            made[at] = (clear + 4 * torch.randn(len(at), dims, generator=generator)).half()
        return made

    image, caption = seen(torch.arange(num_images)), seen(true_image)
    copy = torch.randperm(num_images, generator=generator)[: num_images // 100 * 2].view(2, -1)
    image[copy[1]] = (image[copy[0]] + 2 * torch.randn(copy.shape[1], dims, generator=generator)).half()
    moved = torch.arange(num_pairs)
    chosen = torch.randperm(num_pairs, generator=generator)[: int(noise * num_pairs)]
    moved[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    pairs = Pairs(true_image[moved], torch.arange(num_pairs), num_images, num_pairs)
    wrong = pairs.image_N != true_image
    settings, scoring = TrainSection(), ScoreSection()  # type: ignore[call-arg]
    captions = said(num_pairs)
    start = time.perf_counter()
    device = choose_device(device)
    precision = choose_precision("auto", device)
    inputs = Inputs.prepare(
        image, caption, pairs, settings, scoring.candidates, precision=precision, device=device
    )
    judgement = train(inputs, settings)
    trained = time.perf_counter()
    with torch.inference_mode():
        vectors = judgement.model.to(device).embed(image, caption)
        draw = Draw(judgement.given, judgement.swaps, *vectors)
        both = pairs.image_N.numpy(), pairs.caption_N.numpy()
        words = WordMaps(image.numpy(), *both, captions, draw.right.numpy())
        rate, columns = judge([draw], pairs, scoring, 0, words=words)
        del words
        judged = time.perf_counter()
        far = reach(num_images, num_pairs, scoring, device)
        best = look_around(*vectors, pairs, far, 0)
    looked = time.perf_counter()
    score, rows = columns["noise_score"], list(range(num_pairs))
    known = {
        "row": rows,
        "pair_id": [str(row) for row in rows],
        "image": [str(one) for one in pairs.image_N.tolist()],
    }
    known |= {"caption": captions, "source": ["c"] * num_pairs}
    table = pa.table({one.name: pa.array(known.get(one.name, [None] * num_pairs), one.type) for one in PAIRS})
    del known, rows
    told = time.perf_counter()
    probability = columns["noise_probability"].double().numpy()
    found = find_all(
        table,
        Vectors(
            pairs.image_N.numpy(),
            pairs.caption_N.numpy(),
            image.numpy(),
            vectors[0].cpu().numpy(),
            vectors[1].cpu().numpy(),
            probability,
        ),
        np.ones(num_pairs, np.int64),
        lambda image: 0,
    )
    done = time.perf_counter()
    shown, belongs = pairs.image_N.tolist(), true_image.tolist()
    near = {
        frozenset((shown[row], shown[partner]))
        for row, kind, partner, *_ in found.rows
        if kind == "near_duplicate_image" and partner is not None
    }
    copies = {frozenset(pair) for pair in copy.T.tolist()}
    matched = [
        belongs[partner] == shown[row]
        for row, kind, partner, *_ in found.rows
        if kind == "rematch" and partner is not None
    ]
    # The true image of caption n is true_image[n]: where the pair is wrong, it is the best match to be found.
    best_right = (best["best_image"] == true_image)[wrong].double().mean()
    return {
        "pairs": num_pairs,
        "device": device,
        "precision": precision,
        "train_s": trained - start,
        "judge_s": judged - trained,
        "look_around_s": looked - judged,
        "find_s": done - told,
        "s_per_100k": (done - told + looked - start) / num_pairs * 1e5,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "auroc": swaps_auroc(score[~wrong], score[wrong]),
        "searched": far.compared,
        "index": far.has_index,
        "best_images_right": float(best_right),
        "near_copies_found": len(near & copies) / len(copies),
        "rematches": len(matched),
        "rematches_right": sum(matched) / max(1, len(matched)),
        "rate": rate.estimate,
        "true_rate": float(wrong.double().mean()),
    }


def said(num: int) -> list[str]:
    """Captions of eight words of 2,000, the n-th as often as 1 / n, and a number that tells each from the others."""
    import numpy as np

    often = 1 / np.arange(1, 2_001)
    draw = np.random.default_rng(0).choice(2_000, size=(num, 8), p=often / often.sum())
    words = ["".join(chr(97 + int(digit)) for digit in f"{number:04d}") for number in range(2_000)]
    return [f"{' '.join(words[at] for at in row)} {number}" for number, row in enumerate(draw.tolist())]


def main() -> None:
    """Print one line of JSON a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", default="100000,1000000")
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--per-image", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = [int(size) for size in asked.pairs.split(",")]
    if asked.one:
        set_up()  # as the command line does
        print(json.dumps(measure(sizes[0], asked.dims, asked.per_image, asked.noise, asked.device)))
        return
    for size in sizes:
        same = ["--dims", str(asked.dims), "--per-image", str(asked.per_image), "--noise", str(asked.noise)]
        same += ["--device", asked.device]
        subprocess.run([sys.executable, __file__, "--one", "--pairs", str(size), *same], check=True)


if __name__ == "__main__":
    main()
