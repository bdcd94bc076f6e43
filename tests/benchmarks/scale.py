"""Train and score many pairs on synthetic embeddings: seconds, seconds per 100,000 pairs, peak memory.

    python tests/benchmarks/scale.py [--pairs 100000,1000000] [--dims 512] [--per-image 5] [--noise 0.2] [--device auto]

Images and captions share 64 latent directions in `--dims` dimensions; a share of the captions is moved elsewhere.
Each size runs in a process of its own, so that its peak memory is its own. Embedding is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time


def measure(num_pairs: int, dims: int, per_image: int, noise: float, device: str) -> dict[str, float | str]:
    """One size: seconds of training, judging and looking around, peak memory in GB, and how well noise is found."""
    import torch

    from nc_audit.encoders.weights import choose_device, choose_precision
    from nc_audit.methods.known_swaps import swaps_auroc
    from nc_audit.methods.matching import Pairs
    from nc_audit.recipe import ScoreSection, TrainSection
    from nc_audit.score import judge, look_around
    from nc_audit.train import Inputs, train

    generator = torch.Generator().manual_seed(0)
    num_images = num_pairs // per_image
    latent = torch.randn(num_images, 64, generator=generator)
    true_image = torch.arange(num_pairs) // per_image

    def seen(latent_index: torch.Tensor) -> torch.Tensor:
        """Noisy embeddings of one side, made a part at a time, so that making them is not what takes the memory."""
        mixing = torch.randn(64, dims, generator=generator)
        made = torch.empty(len(latent_index), dims)
        for at in torch.arange(len(latent_index)).split(65_536):
            made[at] = latent[latent_index[at]] @ mixing + 4 * torch.randn(len(at), dims, generator=generator)
        return made

    image, caption = seen(torch.arange(num_images)), seen(true_image)
    moved = torch.arange(num_pairs)
    chosen = torch.randperm(num_pairs, generator=generator)[: int(noise * num_pairs)]
    moved[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    pairs = Pairs(true_image[moved], torch.arange(num_pairs), num_images, num_pairs)
    wrong = pairs.image_N != true_image
    settings, scoring = TrainSection(), ScoreSection()  # type: ignore[call-arg]
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
        rate, columns = judge(judgement.given, judgement.swaps, *vectors, pairs, scoring, 0)
        judged = time.perf_counter()
        look_around(*vectors, pairs, scoring, 0)
    done = time.perf_counter()
    score = columns["noise_score"]
    return {
        "pairs": num_pairs,
        "device": device,
        "precision": precision,
        "train_s": trained - start,
        "judge_s": judged - trained,
        "look_around_s": done - judged,
        "s_per_100k": (done - start) / num_pairs * 1e5,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "auroc": swaps_auroc(score[~wrong], score[wrong]),
        "rate": rate.estimate,
        "true_rate": float(wrong.double().mean()),
    }


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
        print(json.dumps(measure(sizes[0], asked.dims, asked.per_image, asked.noise, asked.device)))
        return
    for size in sizes:
        same = ["--dims", str(asked.dims), "--per-image", str(asked.per_image), "--noise", str(asked.noise)]
        same += ["--device", asked.device]
        # as the command line sets it, so that other work on the machine costs no more than its share
        waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"} | os.environ
        subprocess.run(
            [sys.executable, __file__, "--one", "--pairs", str(size), *same], check=True, env=waiting
        )


if __name__ == "__main__":
    main()
