"""What every training method shares: its inputs, heads in training, and what it hands on to scoring.

Shapes: I = images; C = captions; N = pairs; B = batch; E = epochs; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nc_audit.methods import self_paced
from nc_audit.methods.heads import Heads
from nc_audit.methods.matching import Candidates, Matches, Pairs, match
from nc_audit.methods.projections import Projection, principal_projection
from nc_audit.methods.rows import rows_at
from nc_audit.methods.uncertainty import chance_loss
from nc_audit.model import Model
from nc_audit.recipe import TrainSection
from nc_audit.train.steps import Steps

MAX_CAPTION_INPUTS = 512
_SHORT_STEPS_UP_TO = 128  # pairs a batch
_FEWEST_STEPS = 2.0  # times fewer
_MANY_PAIRS = 15_000  # what the first epochs say, and weights that follow every epoch, help only fewer

Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Inputs:
    """What is known before training: frozen embeddings, the pairs, and what pairs are scored against.

    Attributes:
        image_ID: image embeddings as the store gives them, shape [I, D], in float16 or more.
        caption_CD: caption embeddings, shape [C, D'], likewise.
        image_head_ID: what image heads take in, shape [I, K].
        caption_head_CD: what caption heads take in, shape [C, K']; `caption_CD` itself where it is narrow.
        image_projection: from `image_ID` to `image_head_ID`.
        caption_projection: from `caption_CD` to `caption_head_CD`.
        pairs: the given pairs, distinct, in canonical order.
        candidates: the fixed captions and images every pair is scored against.
        logit_scale: of aligned encoders, whose cosine means something untrained; None where they are not aligned.
        precision: heads may multiply in while they train, `fp32` or `bf16`; what they give is float32 either way.
        device: where heads train; what they take in lies there, everything else on the processor.
        trusted_N: pairs known to be right, bool [N]; None where none are known.
        image_tokens: local embeddings of images, shape [I, T, K], all-zero tokens are padding; None where the
            encoder has none.
        caption_tokens: local embeddings of captions, shape [C, T', K']; None likewise.
    """

    image_ID: Tensor
    caption_CD: Tensor
    image_head_ID: Tensor
    caption_head_CD: Tensor
    image_projection: Projection
    caption_projection: Projection
    pairs: Pairs
    candidates: Candidates
    logit_scale: float | None = None
    precision: str = "fp32"
    device: str = "cpu"
    trusted_N: Tensor | None = None
    image_tokens: Tensor | None = None
    caption_tokens: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        image_ID: Tensor,
        caption_CD: Tensor,
        pairs: Pairs,
        settings: TrainSection,
        num_candidates: int,
        device: str = "cpu",
        **more: Any,
    ) -> Inputs:
        """Inputs from embeddings: head inputs are principal components, half whitened."""
        generator = torch.Generator().manual_seed(settings.seed + 10)
        image = principal_projection(image_ID, settings.components, whitening=0.5)
        caption = (
            Projection.identity(caption_CD.shape[1])
            if caption_CD.shape[1] <= MAX_CAPTION_INPUTS
            else principal_projection(caption_CD, MAX_CAPTION_INPUTS, whitening=0.5)
        )
        return cls(
            image_ID,
            caption_CD,
            image(image_ID).to(device),
            caption(caption_CD).to(device),
            image,
            caption,
            pairs,
            Candidates.draw(pairs, num_candidates, generator),
            device=device,
            **more,
        )


@dataclass(frozen=True)
class Plan:
    """How long one pair of heads trains, and at what learning rate as a multiple of the recipe's."""

    batch: int
    epochs: int
    steps_per_epoch: int
    lr_factor: float = 1.0

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps_per_epoch

    @classmethod
    def of(cls, num_pairs: int, settings: TrainSection) -> Plan:
        """A plan of `settings.steps` steps: fewer below 6,000 pairs, more beyond 30,000 (up to eight times as many).

        Few pairs are soon learnt by heart, wrong ones too, so they are met in smaller batches and fewer steps.
        """
        tenth = 1 << max(4, min(10, (num_pairs // 10).bit_length() - 1))  # a power of two, 16..1024
        batch = max(8, min(settings.batch or tenth, num_pairs // 4))
        epochs = settings.epochs
        share = min(1.0, (num_pairs / 6_000) ** (1 / 3)) * min(8.0, max(1.0, (num_pairs / 30_000) ** 0.5))
        return cls(batch, epochs, max(1, round(share * settings.steps / epochs)))

    def in_long_steps(self) -> Plan:
        """The same with fewer and longer steps, where batches are so large that these are as good.

        Steps become fewer by the root of the batch beyond 128 pairs, up to half of them, and longer by more than that:
        the whole way grows, which right pairs gain by and wrong ones, being many and without a rule, hardly do.

        Example:
            >>> Plan(512, 12, 14).in_long_steps()
            Plan(batch=512, epochs=12, steps_per_epoch=7, lr_factor=3.0)
        """
        fewer = min(_FEWEST_STEPS, max(1.0, (self.batch / _SHORT_STEPS_UP_TO) ** 0.5))
        steps = max(1, round(self.steps_per_epoch / fewer))
        return replace(self, steps_per_epoch=steps, lr_factor=2 * fewer - 1)

    def is_scored(self, epoch: int, num_pairs: int) -> bool:
        """Whether all pairs are scored after this epoch, 1...: always, but of many pairs every second to fourth time.

        The last epoch is always scored.
        """
        least = 2 if num_pairs >= _MANY_PAIRS else 1
        stride = min(4, max(least, round(num_pairs / 50_000)))
        return (self.epochs - epoch) % stride == 0


def new_heads(inputs: Inputs, settings: TrainSection, input_dropout: float | None = None) -> Heads:
    """Untrained heads for these inputs, where these lie; the caller has seeded torch."""
    heads = Heads(
        inputs.image_head_ID.shape[1],
        inputs.caption_head_CD.shape[1],
        settings.width,
        settings.hidden,
        settings.input_dropout if input_dropout is None else input_dropout,
        settings.dropout,
        settings.log_scale,
        settings.max_scale,
    )
    return heads.to(inputs.device)


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Torch's random numbers from a seed, on the processor and on the device, which go on as before afterwards."""
    where = torch.device(device)
    others = [] if where.type == "cpu" else [where]
    with torch.random.fork_rng(devices=others, device_type="cuda" if not others else where.type):
        torch.manual_seed(seed)
        yield


def batches(pairs: Pairs, batch: int, seed: int, device: str) -> Iterator[Tensor]:
    """Positions [batch] among the pairs, without end: shuffled anew each time through, a rest left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pairs), generator=generator).to(device)
        for start in range(0, len(order) - batch + 1, batch):
            yield order[start : start + batch]


class Trainer:
    """One pair of heads in training on some pairs: batches, optimiser, place in the schedule.

    Args:
        heads: to be trained.
        inputs: what they take in.
        pairs: what they train on; may hold swaps beside given pairs.
        plan: how long.
        settings: `lr`, `warm_up`.
        weight_decay: of matrices; vectors have none.
        seed: draws the batches.
        extra: a further module to train along, under the same rules.
    """

    def __init__(
        self,
        heads: Heads,
        inputs: Inputs,
        pairs: Pairs,
        plan: Plan,
        settings: TrainSection,
        weight_decay: float,
        seed: int,
        extra: nn.Module | None = None,
    ) -> None:
        self.heads, self.pairs, self.plan, self.inputs = heads, pairs.to(inputs.device), plan, inputs
        trained = [*heads.parameters(), *(extra.parameters() if extra is not None else ())]
        matrices = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        self.steps = Steps(
            matrices, others, plan.steps, plan.lr_factor * settings.lr, settings.warm_up, weight_decay
        )
        self.batches = batches(self.pairs, plan.batch, seed, inputs.device)

    def cosines(self, at_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines of a batch's images against its captions, [B, B], with gradient; its image and caption indices."""
        image, caption = self.pairs.image_N[at_B], self.pairs.caption_N[at_B]
        image_BD = self.heads.image(rows_at(self.inputs.image_head_ID, image))
        caption_BD = self.heads.caption(rows_at(self.inputs.caption_head_CD, caption))
        return image_BD @ caption_BD.T, image, caption

    def run_epoch(self, objective: Callable[[Tensor], Tensor]) -> None:
        """Train for one epoch of the plan.

        Args:
            objective: from the positions [B] of a batch among `pairs` to the loss, a scalar with gradient.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.heads.train()
        for _ in range(self.plan.steps_per_epoch):
            self.steps.take(objective(next(self.batches)))

    def embed(
        self, image_at: Tensor | None = None, caption_at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of all or some images and captions by the heads as they stand: shapes [I, width], [C, width]."""
        return self.heads.embed(self.inputs.image_head_ID, self.inputs.caption_head_CD, image_at, caption_at)

    def matches(self) -> Matches:
        """Every quantity of the trainer's pairs against the fixed candidates, by the heads as they stand."""
        asked = (self.pairs.image_N, self.pairs.caption_N)
        candidates = self.inputs.candidates.to(self.inputs.device)
        return match(*self.embed(), self.heads.scale().item(), candidates, asked)[0].to("cpu")


@dataclass
class Trajectory:
    """Per scored epoch, and of every given pair: loss, weight and division (0 clean, 1 ambiguous, 2 noisy).

    `epochs` says which epochs these are, 1...
    """

    losses: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    divisions: list[Tensor] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def record(self, loss_N: Tensor, weight_N: Tensor, division_N: Tensor, epoch: int | None = None) -> None:
        """Add one epoch; the one after the last where it is not named."""
        self.epochs.append(epoch or (self.epochs[-1] + 1 if self.epochs else 1))
        self.losses.append(loss_N.clone())
        self.weights.append(weight_N.clone())
        self.divisions.append(division_N.to(torch.int8))

    def record_paced(
        self, loss_N: Tensor, weight_N: Tensor, num_candidates: int, settings: TrainSection
    ) -> None:
        """Add one epoch whose division is by loss, at the recipe's fractions of chance."""
        relative = loss_N / chance_loss(num_candidates)
        self.record(loss_N, weight_N, self_paced.divide(relative, settings.clean_at, settings.noisy_at))


@dataclass(frozen=True)
class Judgement:
    """What a method hands on: per distinct pair and per known swap, with the trained model.

    Attributes:
        given: quantities of the given pairs by name, each of shape [N]. Columns of `scores` go by their names there;
            a method that has no known swaps gives `noise_score` (higher = noisier) and `noise_probability` (0..1)
            by its own rule.
        swaps: quantities of known swaps by name; empty for a method that has none.
        facts: JSON-able values for the manifest.
        trajectory: per epoch; may be empty.
        model: for ranks, best matches and retrieval.
        again: the same of further draws of known swaps, each with a training of its own.
    """

    given: dict[str, Tensor]
    swaps: dict[str, Tensor]
    facts: dict[str, Any]
    trajectory: Trajectory
    model: Model
    again: tuple[Judgement, ...] = ()

    @property
    def draws(self) -> tuple[Judgement, ...]:
        """All draws, this one first."""
        return self, *self.again


def columns_of(matches: Matches, num_candidates: int) -> dict[str, Tensor]:
    """The columns of `scores` that every method fills from scoring against candidates."""
    return {
        "similarity": matches.similarity,
        "loss": matches.loss,
        "relative_loss": matches.loss / chance_loss(num_candidates),
        "energy": matches.energy,
        "swapped_entropy": (matches.image_entropy + matches.caption_entropy) / 2,
        "image_entropy": matches.image_entropy,
        "caption_entropy": matches.caption_entropy,
    }
