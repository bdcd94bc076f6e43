"""Several pairs of heads that train in step, each on pairs of its own, by the weighted contrastive loss.

Each takes a batch of the same size at a time, and one product serves them all: with few pairs, much of what a step
costs is to ask for it, and three pairs of heads take less than twice as long as one.

Shapes: K = pairs of heads; B = batch; N = pairs; W = width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nc_audit.methods.contrastive import in_batch_loss, left_out
from nc_audit.methods.heads import HeadInputs, Heads, HeadStack
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Plan, batches
from nc_audit.train.steps import Steps


class Lockstep:
    """Pairs of heads in training, place in the schedule.

    Args:
        heads: to be trained, of one kind.
        inputs: what they take in.
        pairs: what each trains on; may hold swaps beside given pairs.
        plan: how long.
        settings: `lr`, `warm_up`.
        weight_decay: of matrices; vectors have none.
        seeds: draw the batches of each.
    """

    def __init__(
        self,
        heads: Sequence[Heads],
        inputs: Inputs,
        pairs: Sequence[Pairs],
        plan: Plan,
        settings: TrainSection,
        weight_decay: float,
        seeds: Sequence[int],
    ) -> None:
        self.heads, self.inputs, self.plan = heads, inputs, plan
        self.pairs = [some.to(inputs.device) for some in pairs]
        dtype = torch.bfloat16 if inputs.precision == "bf16" else torch.float32
        self.image_in = HeadInputs.ahead(inputs.image_head_ID, dtype)
        self.caption_in = HeadInputs.ahead(inputs.caption_head_CD, dtype)
        self.image = HeadStack([one.image for one in heads])
        self.caption = HeadStack([one.caption for one in heads])
        self.log_scale_K = nn.Parameter(torch.stack([one.log_scale.detach() for one in heads]))
        for number, one in enumerate(heads):
            one.log_scale.data = self.log_scale_K.data[number]
        weights = [*self.image.weights, *self.caption.weights]
        self.steps = Steps(
            [one for one in weights if one.dim() > 2],
            [*(one for one in weights if one.dim() <= 2), self.log_scale_K],
            plan.steps,
            plan.lr_factor * settings.lr,
            settings.warm_up,
            weight_decay,
        )
        self.batches = [
            batches(some, plan.batch, seed, inputs.device)
            for some, seed in zip(self.pairs, seeds, strict=True)
        ]

    def run_epoch(self, weights: Sequence[Tensor]) -> None:
        """Train for one epoch of the plan.

        Args:
            weights: of each one's pairs in the loss, shapes [N].

        Raises:
            TrainingError: the loss is not finite.
        """
        for one in self.heads:
            one.train()
        weights = [weight.to(self.inputs.device) for weight in weights]
        for _ in range(self.plan.steps_per_epoch):
            at = [next(some) for some in self.batches]
            image_KB = torch.stack([some.image_N[b] for some, b in zip(self.pairs, at, strict=True)])
            caption_KB = torch.stack([some.caption_N[b] for some, b in zip(self.pairs, at, strict=True)])
            weight_KB = torch.stack([weight[b] for weight, b in zip(weights, at, strict=True)])
            with self._products():
                # The scale is on the vectors: of logits there are more.
                image_KBW = self.image(self.image_in[image_KB]) * self._scale()[:, None, None]
                caption_KBW = self.caption(self.caption_in[caption_KB])
                logits_KBB = image_KBW @ caption_KBW.mT
            loss_KB = in_batch_loss(logits_KBB, left_out(image_KB, caption_KB))
            self.steps.take((weight_KB * loss_KB).mean(1).sum())

    def scale(self, number: int) -> float:
        """Logit scale of one pair of heads as it stands."""
        return self._scale()[number].item()

    def _products(self) -> torch.autocast:
        kind = torch.device(self.inputs.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.inputs.precision == "bf16")

    def _scale(self) -> Tensor:
        return self.log_scale_K.clamp(0.0, self.heads[0].max_log_scale).exp()

    def embed(
        self, number: int, image_at: Tensor | None = None, caption_at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of all or some images and captions by one pair of heads as it stands: [I, W], [C, W]."""
        with self._products():
            return self.heads[number].embed(self.image_in, self.caption_in, image_at, caption_at)
