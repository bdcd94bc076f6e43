"""Fine-tuning of whole towers on the audited pairs (`towers = "full"`), as RRSITR does it.

What is minimised comes as a callable over the outputs of both towers; here are the schedule, the batches and the
checkpoints. A checkpoint is one file, committed by a rename: weights, optimiser state, and in its header the step and
a digest of everything the result depends on. Batches and the randomness within a step follow from seed, epoch and step
alone, so a killed run, started again, ends on the CPU with the same bytes as an undisturbed one. A checkpoint or a
result of other weights, pairs, captions or settings is not used.

Shapes: N = pairs; B = batch; P = patches; L = text positions; D = dimensions.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nc_audit.errors import TrainingError
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TowersSection, TrainSection
from nc_audit.run import digest_of, replacing
from nc_audit.train.loop import Progress, silent

logger = logging.getLogger(__name__)

RESULT = "towers.safetensors"
CHECKPOINT = "towers.checkpoint.safetensors"
HEADER = "training"
BATCHES_AHEAD = 2
MOST_WARM_UP = 0.1  # of all steps

Decode = Callable[[int], tuple[Tensor | None, Exception | None]]


class Towers(Protocol):
    """A dual encoder whose towers train; `encoders.open_clip_towers.OpenClipModel` is one.

    Attributes:
        model: the module of both towers, with `set_grad_checkpointing`.
        device: where it is.
    """

    model: Any
    device: str

    def digest(self) -> str:
        """Digest of the model and its weights, as they stand."""
        ...

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Token numbers [B, L] of captions."""
        ...

    def image_outputs(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit vectors [B, D] and patches [B, P, D] of bytes [B, 3, H, W], with gradient."""
        ...

    def caption_outputs(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Unit vectors [B, D], positions [B, L, D] and which of them are words [B, L], with gradient."""
        ...


@dataclass(frozen=True)
class TowerOutputs:
    """What both towers make of a batch of pairs, with gradient, float32, on the model's device.

    Attributes:
        image_BD: embedding of each pair's image, unit vectors.
        caption_BD: embedding of each pair's caption, unit vectors.
        image_tokens_BPD: the image's patches in the same space, of any length; None where the tower has none.
        caption_tokens_BLD: the caption's text positions in the same space, of any length; None likewise.
        is_word_BL: which text positions are words; the others hold start, end and padding. None likewise.
        logit_scale: the model's own factor of the cosine, trainable; 1 where it has none.
        pair_B: position of each pair among the pairs that train, on the CPU; for weights and records.
        image_B: index of each pair's image, on the model's device; for `contrastive.negatives_mask`.
        caption_B: index of each pair's caption, likewise.
    """

    image_BD: Tensor
    caption_BD: Tensor
    image_tokens_BPD: Tensor | None
    caption_tokens_BLD: Tensor | None
    is_word_BL: Tensor | None
    logit_scale: Tensor
    pair_B: Tensor
    image_B: Tensor
    caption_B: Tensor


Objective = Callable[[TowerOutputs], Tensor]


@dataclass(frozen=True)
class _Batch:
    """A step's pairs: positions [B], distinct images as bytes [K, 3, H, W], and which of them each pair shows [B]."""

    step: int
    pair_B: Tensor
    images: Tensor
    image_at_B: Tensor


@dataclass(frozen=True)
class Schedule:
    """Which pairs every step takes, and its learning rate."""

    num_pairs: int
    batch: int
    steps: int
    warm_up: int
    lr: float
    seed: int

    @classmethod
    def of(cls, num_pairs: int, settings: TrainSection) -> Schedule:
        """The schedule of a recipe; a last batch that is not full is left out, as in the paper."""
        tower = settings.tower
        batch = min(tower.batch, num_pairs)
        steps = tower.epochs * (num_pairs // batch)
        warm_up = min(tower.warm_up_steps, int(MOST_WARM_UP * steps))
        return cls(num_pairs, batch, steps, warm_up, tower.lr, settings.seed)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, 0..steps - 1: rises linearly to `lr`, then falls by a cosine towards 0."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step - self.warm_up) / (self.steps - self.warm_up)
        return self.lr * (1 + math.cos(math.pi * done)) / 2

    def positions(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Every step from `first` on, with the positions [B] of its pairs; each epoch has an order of its own."""
        per_epoch = self.num_pairs // self.batch
        for step in range(first, self.steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0 or step == first:
                generator = torch.Generator().manual_seed(_seed(self.seed, "order", epoch))
                order_N = torch.randperm(self.num_pairs, generator=generator)
            yield step, order_N[place * self.batch : (place + 1) * self.batch]


def fine_tune(
    towers: Towers,
    decode: Decode,
    captions: Sequence[str],
    pairs: Pairs,
    objective: Objective,
    settings: TrainSection,
    folder: Path,
    progress: Progress = silent,
) -> None:
    """Train both towers in place, and leave their weights in `folder / RESULT`.

    Goes on from a checkpoint of the same training in the folder; where the result is there already, only reads it.

    Args:
        towers: loaded; frozen and in evaluation mode before and after.
        decode: an image by its index as bytes [3, H, W] of fixed size, or why there is none; called by threads.
            Pairs whose image cannot be decoded sit out.
        captions: by their index.
        pairs: what is trained on, as indices of images and captions.
        objective: from the outputs of a batch to the loss, a scalar with gradient. What it records by itself does
            not survive a killed run.
        settings: `tower` and `seed`; all settings decide whether a checkpoint still fits.
        folder: for the checkpoint and the result.
        progress: told the steps done and the steps in all.

    Raises:
        TrainingError: the loss or its gradient is not finite, memory runs out, or a batch cannot be decoded.
    """
    model, tower = towers.model, settings.tower
    schedule = Schedule.of(len(pairs), settings)
    key = _key(towers, captions, pairs, settings)
    if _header(folder / RESULT).get("key") == key:
        model.load_state_dict(load_file(folder / RESULT))
        return
    on_cuda = [torch.cuda.current_device()] if towers.device.startswith("cuda") else []
    try:
        model.train().requires_grad_(True)
        model.set_grad_checkpointing(tower.grad_checkpointing)
        optimiser = _optimiser(model, tower)
        first = _resume(folder / CHECKPOINT, key, model, optimiser)
        progress("fine-tune towers", first, schedule.steps)
        for batch in _decoded(decode, pairs, schedule, first, tower.workers):
            lr = schedule.lr_at(batch.step)
            for group in optimiser.param_groups:
                group["lr"] = lr
            with torch.random.fork_rng(devices=on_cuda):
                torch.manual_seed(
                    _seed(schedule.seed, "step", batch.step)
                )  # of dropout, where a model has any
                loss = objective(_outputs(towers, batch, captions, pairs.select(batch.pair_B)))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), tower.max_grad_norm)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise TrainingError(
                    f"loss is {loss.item()} with a gradient of norm {norm.item()} "
                    f"at step {batch.step} (lr {lr:.2g})",
                    "lower train.tower.lr",
                )
            optimiser.step()
            done = batch.step + 1
            if done % tower.checkpoint_every == 0 and done < schedule.steps:
                _checkpoint(folder / CHECKPOINT, key, done, model, optimiser)
            progress("fine-tune towers", done, schedule.steps)
    except torch.OutOfMemoryError as problem:
        raise TrainingError(
            f"memory runs out at {schedule.batch} pairs per batch",
            "lower train.tower.batch" + ("" if tower.grad_checkpointing else ", or set grad_checkpointing"),
        ) from problem
    finally:
        model.set_grad_checkpointing(False)
        model.eval().requires_grad_(False)
        model.zero_grad(set_to_none=True)
    _save(folder / RESULT, _owned(model.state_dict()), {"key": key, "step": schedule.steps})
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _outputs(towers: Towers, batch: _Batch, captions: Sequence[str], pairs: Pairs) -> TowerOutputs:
    """Both towers on a batch, whose pairs are given, each distinct image once."""
    image, image_tokens = towers.image_outputs(batch.images)
    tokens_BL = towers.tokenise([captions[caption] for caption in pairs.caption_N.tolist()])
    caption_BD, caption_tokens, is_word = towers.caption_outputs(tokens_BL)
    device = image.device
    at_B = batch.image_at_B.to(device)
    scale = getattr(towers.model, "logit_scale", None)
    return TowerOutputs(
        image[at_B],
        caption_BD,
        None if image_tokens is None else image_tokens[at_B],
        caption_tokens,
        is_word,
        torch.ones((), device=device) if scale is None else scale.exp().mean(),
        batch.pair_B,
        pairs.image_N.to(device),
        pairs.caption_N.to(device),
    )


def _decoded(decode: Decode, pairs: Pairs, schedule: Schedule, first: int, workers: int) -> Iterator[_Batch]:
    """The batches from a step on; threads decode a few of them ahead."""
    waiting: deque[tuple[int, Tensor, Tensor, list[Future[Any]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for step, pair_B in schedule.positions(first):
                images_K = pairs.image_N[pair_B].unique()
                futures = [pool.submit(decode, image) for image in images_K.tolist()]
                waiting.append((step, pair_B, images_K, futures))
                if len(waiting) > BATCHES_AHEAD:
                    yield _gathered(pairs, *waiting.popleft())
            while waiting:
                yield _gathered(pairs, *waiting.popleft())
        finally:
            for _, _, _, futures in waiting:
                for future in futures:
                    future.cancel()


def _gathered(
    pairs: Pairs, step: int, pair_B: Tensor, images_K: Tensor, futures: Sequence[Future[Any]]
) -> _Batch:
    """A batch without the pairs whose image is not to be had."""
    results = [future.result() for future in futures]
    images = [image for image, _ in results if image is not None]
    if len(images) < len(results):
        why = next(str(problem) for image, problem in results if image is None)
        if not images:
            raise TrainingError(f"no image of step {step} can be decoded: {why}", "check the images")
        logger.warning("step %d leaves out %d images: %s", step, len(results) - len(images), why)
    is_there_K = torch.tensor([image is not None for image, _ in results])
    place_K = torch.where(is_there_K, is_there_K.cumsum(0) - 1, -1)
    place_B = place_K[torch.searchsorted(images_K, pairs.image_N[pair_B])]
    return _Batch(step, pair_B[place_B >= 0], torch.stack(images), place_B[place_B >= 0])


def _optimiser(model: Any, tower: TowersSection) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors: norms, biases, the logit scale."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": tower.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=tower.lr,
    )


def _checkpoint(path: Path, key: str, step: int, model: Any, optimiser: torch.optim.Optimizer) -> None:
    """Commit the state of training after a number of steps."""
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{what}": value for what, value in state.items()}
    _save(path, _owned(tensors), {"key": key, "step": step})


def _resume(path: Path, key: str, model: Any, optimiser: torch.optim.Optimizer) -> int:
    """Take up a checkpoint of this training, and say how many steps are done; 0 where there is none."""
    header = _header(path)
    if header.get("key") != key:
        return 0
    tensors = load_file(path)
    model.load_state_dict(
        {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser/"):
            _, number, what = name.split("/")
            state.setdefault(int(number), {})[what] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return header["step"]


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    with replacing(path) as partial:
        save_file(tensors, partial, {HEADER: json.dumps(header)})  # one entry: several come in any order


def _header(path: Path) -> dict[str, Any]:
    """What the header of one of our files says; nothing where the file is absent or damaged."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, ValueError) as problem:
        logger.warning("%s is damaged and is not used: %s", path.name, problem)
        return {}


def _key(towers: Towers, captions: Sequence[str], pairs: Pairs, settings: TrainSection) -> str:
    """Digest of what the trained weights depend on, the content of the images aside."""
    dump = settings.model_dump(mode="json")
    for name in ("checkpoint_every", "workers"):
        dump["tower"].pop(name)
    pair_lists = [pairs.image_N.tolist(), pairs.caption_N.tolist()]
    return digest_of([towers.digest(), digest_of(list(captions)), digest_of(pair_lists), json.dumps(dump)])


def _seed(*of: Any) -> int:
    """A seed for torch, 0..2^60 - 1."""
    return int(digest_of(list(of))[:15], 16)
