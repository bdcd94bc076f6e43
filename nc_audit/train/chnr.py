"""CHNR: pairs known to be right teach a discriminator what fits; its verdict weighs the pairs the heads train on.

Three steps. A discriminator learns on the trusted pairs alone (`train_discriminator`). It judges every pair: its
probability c is the detector. Then heads train, first on the trusted pairs, then on all with weights made from c:
hash heads (`train_hash_heads`), or ordinary ones where no codes are asked for.

Where this departs from the authors' published code: scoring runs without dropout; both sides have a second view, made
by leaving features out, because frozen embeddings have no augmented copies, and a step learns from one of the four
combinations unless `all_views` is set; pairs are scored on their plain vectors alone; fakes are never given pairs, and
pairs of one image or caption are no negatives of each other; without classes a fake only needs another image (or
another cluster of images). The probability tells trusted pairs from as many random fakes; it is not calibrated for the
data's rate of noise.

Shapes: I = images; C = captions; N = given pairs; T = trusted pairs; B = batch; K = bits; V = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nc_audit.errors import RecipeError, TrainingError
from nc_audit.methods.contrastive import in_batch_loss, left_out, negatives_mask
from nc_audit.methods.discriminator import (
    Discriminator,
    discriminator_loss,
    draw_fakes,
    fakes_mask,
    joint_vectors,
    mean_over_views,
)
from nc_audit.methods.hashing import (
    HashHeads,
    binary_codes,
    halfway,
    hash_contrastive_loss,
    pair_weight,
    quantisation_loss,
)
from nc_audit.methods.heads import Heads
from nc_audit.methods.matching import Matches, Pairs, match
from nc_audit.model import Model
from nc_audit.recipe import ChnrSection, TrainSection
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

MIN_TRUSTED = 20


def train_chnr(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by a discriminator that learnt on the trusted pairs, and train heads with its weights.

    `trusted_probability` is the discriminator's c; `noise_score` is its logit, negated, and `noise_probability` is
    1 - c: as the method gives it, not calibrated for the rate of noise. The columns of matching come from the heads.
    With `chnr.bits` the model's heads are hash heads and the signs of its embeddings are the codes.

    Raises:
        RecipeError: too few pairs are known to be right, or no fake can be made of them.
        TrainingError: a loss is not finite.
    """
    own, pairs = settings.chnr, inputs.pairs
    trusted_T = _trusted(inputs)
    image_IV, caption_CV = (standardised(side) for side in (inputs.image_head_ID, inputs.caption_head_CD))
    group_I = (
        nearest_centres(image_IV, own.clusters, settings.seed)
        if own.clusters
        else torch.arange(len(image_IV))
    )
    verdict = train_discriminator(
        image_IV, caption_CV, pairs, trusted_T, group_I, own, settings.seed, progress
    )
    probability_N, logit_N = verdict.judge(image_IV, caption_CV, pairs)
    weight_N = pair_weight(probability_N, own.weighting, verdict.threshold)
    division_N = (probability_N < verdict.threshold + verdict.margin).int() + (
        probability_N < verdict.threshold - verdict.margin
    ).int()
    trajectory = Trajectory()
    train_heads = _train_hash_heads if own.bits else _train_plain_heads
    heads, matches = train_heads(inputs, settings, trusted_T, weight_N, division_N, trajectory, progress)
    num = len(inputs.candidates.caption_M)
    given = columns_of(matches, num) | {
        "weight": weight_N,
        "noise_score": -logit_N,
        "noise_probability": 1 - probability_N,
        "trusted_probability": probability_N,
    }
    facts = {
        "logit_scale": heads.scale().item(),
        "num_candidates": num,
        "trusted_pairs": len(trusted_T),
        "threshold": verdict.threshold,
    } | ({"bits": own.bits} if own.bits else {})
    return Judgement(
        given, {}, facts, trajectory, Model(heads, inputs.image_projection, inputs.caption_projection)
    )


