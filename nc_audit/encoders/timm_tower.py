"""Image encoder from timm: any of its backbones, pooled, without its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from PIL import Image
from torch import Tensor

from nc_audit.encoders.weights import (
    autocast,
    check_at_hand,
    digest_of_encoder,
    hub_file,
    lowered_,
    normalised,
    pixel_steps,
    read_weights,
)
from nc_audit.errors import EncoderError, nearest

if TYPE_CHECKING:
    from nc_audit.encoders import EncoderPlan

HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


def check_spec(spec: str) -> None:
    """Whether timm has the model.

    Raises:
        EncoderError: it has not; the hint names the nearest.
    """
    model = spec.removeprefix("timm:")
    if not timm.is_model(model):
        known = nearest(model.split(".")[0], timm.list_models())
        raise EncoderError(
            f"timm has no model {model!r}", known if known.startswith("did") else "see timm.list_models()"
        )


def find_weights(spec: str, file: Path | None) -> None:
    """Whether the weights are at hand: a file, in the hub's cache, or on the hub while it can be reached.

    Raises:
        EncoderError: they are not.
    """
    if file is None:
        published = timm.models.get_pretrained_cfg(spec.removeprefix("timm:"))
        check_at_hand(*_hub_home(spec, vars(published) if published else {}), spec)


def _hub_home(spec: str, published: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Repository on the hub that holds a model, and the names that its weights may have there.

    Raises:
        EncoderError: timm publishes none.
    """
    repository, name = published.get("hf_hub_id"), published.get("hf_hub_filename")
    if not repository:
        raise EncoderError(
            f"timm publishes no weights for {spec.removeprefix('timm:')}",
            "give them with --image-weights FILE",
        )
    return repository, (name,) if name else HUB_NAMES


class TimmImageEncoder:
    """Pooled output of a timm backbone, on the backbone's own scale (not unit norm).

    The whole image is squeezed to the model's size: a caption may speak of what a centre crop would cut away.
    """

    def __init__(self, plan: EncoderPlan) -> None:
        self.spec = plan.image
        self.device = plan.device
        self.precision = plan.precision
        chosen = plan.image_options
        name = self.spec.removeprefix("timm:")
        model = _build(name, chosen.options, num_classes=0)
        path = plan.image_weights
        if path is None:
            path = hub_file(*_hub_home(self.spec, model.pretrained_cfg), self.spec)
        model = _filled(model, read_weights(path), name, chosen.options, path.name)
        config = timm.data.resolve_model_data_config(model)
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
        if chosen.size is not None:
            config["input_size"] = (3, chosen.size, chosen.size)
        config["mean"] = tuple(chosen.mean or config["mean"])
        config["std"] = tuple(chosen.std or config["std"])
        self.mean, self.std = config["mean"], config["std"]
        self.input_size: tuple[int, int] = tuple(config["input_size"][1:])
        self.dim = int(model.num_features)
        self.preprocess_pixels = pixel_steps(timm.data.create_transform(**config, is_training=False))
        facts = {
            "spec": self.spec,
            "options": chosen.options,
            "precision": self.precision,
            "preprocess": config,
        }
        self.digest = digest_of_encoder(facts, model.state_dict())
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        lowered_(self.model, self.precision)

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image as bytes [3, H, W]."""
        return self.preprocess_pixels(image)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Bytes [B, 3, H, W] to vectors [B, D], float32, on the CPU."""
        with autocast(self.device, self.precision):
            vectors = self.model(normalised(batch, self.mean, self.std, self.device))
        return vectors.float().cpu()

    @torch.inference_mode()
    def tokens(self, batch: Tensor) -> Tensor:
        """Local embeddings: cells of the last feature map or patches, [B, T, D], float32, on the CPU."""
        with autocast(self.device, self.precision):
            features = self.model.forward_features(normalised(batch, self.mean, self.std, self.device))
        if features.dim() == 4:  # a feature map, channels second unless the model says otherwise
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
        else:
            features = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        return features.float().cpu()


def _build(name: str, options: dict[str, Any], **more: Any) -> Any:
    try:
        return timm.create_model(name, **options, **more)
    except (TypeError, ValueError, RuntimeError, AssertionError) as problem:
        raise EncoderError(
            f"timm cannot build {name} with options {options}: {str(problem).splitlines()[0]}",
            "see [image] options in the recipe",
        ) from problem


def _filled(
    model: Any, tensors: dict[str, Tensor], name: str, options: dict[str, Any], file_name: str
) -> Any:
    """The model with these weights, nothing missing; the classifier's own may be left over.

    Weights in another naming than the model's go through timm's conversion, classifier included, which is strict.
    """
    own = {
        key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    misfits = [key for key in own if key not in tensors or own[key].shape != tensors[key].shape]
    if not misfits:
        model.load_state_dict({key: tensors[key] for key in own}, strict=False)
        return model
    try:
        overlay = {"state_dict": tensors, "source": "timm"}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as problem:
        raise EncoderError(
            f"{file_name} does not fit timm:{name}: {len(misfits)} of {len(own)} tensors are missing or have another "
            f"shape (first: {misfits[0]})",
            "check the model name and [image] options",
        ) from problem
    model.reset_classifier(0)
    return model
