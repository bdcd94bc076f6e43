"""RRSITR: contrastive training that divides every batch by loss into clean, ambiguous and noisy pairs.

Over frozen embeddings, small heads take the place of the towers; `train.towers = "full"` tunes the towers themselves
by the same objective (`train.towers`). Two things differ from the published training, because heads start from chance
where CLIP's towers do not: a few epochs of plain contrastive loss come first, since at chance every pair is noisy by
definition; and the optimiser is the shared one. Losses are averaged over the later epochs against fixed candidates.

Shapes: I = images; C = captions; N = pairs; B = batch; T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nc_audit.methods import contrastive
from nc_audit.methods.division import Divided, divided_objective, total_loss
from nc_audit.methods.local_similarity import gram_vector, local_similarity, own_local_similarity, rooted
from nc_audit.methods.matching import Matches, match
from nc_audit.methods.mixture import clean_posterior
from nc_audit.methods.projections import Projection
from nc_audit.methods.self_paced import divide, divided_weight
from nc_audit.methods.uncertainty import chance_loss
from nc_audit.model import Model
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import (
    Inputs,
    Judgement,
    Plan,
    Progress,
    Trainer,
    Trajectory,
    columns_of,
    new_heads,
    seeded,
    silent,
)
from nc_audit.train.towers import TowerOutputs

LOCAL_WIDTH = 32


class LocalHeads(nn.Module):
    """Linear maps of either side's tokens into one small space."""

    def __init__(self, num_image: int, num_caption: int, is_mean: bool, width: int = LOCAL_WIDTH) -> None:
        super().__init__()
        self.is_mean = is_mean
        self.image = nn.Linear(num_image, width, bias=False)
        self.caption = nn.Linear(num_caption, width, bias=False)

    def grams(self, image_BTD: Tensor, caption_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Gram vectors of both sides."""
        return self._gram(self.image, image_BTD), self._gram(self.caption, caption_BTD)

    def _gram(self, head: nn.Linear, tokens_BTD: Tensor) -> Tensor:
        return gram_vector(head(tokens_BTD.float()), is_mean=self.is_mean)

    @torch.no_grad()
    def all_grams(self, image_ITD: Tensor, caption_CTD: Tensor) -> tuple[Tensor, Tensor]:
        """Gram vectors of all images and captions, in blocks."""
        image = torch.cat([self._gram(self.image, part) for part in image_ITD.split(2048)])
        caption = torch.cat([self._gram(self.caption, part) for part in caption_CTD.split(2048)])
        return image, caption


def train_rrsitr(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Train heads by RRSITR's objective and score every pair; see the module.

    Args:
        inputs: frozen embeddings, pairs, candidates; tokens of both sides for the local part.
        settings: the recipe's `train` section; `settings.rrsitr` for the method.
        progress: told the epoch.

    Returns:
        noise_score is the mean relative loss (global and local together), noise_probability the posterior of a
        two-component mixture on it; `fused_similarity` and `hardest_gap` beside the shared columns.

    Raises:
        TrainingError: a loss is not finite.
    """
    if settings.towers == "full":
        return _judge_towers(inputs, settings)
    own, pairs, num = settings.rrsitr, inputs.pairs, len(inputs.pairs)
    tokens = (inputs.image_tokens, inputs.caption_tokens) if own.local else (None, None)
    image_tokens, caption_tokens = tokens
    with seeded(settings.seed):
        heads = new_heads(inputs, settings)
        heads.log_scale.data.fill_(torch.tensor(own.scale).log())
        heads.log_scale.requires_grad_(False)
        plan = Plan.of(num, settings)
        local: LocalHeads | None = None
        if image_tokens is not None and caption_tokens is not None:
            local = LocalHeads(image_tokens.shape[2], caption_tokens.shape[2], own.local_mean)
        trainer = Trainer(
            heads, inputs, pairs, plan, settings, settings.weight_decay, settings.seed + 1, extra=local
        )

        def objective(at_B: Tensor) -> Tensor:
            cosine_BB, image, caption = trainer.cosines(at_B)
            counts_BB = contrastive.negatives_mask(image, caption)
            local_BB = None
            if local is not None:
                assert image_tokens is not None
                assert caption_tokens is not None
                local_BB = local_similarity(*local.grams(image_tokens[image], caption_tokens[caption]))
            if is_warming:
                return total_loss(cosine_BB, local_BB, counts_BB, own.scale).mean()
            return _divided(cosine_BB, local_BB, counts_BB, settings).objective

        trajectory = Trajectory()
        total, mean_loss = Matches.zeros(num), torch.zeros(num)
        everything, counted = torch.arange(num), 0
        num_candidates = len(inputs.candidates.caption_M)
        weight_N = torch.ones(num)
        for epoch in range(1, plan.epochs + 1):
            is_warming = epoch <= own.warm_up_epochs
            trainer.run_epoch(objective)
            found = trainer.matches()
            loss = found.loss
            if local is not None:
                loss = (loss + _local_loss(local, image_tokens, caption_tokens, inputs, own.scale)) / 2
            relative = loss / chance_loss(num_candidates)
            trajectory.record(loss, weight_N, divide(relative, settings.clean_at, settings.noisy_at))
            weight_N = divided_weight(
                relative, settings.clean_at, settings.noisy_at, settings.ambiguous_factor
            )
            if epoch >= settings.first_counted_epoch:
                total.add_(everything, found)
                mean_loss += loss
                counted += 1
            progress("train", epoch, plan.epochs)
    heads.eval()
    mean_loss /= counted
    relative = mean_loss / chance_loss(num_candidates)
    columns = columns_of(total.divided(counted), num_candidates)
    with torch.no_grad():
        fused = columns["similarity"]
        if local is not None:
            assert image_tokens is not None
            assert caption_tokens is not None
            grams = local.all_grams(image_tokens, caption_tokens)
            near = torch.cat(
                [
                    own_local_similarity(grams[0][i], grams[1][c])
                    for i, c in zip(pairs.image_N.split(4096), pairs.caption_N.split(4096), strict=True)
                ]
            )
            fused = own.fusion * fused + (1 - own.fusion) * near
    given = columns | {
        "loss": mean_loss,
        "relative_loss": relative,
        "weight": torch.stack(trajectory.weights).mean(0),
        "fused_similarity": fused,
        "noise_score": relative,
        "noise_probability": 1 - clean_posterior(relative),
    }
    facts = {"logit_scale": own.scale, "num_candidates": num_candidates, "local": local is not None}
    model = Model(heads, inputs.image_projection, inputs.caption_projection)
    return Judgement(given, {}, facts, trajectory, model)


def _divided(
    cosine_BB: Tensor, local_BB: Tensor | None, counts_BB: Tensor, settings: TrainSection
) -> Divided:
    own = settings.rrsitr
    return divided_objective(
        cosine_BB,
        local_BB,
        counts_BB,
        scale=own.scale,
        clean_at=settings.clean_at,
        noisy_at=settings.noisy_at,
        ambiguous_factor=settings.ambiguous_factor,
        triplet_factor=own.triplet_factor,
        margin=own.margin,
        is_paced=own.self_paced,
        has_ambiguous=own.ambiguous,
        has_triplet=own.triplet,
    )


def tower_objective(settings: TrainSection) -> Callable[[TowerOutputs], Tensor]:
    """RRSITR's objective on a batch of whole towers; pretrained towers need no warm-up.

    Args:
        settings: the recipe's `train` section.
    """
    own = settings.rrsitr

    def objective(outputs: TowerOutputs) -> Tensor:
        counts_BB = contrastive.negatives_mask(outputs.image_B, outputs.caption_B)
        patches, words, is_word = outputs.image_tokens_BPD, outputs.caption_tokens_BLD, outputs.is_word_BL
        local_BB = None
        if own.local and patches is not None and words is not None and is_word is not None:
            local_BB = local_similarity(
                gram_vector(patches, is_mean=own.local_mean),
                gram_vector(words * is_word[:, :, None], is_mean=own.local_mean),
            )
        return _divided(outputs.image_BD @ outputs.caption_BD.T, local_BB, counts_BB, settings).objective

    return objective


def _judge_towers(inputs: Inputs, settings: TrainSection) -> Judgement:
    """The pairs by tuned towers themselves, as the paper scores: no heads, global similarities only."""
    num_candidates, scale = len(inputs.candidates.caption_M), settings.rrsitr.scale
    dims = inputs.image_ID.shape[1]
    model = Model(None, Projection.identity(dims), Projection.identity(dims))
    with torch.inference_mode():
        vectors = model.embed(inputs.image_ID, inputs.caption_CD)
        asked = (inputs.pairs.image_N, inputs.pairs.caption_N)
        found = match(*vectors, scale, inputs.candidates, asked)[0]
    columns = columns_of(found, num_candidates)
    relative = columns["relative_loss"]
    given = columns | {
        "weight": divided_weight(relative, settings.clean_at, settings.noisy_at, settings.ambiguous_factor),
        "fused_similarity": columns["similarity"],
        "noise_score": relative,
        "noise_probability": 1 - clean_posterior(relative),
    }
    facts = {"logit_scale": scale, "num_candidates": num_candidates, "local": False}
    return Judgement(given, {}, facts, Trajectory(), model)


def _local_loss(
    local: LocalHeads, image_ITD: Tensor | None, caption_CTD: Tensor | None, inputs: Inputs, scale: float
) -> Tensor:
    """Local contrastive loss of every pair against the fixed candidates, shape [N], nats."""
    assert image_ITD is not None
    assert caption_CTD is not None
    grams = local.all_grams(image_ITD, caption_CTD)
    asked = (inputs.pairs.image_N, inputs.pairs.caption_N)
    return match(*grams, scale, inputs.candidates, asked, transform=rooted)[0].loss