def _trusted(inputs: Inputs) -> Tensor:
    """Positions of the trusted pairs, shape [T]."""
    none = torch.zeros(0, dtype=torch.long)
    found = none if inputs.trusted_N is None else inputs.trusted_N.nonzero().squeeze(1)
    if len(found) < MIN_TRUSTED:
        raise RecipeError(
            f"method chnr learns from pairs known to be right: {len(found):,} of {len(inputs.pairs):,} are,"
            f" it takes {MIN_TRUSTED}",
            "name more with --trusted FILE, or keep some in a review",
        )
    return found


def standardised(vectors: Tensor) -> Tensor:
    """Vectors by one mean and one standard deviation of all their values, as the method takes them in."""
    vectors = vectors.float()
    return (vectors - vectors.mean()) / vectors.std().clamp_min(1e-12)


def nearest_centres(vectors_IV: Tensor, num: int, seed: int, rounds: int = 20) -> Tensor:
    """The cluster of each vector by k-means from randomly drawn vectors, shape [I], 0..num-1."""
    generator = torch.Generator().manual_seed(seed)
    centres = vectors_IV[torch.randperm(len(vectors_IV), generator=generator)[:num]].clone()
    at = torch.zeros(len(vectors_IV), dtype=torch.long)
    for _ in range(rounds):
        at = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors_IV.split(16_384)])
        counts = torch.bincount(at, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, at, vectors_IV)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return at


# --- the discriminator ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A trained discriminator.

    Attributes:
        network: in evaluation mode.
        threshold: middle between the mean c of real pairs and of fakes in the last pass of training, dropout running,
            0..1.
        margin: a quarter of the distance of those means, 0 at least.
    """

    network: Discriminator
    threshold: float
    margin: float

    @torch.no_grad()
    def judge(self, image_IV: Tensor, caption_CV: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Probability c of fitting (0..1) and logit of every pair, each of shape [N]; higher = cleaner."""
        parts = zip(pairs.image_N.split(16_384), pairs.caption_N.split(16_384), strict=True)
        judged = [mean_over_views(self.network, [image_IV[i]], [caption_CV[c]]) for i, c in parts]
        return torch.cat([p for p, _ in judged]), torch.cat([logit for _, logit in judged])


def train_discriminator(
    image_IV: Tensor,
    caption_CV: Tensor,
    pairs: Pairs,
    trusted_T: Tensor,
    group_I: Tensor,
    settings: ChnrSection,
    seed: int,
    progress: Progress = silent,
) -> Verdict:
    """A discriminator of the trusted pairs against fakes made of them.

    Args:
        image_IV: image vectors, standardised, shape [I, V].
        caption_CV: caption vectors, standardised, shape [C, V'].
        pairs: all given pairs, none of which is a fake.
        trusted_T: positions of the trusted ones, shape [T].
        group_I: class or cluster of each image, shape [I]; a fake takes its caption from another group.
        settings: the `discriminator_` keys, `view_dropout`, `all_views` and `penalty`.
        seed: of initialisation, dropout, batches, fakes and views.
        progress: told every few steps.

    Raises:
        RecipeError: no fake can be made of the trusted pairs.
        TrainingError: the loss is not finite.
    """
    given = (pairs.image_N * pairs.num_captions + pairs.caption_N).sort().values
    generator = torch.Generator().manual_seed(seed + 20)
    batches = _batches(len(trusted_T), settings.discriminator_batch, generator)
    per_pass = max(1, len(trusted_T) // settings.discriminator_batch)
    real: list[Tensor] = []
    fake: list[Tensor] = []
    with seeded(seed + 20):
        network = Discriminator(
            image_IV.shape[1] + caption_CV.shape[1],
            settings.discriminator_hidden,
            settings.discriminator_dropout,
        )
        optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=settings.discriminator_lr,
            betas=(0.5, 0.9),
            weight_decay=settings.discriminator_decay,
            fused=True,
        )
        network.train()
        for step in range(settings.discriminator_steps):
            at = trusted_T[next(batches)]
            image, caption = pairs.image_N[at], pairs.caption_N[at]
            mask = fakes_mask(image, caption, group_I[image], given, pairs.num_captions)
            fake_at = draw_fakes(mask, generator)
            if not len(fake_at[0]):
                raise RecipeError(
                    f"the {len(trusted_T):,} trusted pairs are too alike: no caption of one makes a wrong caption"
                    " of another",
                    "trust pairs of more images, or lower train.chnr.clusters",
                )
            image_BV, caption_BV = image_IV[image], caption_CV[caption]
            images = _views(image_BV, settings.view_dropout, generator)
            captions = _views(caption_BV, settings.view_dropout, generator)
            if not settings.all_views:
                images, captions = _one_of(images, generator), _one_of(captions, generator)
            loss = discriminator_loss(network, images, captions, fake_at, generator, settings.penalty)
            _step(loss, optimiser, f"discriminator step {step}", "train.chnr.discriminator_lr")
            if step >= settings.discriminator_steps - per_pass:
                with torch.no_grad():
                    real.append(network(joint_vectors(image_BV, caption_BV)).sigmoid())
                    made_up = joint_vectors(image_BV[fake_at[0]], caption_BV[fake_at[1]])
                    fake.append(network(made_up).sigmoid())
            if step % 10 == 9 or step == settings.discriminator_steps - 1:
                progress("discriminator", step + 1, settings.discriminator_steps)
    threshold, half = halfway(torch.cat(real), torch.cat(fake))
    return Verdict(network.eval(), threshold, max(0.0, half / 2))


