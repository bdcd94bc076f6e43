"""Stage 3, train: short robust training of small heads over frozen embeddings, on the audited pairs themselves.

No clean labels are needed. What keeps noise from being learnt:

1. A first posterior from the embeddings alone (`first_look`): the mutual-information variation of each pair,
   fitted on other images and reweighted a few times, with a probability calibrated on known swaps.
2. Heads that never score what they trained on (`train_folds`): K pairs of heads in lockstep, each leaving out
   one fold. After every epoch the held-out loss of each pair sets its self-paced weight for the next.
3. Final heads (`train_final`) on all pairs, with known swaps planted among them: swaps that sat in training
   like any noise score like noise that did, and so calibrate in-sample scores.

Shapes: I = images; C = captions; N = pairs; S = swaps; M = candidates; B = batch; D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nc_audit.errors import DatasetError, TrainingError
from nc_audit.methods import contrastive, known_swaps, self_paced
from nc_audit.methods.mutual_information import GaussianDependence
from nc_audit.recipe import TrainSection

MIN_PAIRS = 24


@dataclass(frozen=True)
class Pairs:
    """Distinct pairs as indices into distinct images and captions, all in canonical order."""

    image_N: Tensor
    caption_N: Tensor
    num_images: int
    num_captions: int

    def __len__(self) -> int:
        return len(self.image_N)

    def select(self, at: Tensor) -> Pairs:
        """Some of the pairs, over the same images and captions."""
        return Pairs(self.image_N[at], self.caption_N[at], self.num_images, self.num_captions)


@dataclass(frozen=True)
class Evidence:
    """One quantity on the given pairs and on the known swaps; higher = noisier."""

    given_N: Tensor
    swaps_S: Tensor

    def standardised(self) -> Evidence:
        """Both in standard deviations of the swaps."""
        return Evidence(
            known_swaps.standardise(self.given_N, self.swaps_S), known_swaps.standardise(self.swaps_S, self.swaps_S)
        )

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.given_N + other.given_N, self.swaps_S + other.swaps_S)

    def rate(self) -> float:
        """Noise rate by the swaps' tails, 0..1."""
        return known_swaps.noise_rate(self.given_N, self.swaps_S)

    def posterior(self, rate: float) -> Evidence:
        """Noise probability of given pairs and swaps, float32, 0..1."""
        given, swaps = known_swaps.noise_posterior(self.given_N, self.swaps_S, rate)
        return Evidence(given.float(), swaps.float())


def fused(*evidence: Evidence) -> Evidence:
    """Plain sum of standardised evidence."""
    total = evidence[0].standardised()
    for one in evidence[1:]:
        total = total + one.standardised()
    return total


# --- inputs -----------------------------------------------------------------------------------------------


def principal_components(vectors_ND: Tensor, num: int, sample: int = 50_000) -> tuple[Tensor, Tensor]:
    """Scores on the leading principal axes of standardised vectors, and the axes' standard deviations.

    Args:
        vectors_ND: shape [N, D].
        num: how many components at most.
        sample: the axes are found on an even subset of at most this many rows.

    Returns:
        Scores, shape [N, K], unit variance each; standard deviations, shape [K], descending. K <= num, D and N - 1.
    """
    step = max(1, math.ceil(len(vectors_ND) / sample))
    part = vectors_ND[::step].double()
    mean, spread = part.mean(0), part.std(0, correction=0)
    spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-12), spread, torch.inf)
    part = (part - mean) / spread
    variances, axes = torch.linalg.eigh(part.T @ part / len(part))
    variances, axes = variances.flip(0), axes.flip(1)
    usable = int((variances > 1e-6 * variances[0]).sum())
    keep = max(1, min(num, usable, len(vectors_ND) - 1))
    variances, axes = variances[:keep].clamp_min(1e-12), axes[:, :keep]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    projection = (axes / variances.sqrt()).float()
    scores = ((vectors_ND - mean.float()) / spread.float()) @ projection
    return scores, variances.sqrt().float()


