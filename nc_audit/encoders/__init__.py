"""Frozen encoders: what turns each distinct image and caption into one vector.

How a caller goes about it, cheap steps first:

    plan = plan_encoders("auto")         # decides, loads no weights; plan.notes says what, why and at what cost
    encoders = load_encoders(plan)       # reads or fetches weights; learns nothing yet
    image_encoder = embed.fit_images(encoders.image, ...)      # where it learns from the data; else as it is
    text_encoder = embed.fit_captions(encoders.text, ...)
    embed.embed_images(image_encoder, ...), embed.embed_captions(text_encoder, ...)

Specs: `open_clip:MODEL/PRETRAINED`, `open_clip:MODEL@FILE`, `open_clip:hf-hub:OWNER/NAME` (both sides), `timm:MODEL`
(images), `patches` (images), `tfidf` (captions), `st:MODEL_OR_FOLDER` (captions, an extra), `builtin` (`patches` +
`tfidf`), `auto`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from nc_audit.errors import EncoderError, nearest
from nc_audit.hub import refusal

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from nc_audit.encoders.open_clip_towers import OpenClipModel

BUILTIN_COST = (
    "builtin learns from the dataset's own images and captions: on two remote-sensing sets it found wrong captions "
    "about as well as an ImageNet network (README, Measured results); on everyday photographs and on fewer than "
    "1,000 images expect less, and give --encoder open_clip:MODEL@FILE where you can"
)
IMAGE_SPECS = ("open_clip:", "timm:", "patches")
TEXT_SPECS = ("open_clip:", "tfidf", "st:")
PAIR_SPECS = ("auto", "builtin", "open_clip:")


@runtime_checkable
class ImageEncoder(Protocol):
    """Turns images into vectors. `preprocess` runs in worker threads, `encode` in one."""

    spec: str
    dim: int
    input_size: tuple[int, int]

    @property
    def digest(self) -> str:
        """Of the encoder with its weights and options; embeddings are kept by it."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image as a tensor [3, H, W] of fixed size, as `encode` wants it."""
        ...

    def encode(self, batch: Tensor) -> Tensor:
        """Preprocessed images [B, 3, H, W] to vectors [B, D], float32, on the CPU."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Turns captions into vectors."""

    spec: str
    dim: int

    @property
    def digest(self) -> str:
        """Of the encoder with its weights and options; embeddings are kept by it."""
        ...

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to vectors [N, D], float32, on the CPU."""
        ...

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """For each caption, whether the encoder reads only its beginning."""
        ...


@runtime_checkable
class ImageLearner(Protocol):
    """An image encoder that must first learn from the dataset's own images."""

    spec: str
    input_size: tuple[int, int]

    def sample(self, num_images: int) -> list[int]:
        """Positions, in canonical order, of the images it wants to learn from."""
        ...

    def digest_for(self, fitted_on: str) -> str:
        """Digest of the encoder that it will become, given the digest of the set of images."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image as a tensor [3, H, W], as `learn` wants it."""
        ...

    def learn(
        self, images: Tensor, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the encoder will consist of, learnt from preprocessed images [N, 3, H, W], and their vectors [N, D].

        `progress` is called with images learnt from and N.
        """
        ...

    def encoder(self, learnt: dict[str, Tensor], fitted_on: str) -> ImageEncoder:
        """The encoder that consists of what was learnt."""
        ...


@runtime_checkable
class TextLearner(Protocol):
    """A text encoder that must first learn from the dataset's own captions."""

    spec: str

    def digest_for(self, fitted_on: str) -> str:
        """Digest of the encoder that it will become, given the digest of the set of captions."""
        ...

    def fit(self, captions: Sequence[str], fitted_on: str, dim: int | None = None) -> TextEncoder:
        """The encoder learnt from the distinct captions, in canonical order; only when needed where `dim` is known."""
        ...


@dataclass(frozen=True)
class ImageOptions:
    """How images enter a `timm:` or `open_clip:` encoder; None keeps what the model was trained with."""

    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None


@dataclass(frozen=True)
class EncoderPlan:
    """Which encoders will be used, decided without loading weights.

    Attributes:
        image: spec of the image side, never `auto` or `builtin`.
        text: spec of the text side, likewise.
        aligned: both sides are towers of one model, so that their cosine means something as it is.
        notes: sentences for the user: what was chosen, why, and what it costs.
    """

    image: str
    text: str
    aligned: bool
    image_weights: Path | None = None
    text_weights: Path | None = None
    image_options: ImageOptions = ImageOptions()
    device: str = "cpu"
    precision: str = "fp32"
    seed: int = 0
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The plan as JSON-able values, for a manifest; file names without their folders."""
        facts = asdict(self)
        for side in ("image_weights", "text_weights"):
            facts[side] = Path(facts[side]).name if facts[side] else None
        for side in ("image", "text"):
            model, at, file = facts[side].partition("@")
            facts[side] = model + at + Path(file).name
            if facts[side].startswith("st:") and Path(facts[side].removeprefix("st:")).is_dir():
                facts[side] = "st:" + Path(facts[side].removeprefix("st:")).name
        return facts


@dataclass(frozen=True)
class Encoders:
    """Loaded encoders; a learner still needs the dataset. `logit_scale` multiplies the cosine of aligned ones."""

    image: ImageEncoder | ImageLearner
    text: TextEncoder | TextLearner
    logit_scale: float | None = None


def plan_encoders(
    encoder: str = "auto",
    *,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    image_weights: Path | None = None,
    text_weights: Path | None = None,
    image_options: ImageOptions | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
) -> EncoderPlan:
    """Decide on the encoders, within two seconds and without loading any weights.

    Args:
        encoder: spec for both sides; a spec for one side below takes its place there.
        image_encoder: spec of the image side.
        text_encoder: spec of the text side. With only an image spec, an `open_clip:` model serves both sides and
            others are paired with `tfidf`; with only a text spec, likewise with `patches`.
        image_weights: local weights of the image side.
        text_weights: local weights of the text side.
        image_options: constructor options, mean, standard deviation and size of the image side.
        device: `auto`, `cpu` or `cuda`.
        precision: `auto`, `fp32` or `bf16`.
        seed: randomness of encoders that learn from the data.

    Raises:
        EncoderError: a spec, model, tag or file is unknown, or the device or precision cannot be had.
    """
    from nc_audit.encoders import weights

    notes: list[str] = []
    if image_encoder is None and text_encoder is None:
        image, text = _both_sides(encoder, notes)
    else:
        image, text = _two_sides(encoder, image_encoder, text_encoder, notes)
    for path, option in ((image_weights, "--image-weights"), (text_weights, "--text-weights")):
        if path is not None and not path.is_file():
            raise EncoderError(
                f"{option}: there is no file {path}", "give the path of a safetensors or torch file"
            )
    if image_weights is not None and image == "patches":
        raise EncoderError(
            "patches learns from the dataset and takes no --image-weights", "give --image-encoder"
        )
    if text_weights is not None and text == "tfidf":
        raise EncoderError("tfidf learns from the dataset and takes no --text-weights", "give --text-encoder")
    _check(image, image_weights, "image")
    _check(text, text_weights, "text")
    chosen_device = weights.choose_device(device)
    return EncoderPlan(
        image=image,
        text=text,
        aligned=image == text and image_weights == text_weights,
        image_weights=image_weights,
        text_weights=text_weights,
        image_options=image_options or ImageOptions(),
        device=chosen_device,
        precision=weights.choose_precision(precision, chosen_device),
        seed=seed,
        notes=tuple(notes),
    )


def _both_sides(encoder: str, notes: list[str]) -> tuple[str, str]:
    if encoder == "auto":
        return _automatic(notes)
    if encoder == "builtin":
        return "patches", "tfidf"
    if encoder.startswith("open_clip:"):
        return encoder, encoder
    if encoder.startswith("timm:") or encoder == "patches":
        raise EncoderError(
            f"{encoder} encodes images only", f"--image-encoder {encoder} --text-encoder tfidf"
        )
    if encoder == "tfidf" or encoder.startswith("st:"):
        raise EncoderError(
            f"{encoder} encodes captions only", f"--image-encoder patches --text-encoder {encoder}"
        )
    raise EncoderError(
        f"unknown encoder {encoder!r}", nearest(encoder, sorted({*PAIR_SPECS, *IMAGE_SPECS, *TEXT_SPECS}))
    )


def _two_sides(encoder: str, image: str | None, text: str | None, notes: list[str]) -> tuple[str, str]:
    if encoder != "auto":
        both = _both_sides(encoder, notes)
        return image or both[0], text or both[1]
    if text is None:
        assert image is not None
        if image.startswith("open_clip:"):
            return image, image
        notes.append(f"no text encoder is named beside {image}: captions go through tfidf")
        return image, "tfidf"
    if image is None:
        if text.startswith("open_clip:"):
            return text, text
        notes.append(f"no image encoder is named beside {text}: images go through patches")
        return "patches", text
    return image, text


def _automatic(notes: list[str]) -> tuple[str, str]:
    from nc_audit.encoders.open_clip_specs import AUTO, AUTO_REPOSITORY, HUB_NAMES
    from nc_audit.encoders.weights import cached_file

    if cached_file(AUTO_REPOSITORY, HUB_NAMES):
        notes.append(f"encoder: {AUTO}, from the weights in the cache")
        return AUTO, AUTO
    why_not = refusal("models", AUTO_REPOSITORY)
    if why_not is None:
        notes.append(f"encoder: {AUTO}; its weights (about 600 MB) are fetched from the hub once")
        return AUTO, AUTO
    notes.append(f"encoder: builtin (patches + tfidf), because {AUTO} is not in the cache and {why_not}")
    notes.append(BUILTIN_COST)
    return "patches", "tfidf"


def _check(spec: str, file: Path | None, side: str) -> None:
    known = IMAGE_SPECS if side == "image" else TEXT_SPECS
    if spec in ("auto", "builtin"):
        raise EncoderError(
            f"{spec} chooses both sides at once", f"give --encoder {spec} and no --{side}-encoder"
        )
    if spec.startswith("open_clip:"):
        from nc_audit.encoders import open_clip_specs

        open_clip_specs.check_spec(spec, file)
    elif spec.startswith("timm:") and side == "image":
        from nc_audit.encoders import timm_tower

        timm_tower.check_spec(spec)
    elif spec.startswith("st:") and side == "text":
        from nc_audit.encoders import sentence_tower

        sentence_tower.check_spec(spec)
    elif spec not in known or spec.endswith(":"):
        raise EncoderError(f"unknown {side} encoder {spec!r}", nearest(spec, known))


def find_weights(plan: EncoderPlan) -> None:
    """Whether the weights that a plan names are at hand or can be fetched; answers within seconds, fetches nothing.

    Raises:
        EncoderError: they are not in the cache, and the hub cannot be reached.
    """
    for spec, file in dict.fromkeys([(plan.image, plan.image_weights), (plan.text, plan.text_weights)]):
        if spec.startswith("open_clip:"):
            from nc_audit.encoders import open_clip_specs

            open_clip_specs.find_weights(spec, file)
        elif spec.startswith("timm:"):
            from nc_audit.encoders import timm_tower

            timm_tower.find_weights(spec, file)
        elif spec.startswith("st:"):
            from nc_audit.encoders import sentence_tower

            sentence_tower.find_weights(spec)


def load_encoders(plan: EncoderPlan) -> Encoders:
    """Read or fetch the weights that a plan names.

    Raises:
        EncoderError: the weights are not in the cache and the hub cannot be reached, or they are not those of the
            model, or the file is a pickle that holds more than tensors.
    """
    image: ImageEncoder | ImageLearner
    text: TextEncoder | TextLearner
    scale: float | None = None
    if plan.aligned:
        model = _open_clip(plan.image, plan.image_weights, plan)
        encoders = Encoders(model.image_encoder(), model.text_encoder(), model.logit_scale)
        model.settle()
        return encoders
    if plan.image.startswith("open_clip:"):
        model = _open_clip(plan.image, plan.image_weights, plan)
        image = model.image_encoder()
        model.settle()
    elif plan.image.startswith("timm:"):
        from nc_audit.encoders.timm_tower import TimmImageEncoder

        image = TimmImageEncoder(plan)
    else:
        from nc_audit.encoders.patches import Patches

        image = Patches(plan.seed)
    if plan.text.startswith("open_clip:"):
        model = _open_clip(plan.text, plan.text_weights, plan)
        text = model.text_encoder()
        model.settle()
    elif plan.text.startswith("st:"):
        from nc_audit.encoders.sentence_tower import SentenceEncoder

        text = SentenceEncoder(plan)
    else:
        from nc_audit.encoders.tfidf import Tfidf

        text = Tfidf(plan.seed)
    return Encoders(image, text, scale)


def _open_clip(spec: str, file: Path | None, plan: EncoderPlan) -> OpenClipModel:
    from nc_audit.encoders.open_clip_specs import towers_of

    return towers_of(spec).OpenClipModel(spec, file, plan)