def _views(vectors_BV: Tensor, dropout: float, generator: torch.Generator) -> list[Tensor]:
    """The vectors, and beside them a copy with features left out and the others enlarged to make up for it."""
    if not dropout:
        return [vectors_BV]
    kept = torch.rand(vectors_BV.shape, generator=generator) >= dropout
    return [vectors_BV, vectors_BV * kept / (1 - dropout)]


def _one_of(views: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """One of the views, drawn."""
    return [views[int(torch.randint(len(views), (1,), generator=generator))]]


def _batches(num: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions 0..num-1 in random batches for ever; a last, smaller batch of a pass is left out."""
    batch = min(batch, num)
    while True:
        order = torch.randperm(num, generator=generator)
        yield from order[: num // batch * batch].split(batch)


def _step(loss: Tensor, optimiser: torch.optim.Optimizer, where: str, key: str) -> None:
    if not torch.isfinite(loss):
        lr = optimiser.param_groups[0]["lr"]
        raise TrainingError(f"loss is {loss.item()} at {where} (lr {lr:.2g})", f"lower {key}")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


# --- hash heads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Some epochs on some pairs with fixed weights, shape [N] as the pairs."""

    pairs: Pairs
    weight_N: Tensor
    epochs: int
    steps_per_epoch: int
    batch: int


def train_hash_heads(
    image_IV: Tensor,
    caption_CV: Tensor,
    phases: Sequence[Phase],
    settings: ChnrSection,
    seed: int,
    after_epoch: Callable[[HashHeads, int], None] | None = None,
) -> HashHeads:
    """Hash heads trained through some phases.

    The learning rate starts at .8 of `lr` and falls to .8 of itself after each third of the epochs, as published. The
    bits that the quantisation pulls a pair to are renewed whenever the pair is seen, and random before.

    Args:
        image_IV: image vectors, shape [I, V].
        caption_CV: caption vectors, shape [C, V'].
        phases: one after the other.
        settings: `bits`, `hidden`, `lr`, `weight_decay`, `temperature`, `quantisation`.
        seed: of initialisation, batches and first bits.
        after_epoch: told the heads as they stand and the epoch, counted from 0 through all phases.

    Raises:
        TrainingError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed + 30)
    with seeded(seed + 30):
        heads = HashHeads(
            image_IV.shape[1], caption_CV.shape[1], settings.bits, settings.hidden, 1 / settings.temperature
        )
    optimiser = torch.optim.Adam(
        heads.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    epoch, epochs = 0, sum(phase.epochs for phase in phases)
    for phase in phases:
        pairs, batches = phase.pairs, _batches(len(phase.pairs), phase.batch, generator)
        bits = torch.randint(0, 2, (len(pairs), settings.bits), generator=generator).float() * 2 - 1
        for _ in range(phase.epochs):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * 0.8 ** (1 + 3 * epoch // epochs)
            heads.train()
            for _ in range(phase.steps_per_epoch):
                at = next(batches)
                image, caption = pairs.image_N[at], pairs.caption_N[at]
                image_code, caption_code = heads.image(image_IV[image]), heads.caption(caption_CV[caption])
                counts = negatives_mask(image, caption)
                contrast = hash_contrastive_loss(
                    image_code, caption_code, phase.weight_N[at], counts, settings.temperature
                )
                loss = (
                    contrast.sum()
                    + settings.quantisation * quantisation_loss(bits[at], [image_code, caption_code]).sum()
                )
                _step(loss, optimiser, f"epoch {epoch + 1}", "train.chnr.lr")
                bits[at] = binary_codes(image_code.detach() + caption_code.detach()).float()
            if after_epoch is not None:
                after_epoch(heads, epoch)
            epoch += 1
    return heads.eval()


def _train_hash_heads(
    inputs: Inputs,
    settings: TrainSection,
    trusted_T: Tensor,
    weight_N: Tensor,
    division_N: Tensor,
    trajectory: Trajectory,
    progress: Progress,
) -> tuple[HashHeads, Matches]:
    """Hash heads on trusted pairs, then on all by weight; what the last ones say of every pair."""
    plan, pairs = Plan.of(len(inputs.pairs), settings), inputs.pairs
    trusted = pairs.select(trusted_T)
    meta = int(settings.chnr.meta_share * plan.epochs)
    phases = [
        Phase(trusted, torch.ones(len(trusted)), meta, plan.steps_per_epoch, plan.batch),
        Phase(pairs, weight_N, plan.epochs - meta, plan.steps_per_epoch, plan.batch),
    ]
    in_meta_N = torch.zeros(len(pairs)).index_fill_(0, trusted_T, 1.0)
    found: list[Matches] = []

    def after_epoch(heads: HashHeads, epoch: int) -> None:
        vectors = heads.embed(inputs.image_head_ID, inputs.caption_head_CD)
        asked = (pairs.image_N, pairs.caption_N)
        found[:] = match(*vectors, heads.scale().item(), inputs.candidates, asked)
        trajectory.record(found[0].loss, in_meta_N if epoch < meta else weight_N, division_N)
        progress("train", epoch + 1, plan.epochs)

    heads = train_hash_heads(
        inputs.image_head_ID, inputs.caption_head_CD, phases, settings.chnr, settings.seed, after_epoch
    )
    return heads, found[0]


def _train_plain_heads(
    inputs: Inputs,
    settings: TrainSection,
    trusted_T: Tensor,
    weight_N: Tensor,
    division_N: Tensor,
    trajectory: Trajectory,
    progress: Progress,
) -> tuple[Heads, Matches]:
    """Ordinary heads in the same two phases."""
    plan, pairs = Plan.of(len(inputs.pairs), settings), inputs.pairs
    meta = int(settings.chnr.meta_share * plan.epochs)
    in_meta_N = torch.zeros(len(pairs)).index_fill_(0, trusted_T, 1.0)
    with seeded(settings.seed + 30):
        trainer = Trainer(
            new_heads(inputs, settings),
            inputs,
            pairs,
            plan,
            settings,
            settings.weight_decay,
            settings.seed + 30,
        )
        main = trainer.batches
        generator = torch.Generator().manual_seed(settings.seed + 31)
        first = (trusted_T[at] for at in _batches(len(trusted_T), plan.batch, generator))
        matches = Matches.zeros(len(pairs))
        for epoch in range(plan.epochs):
            epoch_weight_N = in_meta_N if epoch < meta else weight_N
            trainer.batches = first if epoch < meta else main
            trainer.run_epoch(partial(_weighted_loss, trainer, epoch_weight_N))
            matches = trainer.matches()
            trajectory.record(matches.loss, epoch_weight_N, division_N)
            progress("train", epoch + 1, plan.epochs)
    return trainer.heads.eval(), matches


def _weighted_loss(trainer: Trainer, weight_N: Tensor, at_B: Tensor) -> Tensor:
    """Mean of the batch's contrastive losses by weight, a scalar."""
    cosine_BB, image, caption = trainer.cosines(at_B)
    loss_B = in_batch_loss(trainer.heads.scale() * cosine_BB, left_out(image, caption))
    weight_B = weight_N[at_B]
    return (weight_B * loss_B).sum() / weight_B.sum().clamp_min(1e-6)
