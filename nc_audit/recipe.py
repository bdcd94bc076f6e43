"""A recipe: every setting of an audit, in TOML, checked as a whole before any work starts.

Recipes are layered: the built-in defaults, then each `--recipe`, then `--set section.key=value`; later ones win,
key by key. Unknown keys and wrong values are all reported at once, each with the nearest known key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nc_audit.errors import RecipeError, nearest
from nc_audit.run import digest_of


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DatasetSection(_Section):
    """How the dataset is read."""

    image_root: str | None = Field(
        None, description="folder that holds the images when the dataset's own does not"
    )
    image_column: str | None = Field(None, description="column with the image; guessed when not given")
    caption_column: str | None = Field(None, description="column with the caption; guessed when not given")
    subset: str | None = Field(None, description="audit this subset of those the dataset's card lists")
    split: str | None = Field(None, description="audit this split only")
    limit: int | None = Field(None, ge=1, description="audit the first rows only")
    trusted: str | None = Field(None, description="file of pairs known to be right")
    allow_network: bool = Field(
        False, description="fetch a dataset of the hub or a bucket, and images given by http or https URL"
    )


class ImageSection(_Section):
    """The frozen image encoder."""

    encoder: str = Field(
        "auto", description="auto, builtin, patches, timm:MODEL, open_clip:MODEL/PRETRAINED or MODEL@FILE"
    )
    weights: str | None = Field(None, description="local weights of a timm model")
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of timm.create_model"
    )
    mean: tuple[float, float, float] | float | None = Field(
        None, description="channel means of the input, 0..1"
    )
    std: tuple[float, float, float] | float | None = Field(
        None, description="channel deviations of the input"
    )
    size: int | None = Field(None, ge=16, le=4096, description="input side in pixels")
    batch: int = Field(
        0, ge=0, description="images per batch; 0 = by the device; halved when memory runs out"
    )


class TextSection(_Section):
    """The frozen text encoder."""

    encoder: str = Field("auto", description="auto, builtin, tfidf, open_clip:MODEL/PRETRAINED or MODEL@FILE")
    weights: str | None = Field(None, description="local weights of the text encoder")


class RrsitrSection(_Section):
    """RRSITR: division, both self-paced weights, robust triplet loss."""

    triplet_factor: float = Field(0.9, ge=0, description="lambda_2, weight of the robust triplet loss")
    margin: float = Field(0.6, gt=0, description="sigma, base margin of the robust triplet loss")
    fusion: float = Field(0.9, ge=0, le=1, description="alpha, share of the global similarity at inference")
    scale: float = Field(20.0, gt=1, description="kappa, fixed logit scale")
    warm_up_epochs: int = Field(
        2, ge=0, description="epochs of plain contrastive loss, since heads start at chance"
    )
    self_paced: bool = Field(True, description="false: weights stay 1 within each region")
    ambiguous: bool = Field(True, description="false: no ambiguous class, all above clean_at is noisy")
    triplet: bool = Field(True, description="false: noisy pairs are left out")
    local: bool = Field(True, description="use local similarities where the encoders expose tokens")
    local_mean: bool = Field(
        True, description="local similarity as root mean square cosine; false: the published unbounded sum"
    )


class SremSection(_Section):
    """SREM-style (reconstructed)."""

    temperature: float = Field(0.07, ge=0.017, le=1, description="tau, fixed; the logit scale is 1 / tau")
    warm_up_epochs: int = Field(3, ge=1, description="epochs of complementary learning alone")
    entropy_weight: Literal["undecided", "decided"] = Field(
        "undecided", description="clean pairs count more where the other modality is undecided, or is decided"
    )
    complementary_factor: float = Field(1.0, ge=0, description="lambda_cm, weight of complementary learning")
    complementary_temperature: float = Field(
        0.05, gt=0, description="tau_b, bias of complementary learning; high: all negatives alike"
    )
    energy_factor: float = Field(0.1, ge=0, description="lambda_eb, weight of the energy separation")
    energy_quantiles: tuple[float, float] = Field(
        (0.25, 0.75), description="bounds of the energy separation, as quantiles after the warm-up"
    )
    passes: int = Field(3, ge=1, description="last epochs whose scores are averaged")

    @model_validator(mode="after")
    def _ordered(self) -> SremSection:
        low, high = self.energy_quantiles
        if not 0 <= low < high <= 1:
            raise ValueError("energy_quantiles must be two rising shares, 0..1")
        return self


class TsvcSection(_Section):
    """TSVC-style (reconstructed)."""

    margin: float = Field(0.2, gt=0, le=2, description="alpha, margin of a certain match, a cosine")
    power: float = Field(10.0, gt=1, description="m, how fast the margin of doubtful pairs falls")
    warm_up_epochs: int = Field(3, ge=1, description="epochs on all pairs alike")
    noisy_from: float = Field(
        0.5, ge=0, le=1, description="share of the epochs after which pairs called noisy train too"
    )
    dims: int = Field(64, ge=2, description="principal components of each side in the mutual information")
    shrinkage: float = Field(0.05, ge=0, lt=1, description="share of the identity in its covariances")
    core_share: float = Field(0.5, gt=0, le=1, description="q, share of the clean pairs in the core set")
    rounds: int = Field(3, ge=1, description="trimming rounds of the final mutual information")
    variation_share: float = Field(
        0.5, ge=0, le=1, description="eta, say of the mutual information against the assistant's"
    )
    complementary_factor: float = Field(0.1, ge=0, description="lambda_r, weight of the complementary loss")
    temperature: float = Field(0.07, ge=0.017, le=1, description="tau of the complementary loss, fixed")


class NcrSection(_Section):
    """NCR: co-teaching with a two-component mixture on the loss."""

    margin: float = Field(0.2, gt=0, le=2, description="alpha, margin of a certain match, a cosine")
    power: float = Field(10.0, gt=1, description="m, how fast the margin of doubtful pairs falls")
    warm_up_epochs: int = Field(3, ge=1, description="epochs on all pairs alike")
    noisy_from: float = Field(
        0.5, ge=0, le=1, description="share of the epochs after which pairs called noisy train too"
    )
    top_share: float = Field(0.1, gt=0, le=1, description="share of the predictions that stand for a match")
    temperature: float = Field(
        0.07, ge=0.017, le=1, description="tau of the recorded loss, energy and entropies; trains nothing"
    )


class LemonSection(_Section):
    """LEMoN in its fixed setting."""

    neighbours: int = Field(30, ge=1, description="k, nearest reference pairs on each side")
    image_factor: float = Field(5.0, ge=0, description="beta, weight of what nearby images' captions say")
    caption_factor: float = Field(5.0, ge=0, description="gamma, weight of what nearby captions' images say")
    nearness: float = Field(0.1, ge=0, description="tau_1, how fast distant neighbours lose their say")
    cleanness: float = Field(5.0, ge=0, description="tau_2, how fast ill-matched neighbours lose their say")
    references: int = Field(
        50_000, ge=1, description="pairs that may be neighbours; drawn where there are more"
    )


class ConfidentSection(_Section):
    """Confident learning over caption clusters."""

    clusters: int = Field(100, ge=2, description="clusters of the captions; fewer on small sets")
    folds: int = Field(5, ge=2, description="classifiers that each leave one fold of the images out")
    penalty: float = Field(10.0, ge=0, description="of the squared weights of the classifier, halved")


class ChnrSection(_Section):
    """CHNR: a discriminator trained on trusted pairs, weights, hashing heads."""

    bits: int = Field(64, ge=0, description="length of the hash codes; 0 = ordinary heads, no codes")
    weighting: Literal["nw", "ew", "dw", "ones"] = Field(
        "ew",
        description="weight by the discriminator's c: nw = c, ew = c cubed, dw = 1 above the threshold, ones = 1",
    )
    meta_share: float = Field(
        0.5, ge=0, lt=1, description="share of the epochs in which the heads see trusted pairs only"
    )
    clusters: int = Field(
        0, ge=0, description="clusters of the images whose captions are no fakes for each other; 0 = none"
    )
    view_dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of features left out in the second view of each side; 0 = one view",
    )
    all_views: bool = Field(
        False,
        description="every step learns from all four combinations of views, as published, not from one of them",
    )
    discriminator_steps: int = Field(600, ge=1, description="optimiser steps of the discriminator")
    discriminator_batch: int = Field(
        128, ge=2, description="trusted pairs per batch; all where they are fewer"
    )
    discriminator_lr: float = Field(1e-3, gt=0, description="learning rate of AdamW; the author's is 1e-4")
    discriminator_decay: float = Field(1e-3, ge=0, description="weight decay of the discriminator")
    discriminator_hidden: int = Field(
        512, ge=0, description="width of its three hidden layers; 0 = as many as inputs, the author's choice"
    )
    discriminator_dropout: float = Field(0.2, ge=0, lt=1, description="after each of its hidden layers")
    penalty: float = Field(10.0, ge=0, description="weight of the gradient penalty")
    hidden: int = Field(1024, ge=1, description="hidden units of the hash heads; the author's are 4096")
    lr: float = Field(1e-3, gt=0, description="learning rate of the hash heads, Adam; the author's is 1e-4")
    weight_decay: float = Field(5e-4, ge=0, description="of the hash heads")
    temperature: float = Field(1.0, gt=0, description="divides cosines in the hash heads' contrastive loss")
    quantisation: float = Field(1e-3, ge=0, description="beta, weight of the quantisation loss")


class TowersSection(_Section):
    """Fine-tuning of whole open_clip towers, as RRSITR does it (towers = "full")."""

    epochs: int = Field(50, ge=1, description="passes over the pairs")
    batch: int = Field(100, ge=2, description="pairs per batch; a last, smaller one is left out")
    lr: float = Field(7e-6, gt=0, description="peak learning rate of AdamW, then cosine to 0")
    warm_up_steps: int = Field(
        200, ge=0, description="steps in which the learning rate rises; a tenth of all steps at most"
    )
    weight_decay: float = Field(0.7, ge=0, description="of matrices; vectors have none")
    max_grad_norm: float = Field(50.0, gt=0, description="longer gradients are cut to this norm")
    grad_checkpointing: bool = Field(
        True, description="compute activations twice rather than keep them: slower, in less memory"
    )
    checkpoint_every: int = Field(
        200, ge=1, description="steps between checkpoints, from which a run resumes"
    )
    workers: int = Field(4, ge=1, le=64, description="threads that decode images ahead")


class TrainSection(_Section):
    """The short self-paced robust training."""

    method: Literal[
        "self_paced", "rrsitr", "srem", "tsvc", "chnr", "similarity", "ncr", "lemon", "confident"
    ] = Field("self_paced", description="which method scores the pairs")
    first_look_dims: tuple[int, ...] = Field((64, 128), description="principal components of the first look")
    first_look_folds: int = Field(5, ge=2, description="folds by image of the first look")
    first_look_rounds: int = Field(4, ge=1, description="reweighting rounds of the first look")
    shrinkage: float = Field(0.3, ge=0, lt=1, description="share of the identity in the covariances")
    components: int = Field(
        256, ge=2, description="principal components of the image embeddings the heads take in"
    )
    folds: int = Field(3, ge=2, le=20, description="heads that each leave one fold of the pairs out")
    steps: int = Field(
        160,
        ge=1,
        description="optimiser steps per pair of heads; self_paced takes half where batches are large",
    )
    epochs: int = Field(12, ge=1, description="how often the steps are interrupted to score every pair")
    first_counted_epoch: int = Field(3, ge=1, description="scores are averaged from this epoch on")
    batch: int = Field(0, ge=0, description="pairs per batch; 0 = by the number of pairs")
    lr: float = Field(
        1e-3, gt=0, description="peak learning rate of AdamW, one-cycle; three times that in long steps"
    )
    warm_up: float = Field(0.3, gt=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(1.0, ge=0, description="of the out-of-fold heads")
    final_weight_decay: float = Field(0.5, ge=0, description="of the heads trained on everything")
    input_dropout: float = Field(0.2, ge=0, lt=1, description="of the out-of-fold heads")
    final_input_dropout: float = Field(0.1, ge=0, lt=1, description="of the heads trained on everything")
    dropout: float = Field(0.5, ge=0, lt=1, description="in the heads' hidden layer")
    width: int = Field(256, ge=2, description="dimensions of the trained embeddings")
    hidden: int = Field(512, ge=2, description="hidden units of the heads")
    log_scale: float = Field(2.3, description="ln of the logit scale at the start")
    max_scale: float = Field(60.0, gt=1, description="largest logit scale")
    pace: Literal["cosine", "divided", "none"] = Field(
        "cosine", description="self-paced weight: cosine up to noisy_at, RRSITR's two regions, or fixed"
    )
    pace_from: int = Field(3, ge=1, description="epoch after which losses set the weights")
    pace_growth: float = Field(6.0, ge=1, description="factor by which the pace's thresholds grow to the end")
    clean_at: float = Field(0.271, gt=0, description="division: clean below this share of the chance loss")
    noisy_at: float = Field(0.977, gt=0, description="division: noisy from this share of the chance loss")
    ambiguous_factor: float = Field(
        0.8, ge=0, le=1, description="weight of the ambiguous region in pace=divided"
    )
    planted_share: float = Field(0.5, gt=0, le=1, description="known swaps planted in the training, per pair")
    draws: int = Field(
        0,
        ge=0,
        le=20,
        description="draws of known swaps, each with a training of its own; 0 = more where noise is found in few pairs",
    )
    final_rounds: int = Field(
        2,
        ge=1,
        le=5,
        description="trainings of the final heads, each weighted by what the last found; 1 where that is nothing",
    )
    final_power: float = Field(
        0.5,
        gt=0,
        le=1,
        description="power of the clean posterior as final weight on a clean set; grows by the noise rate, up to 1",
    )
    seed: int = Field(0, ge=0, description="of folds, swaps, initialisation, batches and dropout")
    rrsitr: RrsitrSection = RrsitrSection()  # type: ignore[call-arg]
    srem: SremSection = SremSection()  # type: ignore[call-arg]
    tsvc: TsvcSection = TsvcSection()  # type: ignore[call-arg]
    ncr: NcrSection = NcrSection()  # type: ignore[call-arg]
    lemon: LemonSection = LemonSection()  # type: ignore[call-arg]
    confident: ConfidentSection = ConfidentSection()  # type: ignore[call-arg]
    chnr: ChnrSection = ChnrSection()  # type: ignore[call-arg]
    towers: Literal["frozen", "full"] = Field(
        "frozen", description="train heads over frozen embeddings, or first fine-tune whole open_clip towers"
    )
    tower: TowersSection = TowersSection()  # type: ignore[call-arg]

    def settings_in_use(self) -> dict[str, Any]:
        """The settings that this method goes by: those of other methods, and of towers left frozen, do not count."""
        mine = {self.method, "tower"} if self.towers == "full" else {self.method}
        sections = {name for name in type(self).model_fields if isinstance(getattr(self, name), _Section)}
        return self.model_dump(mode="json", exclude=sections - mine)

    @property
    def needs_trusted(self) -> bool:
        """Whether the method cannot do without pairs known to be right, and also learns from those people kept."""
        return self.method == "chnr"

    @property
    def uses_trusted(self) -> bool:
        """Whether the method learns from pairs known to be right."""
        return self.needs_trusted or self.method == "self_paced"

    @property
    def needs_tokens(self) -> bool:
        """Whether the method compares parts of images with words, which encoders give besides the embeddings."""
        return self.method == "rrsitr" and self.rrsitr.local

    def place(self, device: str) -> str:
        """Where heads train and pairs are scored: on the device by the default method, on the processor by others."""
        return device if self.method == "self_paced" else "cpu"

    @model_validator(mode="after")
    def _ordered(self) -> TrainSection:
        if self.clean_at >= self.noisy_at:
            raise ValueError("clean_at must be below noisy_at")
        if self.towers == "full" and self.method != "rrsitr":
            raise ValueError('towers = "full" goes with method = "rrsitr" only')
        if self.first_counted_epoch > self.epochs:
            raise ValueError("first_counted_epoch must not be above epochs")
        return self


class ScoreSection(_Section):
    """How every pair is scored."""

    candidates: int = Field(1000, ge=2, description="captions and images each pair is scored against")
    rank_candidates: int = Field(
        2_000_000, ge=2, description="captions and images that ranks and best matches search, at most"
    )
    search: Literal["auto", "faiss", "part"] = Field(
        "auto",
        description="best matches where not all are compared: of all by faiss, of a part; auto = faiss if installed",
    )
    neighbours: int = Field(10, ge=1, description="nearest pairs that vote")
    sharpness: float = Field(
        10.0, ge=0, description="how much nearer ones count for more: exp(sharpness x cosine)"
    )
    references: int = Field(8000, ge=1, description="pairs that may vote")
    min_trust: float = Field(0.3, ge=0, le=1, description="pairs less likely clean than this do not vote")
    words: bool = Field(True, description="words that an image does not look like tell against its captions")


class TagSection(_Section):
    """When a pair is called clean or noisy."""

    clean_at: float = Field(0.2, ge=0, le=1, description="clean below this noise probability")
    noisy_at: float = Field(0.8, ge=0, le=1, description="noisy above this noise probability")

    @model_validator(mode="after")
    def _ordered(self) -> TagSection:
        if self.clean_at > self.noisy_at:
            raise ValueError("clean_at must not be above noisy_at")
        return self


class ExportSection(_Section):
    """What an export writes when the command does not say."""

    format: str = Field("parquet", description="format of the export")
    drop: tuple[str, ...] = Field((), description="tags that are left out")
    reweight: bool = Field(False, description="add a weight column")


class Recipe(_Section):
    """All settings of one audit."""

    dataset: DatasetSection = DatasetSection()  # type: ignore[call-arg]
    image: ImageSection = ImageSection()  # type: ignore[call-arg]
    text: TextSection = TextSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    score: ScoreSection = ScoreSection()  # type: ignore[call-arg]
    tag: TagSection = TagSection()  # type: ignore[call-arg]
    export: ExportSection = ExportSection()  # type: ignore[call-arg]

    def digest(self) -> str:
        """Hash of every setting, 32 hex digits."""
        return digest_of(self.model_dump(mode="json"))


def recipes_folder() -> Path:
    """The recipes that come with the package: inside it when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def list_recipes() -> dict[str, Path]:
    """Name and file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.toml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        RecipeError: neither.
    """
    known = list_recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix == ".toml" or "/" in name:
        raise RecipeError(
            f"recipe {name} is not a file", "nc-audit recipes lists those that come with the tool"
        )
    raise RecipeError(f"no recipe is called {name}", nearest(name, list(known)))