def spread_components(vectors_ND: Tensor, num: int) -> Tensor:
    """Principal components, partly whitened: each scaled by the square root of its relative deviation.

    Returns:
        Shape [N, K]: what the heads take in.
    """
    scores, deviations = principal_components(vectors_ND, num)
    return scores * (deviations / deviations[0]).sqrt()


def assign_folds(group_N: Tensor, num_folds: int, generator: torch.Generator) -> Tensor:
    """A fold per pair, equal for pairs of one group, folds of nearly equal numbers of groups.

    Returns:
        Shape [N], 0..num_folds-1.
    """
    groups, inverse = group_N.unique(return_inverse=True)
    order = torch.randperm(len(groups), generator=generator)
    return (order % num_folds)[inverse]


# --- 1. a first look --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstLook:
    """What the embeddings alone say of each pair."""

    evidence: Evidence
    variation_N: Tensor
    rate: float
    posterior_N: Tensor


def first_look(
    image_ID: Tensor, caption_CD: Tensor, pairs: Pairs, swap_caption_S: Tensor, settings: TrainSection, seed: int
) -> FirstLook:
    """Mutual-information variation of each pair, out of fold by image, reweighted towards the clean pairs.

    Args:
        image_ID: image embeddings, shape [I, D].
        caption_CD: caption embeddings, shape [C, D'].
        pairs: the given pairs.
        swap_caption_S: caption of the known swap of each pair's image, shape [N].
        settings: `first_look_dims`, `first_look_folds`, `first_look_rounds`, `shrinkage`.
        seed: draws the folds.

    Returns:
        Evidence (higher = noisier), the raw variation (nats, higher = agree), the rate and the posterior.
    """
    generator = torch.Generator().manual_seed(seed)
    fold_N = assign_folds(pairs.image_N, settings.first_look_folds, generator)
    total: Evidence | None = None
    variation_N = torch.zeros(len(pairs))
    cap = max(2, len(pairs) // 12)
    dims = sorted({min(d, cap) for d in settings.first_look_dims})
    for num in dims:
        image = principal_components(image_ID, num)[0]
        caption = principal_components(caption_CD, num)[0]
        one, raw = _variation_rounds(image, caption, pairs, swap_caption_S, fold_N, settings)
        total = one.standardised() if total is None else total + one.standardised()
        variation_N = variation_N + raw / len(dims)
    assert total is not None
    rate = total.rate()
    return FirstLook(total, variation_N, rate, total.posterior(rate).given_N)


def _variation_rounds(
    image_IK: Tensor, caption_CK: Tensor, pairs: Pairs, swap_caption_S: Tensor, fold_N: Tensor, settings: TrainSection
) -> tuple[Evidence, Tensor]:
    weight_N = torch.ones(len(pairs))
    evidence = Evidence(torch.zeros(len(pairs)), torch.zeros(len(pairs)))
    for _ in range(settings.first_look_rounds):
        given, swaps = torch.empty(len(pairs)), torch.empty(len(pairs))
        for fold in range(settings.first_look_folds):
            inside, outside = (fold_N == fold).nonzero().squeeze(1), (fold_N != fold).nonzero().squeeze(1)
            fit = outside[:: max(1, math.ceil(len(outside) / 200_000))]
            dependence = GaussianDependence(
                image_IK[pairs.image_N[fit]], caption_CK[pairs.caption_N[fit]], weight_N[fit], settings.shrinkage
            )
            for part in inside.split(65_536):
                image = image_IK[pairs.image_N[part]]
                given[part] = dependence.variation(image, caption_CK[pairs.caption_N[part]])
                swaps[part] = dependence.variation(image, caption_CK[swap_caption_S[part]])
        evidence = Evidence(-given, -swaps)
        weight_N = 1 - evidence.posterior(evidence.rate()).given_N + 0.001
    return evidence, -evidence.given_N


# --- 2. heads ---------------------------------------------------------------------------------------------


class Head(nn.Module):
    """One side's head: a linear map plus a small two-layer correction, to unit vectors."""

    def __init__(self, num_inputs: int, width: int, hidden: int, input_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_inputs)
        self.input_dropout = nn.Dropout(input_dropout)
        self.linear = nn.Linear(num_inputs, width)
        self.correction = nn.Sequential(
            nn.Linear(num_inputs, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Unit vectors, shape [B, width]."""
        inputs = self.input_dropout(self.norm(vectors_BD))
        return functional.normalize(self.linear(inputs) + self.correction(inputs), dim=1)


class Heads(nn.Module):
    """Image and caption head with a learnt logit scale."""

    def __init__(self, num_image: int, num_caption: int, settings: TrainSection, input_dropout: float) -> None:
        super().__init__()
        sizes = (settings.width, settings.hidden, input_dropout, settings.dropout)
        self.image = Head(num_image, *sizes)
        self.caption = Head(num_caption, *sizes)
        self.log_scale = nn.Parameter(torch.tensor(settings.log_scale))
        self.max_log_scale = math.log(settings.max_scale)

    def scale(self) -> Tensor:
        """Logit scale, a factor."""
        return self.log_scale.clamp(0.0, self.max_log_scale).exp()

    @torch.no_grad()
    def embed(self, image_ID: Tensor, caption_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of all images and captions, in evaluation mode: shapes [I, width], [C, width]."""
        was_training = self.training
        self.eval()
        image = torch.cat([self.image(part) for part in image_ID.split(16_384)])
        caption = torch.cat([self.caption(part) for part in caption_CD.split(16_384)])
        self.train(was_training)
        return image, caption


class _Trainer:
    """One pair of heads in training: its pairs, its optimiser, its place in the schedule."""

    def __init__(
        self,
        heads: Heads,
        pairs: Pairs,
        image_ID: Tensor,
        caption_CD: Tensor,
        plan: Plan,
        weight_decay: float,
        seed: int,
        settings: TrainSection,
    ) -> None:
        self.heads, self.pairs, self.plan = heads, pairs, plan
        self.image_ID, self.caption_CD = image_ID, caption_CD
        self.generator = torch.Generator().manual_seed(seed)
        matrices = [p for p in heads.parameters() if p.dim() > 1]
        others = [p for p in heads.parameters() if p.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=settings.lr, total_steps=plan.steps + 1, pct_start=settings.warm_up
        )
        self.batches = self._batches()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.pairs), generator=self.generator)
            for start in range(0, len(order) - self.plan.batch + 1, self.plan.batch):
                yield order[start : start + self.plan.batch]

    def run_epoch(self, weight_N: Tensor) -> None:
        self.heads.train()
        for step in range(self.plan.steps_per_epoch):
            at = next(self.batches)
            image, caption = self.pairs.image_N[at], self.pairs.caption_N[at]
            logits = self.heads.scale() * self.heads.image(self.image_ID[image]) @ self.heads.caption(
                self.caption_CD[caption]
            ).T
            losses = contrastive.in_batch_loss(logits, contrastive.negatives_mask(image, caption))
            loss = (weight_N[at] * losses).mean()
            if not torch.isfinite(loss):
                lr = self.schedule.get_last_lr()[0]
                raise TrainingError(f"loss is {loss.item()} at step {step} (lr {lr:.2g})", "lower train.lr")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()


@dataclass(frozen=True)
class Plan:
    """How long one pair of heads trains."""

    batch: int
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps_per_epoch

    @classmethod
    def of(cls, num_pairs: int, settings: TrainSection) -> Plan:
        """A plan of `settings.steps` steps, whatever the number of pairs."""
        batch = settings.batch or (512 if num_pairs < 10_000 else 1024)
        batch = max(8, min(batch, num_pairs // 4))
        epochs = settings.epochs
        return cls(batch, epochs, max(1, round(settings.steps / epochs)))


@dataclass(frozen=True)
class Candidates:
    """The fixed captions and images that every pair is scored against, and which are no negatives."""

    caption_M: Tensor
    image_M: Tensor
    own_caption: tuple[Tensor, Tensor]
    own_image: tuple[Tensor, Tensor]
    position_of_caption_C: Tensor
    position_of_image_I: Tensor

    @classmethod
    def draw(cls, pairs: Pairs, num: int, generator: torch.Generator) -> Candidates:
        """`num` random captions and images, or all where there are fewer."""
        caption_M = torch.randperm(pairs.num_captions, generator=generator)[:num].sort().values
        image_M = torch.randperm(pairs.num_images, generator=generator)[:num].sort().values
        caption_at = torch.full((pairs.num_captions,), -1, dtype=torch.long)
        caption_at[caption_M] = torch.arange(len(caption_M))
        image_at = torch.full((pairs.num_images,), -1, dtype=torch.long)
        image_at[image_M] = torch.arange(len(image_M))
        c, i = caption_at[pairs.caption_N], image_at[pairs.image_N]
        return cls(
            caption_M,
            image_M,
            (pairs.image_N[c >= 0], c[c >= 0]),
            (pairs.caption_N[i >= 0], i[i >= 0]),
            caption_at,
            image_at,
        )


@dataclass(frozen=True)
class Matches:
    """What scoring against candidates gives, per pair."""

    similarity: Tensor
    loss: Tensor
    energy: Tensor
    image_entropy: Tensor
    caption_entropy: Tensor


@dataclass
class _Side:
    """One direction's normaliser over the candidates, per query: log-sum-exp and softmax mean of the logits."""

    logsumexp: Tensor
    mean_logit: Tensor


def _one_side(query_QD: Tensor, candidate_MD: Tensor, own: tuple[Tensor, Tensor], scale: float) -> _Side:
    query, position = own
    order = query.argsort(stable=True)
    query, position = query[order], position[order]
    lse, mean = [], []
    start = 0
    for part in query_QD.split(4096):
        logits = scale * part @ candidate_MD.T
        low, high = torch.searchsorted(query, torch.tensor([start, start + len(part)])).tolist()
        logits[query[low:high] - start, position[low:high]] = float("-inf")
        top = logits.logsumexp(1)
        share = (logits - top[:, None]).exp_()
        mean.append((share * logits.masked_fill_(share == 0, 0.0)).sum(1))
        lse.append(top)
        start += len(part)
    return _Side(torch.cat(lse), torch.cat(mean))


def match(
    image_ID: Tensor, caption_CD: Tensor, scale: float, candidates: Candidates, image_N: Tensor, caption_N: Tensor
) -> Matches:
    """Score pairs of images and captions, given or swapped, against the fixed candidates.

    The own match counts once, the other captions of the image and the other images of the caption not at all.

    Args:
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        scale: logit scale, a factor.
        candidates: what to score against.
        image_N: image of each pair to score, shape [N].
        caption_N: caption of each pair to score, shape [N].

    Returns:
        Similarity (-1..1), loss and energy (nats), match entropies (0..1), each of shape [N].
    """
    by_image = _one_side(image_ID, caption_CD[candidates.caption_M], candidates.own_caption, scale)
    by_caption = _one_side(caption_CD, image_ID[candidates.image_M], candidates.own_image, scale)
    similarity = torch.cat(
        [
            (image_ID[i] * caption_CD[c]).sum(1)
            for i, c in zip(image_N.split(65_536), caption_N.split(65_536), strict=True)
        ]
    )
    own = scale * similarity
    num_captions, num_images = len(candidates.caption_M), len(candidates.image_M)
    caption_side = _with_own(by_image, image_N, own, candidates, caption_N, of_captions=True)
    image_side = _with_own(by_caption, caption_N, own, candidates, image_N, of_captions=False)
    return Matches(
        similarity,
        (caption_side[0] + image_side[0]) / 2 - own,
        -(caption_side[0] + image_side[0]) / 2,
        (caption_side[1] / math.log(max(2, num_captions))).clamp(0.0, 1.0),
        (image_side[1] / math.log(max(2, num_images))).clamp(0.0, 1.0),
    )


def _with_own(
    side: _Side, query_N: Tensor, own_N: Tensor, candidates: Candidates, other_N: Tensor, *, of_captions: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy with the own match among the candidates exactly once."""
    at = candidates.position_of_caption_C if of_captions else candidates.position_of_image_I
    owned = candidates.own_caption if of_captions else candidates.own_image
    lse, mean = side.logsumexp[query_N], side.mean_logit[query_N]
    # A swap's caption may itself be a candidate that is not masked for this query; then it is already counted.
    masked_keys = (owned[0] * len(at) + owned[1]).unique()
    keys = query_N * len(at) + at[other_N]
    found = torch.searchsorted(masked_keys, keys).clamp_max(max(0, len(masked_keys) - 1))
    is_masked = masked_keys[found] == keys if len(masked_keys) else torch.zeros_like(keys, dtype=torch.bool)
    counted = (at[other_N] >= 0) & ~is_masked
    total = torch.where(counted, lse, torch.logaddexp(lse, own_N))
    rest = torch.where(torch.isfinite(lse), (lse - total).exp() * mean, 0.0)
    expected = torch.where(counted, mean, rest + (own_N - total).exp() * own_N)
    return total, total - expected


# --- 3. the whole -----------------------------------------------------------------------------------------


@dataclass
class Folds:
    """Out-of-fold results: what heads say of pairs they never trained on."""

    loss: Evidence
    distance: Evidence
    trajectory_EN: Tensor
    weight_EN: Tensor
    division_EN: Tensor
    scales: list[float] = field(default_factory=list)


Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


def train_folds(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    swap_caption_S: Tensor,
    prior_N: Tensor,
    group_N: Tensor,
    candidates: Candidates,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Folds:
    """Train K pairs of heads in lockstep and score every pair by the heads that left its fold out.

    Args:
        image_ID: head inputs of all images, shape [I, D].
        caption_CD: head inputs of all captions, shape [C, D'].
        pairs: the given pairs.
        swap_caption_S: caption of each pair's known swap, shape [N].
        prior_N: weight of each pair before any loss is known, shape [N], 0..1.
        group_N: pairs of one group share a fold, shape [N].
        candidates: what every pair is scored against.
        settings: the recipe's `train` section.
        seed: initialisation, folds, batches, dropout.
        progress: told the epoch.

    Returns:
        Held-out loss and cosine distance, averaged over the later epochs, on given pairs and swaps; per epoch
        the held-out loss, the weight the next epoch gives and the division.
    """
    generator = torch.Generator().manual_seed(seed)
    fold_N = assign_folds(group_N, settings.folds, generator)
    inside = [(fold_N == k).nonzero().squeeze(1) for k in range(settings.folds)]
    outside = [(fold_N != k).nonzero().squeeze(1) for k in range(settings.folds)]
    plan = Plan.of(min(len(o) for o in outside), settings)
    chance = math.log(len(candidates.caption_M))
    given_sum, given_cos = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    swap_sum, swap_cos = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    trajectory, weights, divisions = [], [], []
    weight_N = prior_N.clone()
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainers = [
            _Trainer(
                Heads(image_ID.shape[1], caption_CD.shape[1], settings, settings.input_dropout),
                pairs.select(outside[k]),
                image_ID,
                caption_CD,
                plan,
                settings.weight_decay,
                seed + 1 + k,
                settings,
            )
            for k in range(settings.folds)
        ]
        for epoch in range(1, plan.epochs + 1):
            loss_N = torch.empty(len(pairs))
            counts = epoch >= settings.first_counted_epoch
            for k, trainer in enumerate(trainers):
                train_weight = weight_N[outside[k]]
                trainer.run_epoch(train_weight / train_weight.mean().clamp_min(1e-9))
                image, caption = trainer.heads.embed(image_ID, caption_CD)
                scale = float(trainer.heads.scale())
                at = inside[k]
                given = match(image, caption, scale, candidates, pairs.image_N[at], pairs.caption_N[at])
                loss_N[at] = given.loss
                if counts:
                    swaps = match(image, caption, scale, candidates, pairs.image_N[at], swap_caption_S[at])
                    given_sum[at] += given.loss
                    given_cos[at] -= given.similarity
                    swap_sum[at] += swaps.loss
                    swap_cos[at] -= swaps.similarity
            counted += counts
            relative = loss_N / chance
            weight_N = prior_N * pace(relative, epoch, plan.epochs, settings)
            trajectory.append(loss_N)
            weights.append(weight_N)
            divisions.append(self_paced.divide(relative, settings.clean_at, settings.noisy_at))
            progress("train", epoch, plan.epochs)
    return Folds(
        Evidence(given_sum / counted, swap_sum / counted),
        Evidence(given_cos / counted, swap_cos / counted),
        torch.stack(trajectory),
        torch.stack(weights),
        torch.stack(divisions),
        [float(t.heads.scale()) for t in trainers],
    )


def pace(relative_loss_N: Tensor, epoch: int, epochs: int, settings: TrainSection) -> Tensor:
    """Self-paced weight for the next epoch from the held-out relative loss.

    Returns:
        Shape [N], 0..1; all 1 while the heads still warm up.
    """
    if settings.pace == "none" or epoch < settings.pace_from:
        return torch.ones_like(relative_loss_N)
    if settings.pace == "divided":
        return self_paced.divided_weight(
            relative_loss_N, settings.clean_at, settings.noisy_at, settings.ambiguous_factor
        )
    return self_paced.pace_weight(relative_loss_N, settings.noisy_at)


@dataclass(frozen=True)
class Final:
    """Heads trained on everything, with in-sample evidence on the given pairs and on the planted swaps."""

    heads: Heads
    loss: Evidence
    distance: Evidence


def train_final(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    planted: Pairs,
    weight_N: Tensor,
    planted_weight_P: Tensor,
    candidates: Candidates,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Final:
    """Train one pair of heads on all given pairs and on planted swaps, and score both in sample.

    Args:
        image_ID: head inputs of all images, shape [I, D].
        caption_CD: head inputs of all captions, shape [C, D'].
        pairs: the given pairs.
        planted: known swaps that sit in training as noise does.
        weight_N: weight of each given pair, shape [N], 0..1.
        planted_weight_P: weight of each planted swap, by the same rule, shape [P], 0..1.
        candidates: what every pair is scored against.
        settings: the recipe's `train` section.
        seed: initialisation, batches, dropout.
        progress: told the epoch.

    Returns:
        The heads; loss and cosine distance, averaged over the later epochs.
    """
    together = Pairs(
        torch.cat([pairs.image_N, planted.image_N]),
        torch.cat([pairs.caption_N, planted.caption_N]),
        pairs.num_images,
        pairs.num_captions,
    )
    weights = torch.cat([weight_N, planted_weight_P])
    weights = weights / weights.mean().clamp_min(1e-9)
    plan = Plan.of(len(together), settings)
    loss, distance = torch.zeros(len(together)), torch.zeros(len(together))
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(image_ID.shape[1], caption_CD.shape[1], settings, settings.final_input_dropout)
        trainer = _Trainer(
            heads, together, image_ID, caption_CD, plan, settings.final_weight_decay, seed + 1, settings
        )
        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch(weights)
            if epoch >= settings.first_counted_epoch:
                image, caption = heads.embed(image_ID, caption_CD)
                found = match(
                    image, caption, float(heads.scale()), candidates, together.image_N, together.caption_N
                )
                loss += found.loss
                distance -= found.similarity
                counted += 1
            progress("train on everything", epoch, plan.epochs)
    heads.eval()
    num = len(pairs)
    return Final(
        heads,
        Evidence(loss[:num] / counted, loss[num:] / counted),
        Evidence(distance[:num] / counted, distance[num:] / counted),
    )