def read_recipe(path: Path) -> dict[str, Any]:
    """The tables of one recipe file, unchecked.

    Raises:
        RecipeError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(
            f"recipe {path} cannot be read: {problem}", "give a TOML file in UTF-8"
        ) from problem
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise RecipeError(
            f"recipe {path} is not TOML: {problem}", "nc-audit recipes show self_paced prints a good one"
        ) from problem


def build_recipe(
    names: Iterable[str] = (), overrides: Sequence[str] = (), settings: dict[str, Any] | None = None
) -> Recipe:
    """The recipe of a command: defaults, recipe files in order, options, then `section.key=value` strings.

    Args:
        names: names or paths of recipes, later ones win.
        overrides: strings `section.key=value`, the value in TOML (bare words are strings).
        settings: values of the command's own options by section and key; None means not given.

    Raises:
        RecipeError: with every problem of all layers.
    """
    merged: dict[str, Any] = {}
    for name in names:
        _merge(merged, read_recipe(find_recipe(name)))
    for section, values in (settings or {}).items():
        _merge(merged, {section: {key: value for key, value in values.items() if value is not None}})
    for override in overrides:
        _merge(merged, _parse_override(override))
    try:
        return Recipe.model_validate(merged)
    except ValidationError as problem:
        problems = [_describe(error) for error in problem.errors()]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(
            f"the recipe has {count}: " + "; ".join(problems),
            "nc-audit recipes show self_paced lists every key",
            problems,
        ) from None


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (separator and dot and section and name):
        raise RecipeError(f"--set {text} is not section.key=value", "for example --set train.seed=1")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return {section: parsed}


def _describe(error: Any) -> str:
    """One line for one pydantic problem: the key, what is wrong, the nearest known key."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in error["loc"][:-1]:
            inner = section.model_fields[str(part)].annotation
            section = inner if isinstance(inner, type) else section
        known = list(section.model_fields)
        return f"unknown key {where} ({nearest(str(error['loc'][-1]), known)})"
    message = error["msg"].removeprefix("Value error, ")
    value = (
        ""
        if isinstance(error["input"], (dict, BaseModel))
        else f" (got {json.dumps(error['input'], default=str)})"
    )
    return f"{where}: {message[0].lower()}{message[1:]}{value}"


def show(recipe: Recipe) -> str:
    """A recipe as TOML, every key with what it means; a section's own sections follow it."""
    lines: list[str] = []
    for name in Recipe.model_fields:
        lines += _shown(name, getattr(recipe, name))
    return "\n".join(lines).strip() + "\n"


def _shown(name: str, section: _Section) -> list[str]:
    lines, inner = ["", f"[{name}]"], []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, _Section):
            inner += _shown(f"{name}.{key}", value)
        elif value is None:
            lines.append(f"# {key} =  # {field.description}")
        else:
            lines.append(f"{key} = {_toml(value)}  # {field.description}")
    return lines + inner


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
