"""What an `open_clip:` spec names, told without importing open_clip as far as that goes: it takes seconds.

The names of models are those of open_clip's own config files. Only published weights, which open_clip lists in its
code, and what is unknown need the package itself; those that `auto` takes are known here.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from nc_audit.encoders.weights import check_at_hand
from nc_audit.errors import EncoderError, nearest

AUTO = "open_clip:ViT-B-32/laion2b_s34b_b79k"
AUTO_REPOSITORY = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"  # as open_clip has it
HUB_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
HUB_CONFIG = "open_clip_config.json"


class _ForSome(NamedTuple):
    """What only some of open_clip's models use: what tells them, and the module and class that use it."""

    mark: str
    module: str
    tower: str


_FOR_SOME = {
    "transformers": _ForSome('"hf_', "hf_model", "HFTextEncoder"),
    "timm": _ForSome('"timm_', "timm_model", "TimmModel"),
}


def check_spec(spec: str, file: Path | None) -> None:
    """Whether open_clip knows the model and where its weights are.

    Raises:
        EncoderError: a part of the spec is unknown or missing.
    """
    parse(spec, file)


def find_weights(spec: str, file: Path | None) -> None:
    """Whether the weights are at hand: a file, in the hub's cache, or on the hub while it can be reached.

    Raises:
        EncoderError: they are not.
    """
    kind, name, file = parse(spec, file)
    if kind == "hub":
        check_at_hand(name, (HUB_CONFIG,), spec)
    if file is None:
        repository, names = (name, HUB_NAMES) if kind == "hub" else hub_home(*name.split("/", 1))
        check_at_hand(repository, names, spec)


def parse(spec: str, file: Path | None) -> tuple[str, str, Path | None]:
    """Kind (`hub`, `tag` or `file`), model (for `tag` with its tag after a slash), and the file.

    Raises:
        EncoderError: a part of the spec is unknown or missing.
    """
    rest = spec.removeprefix("open_clip:")
    if rest.startswith("hf-hub:"):
        repository = rest.removeprefix("hf-hub:")
        if repository.count("/") != 1 or not all(repository.split("/")):
            raise EncoderError(f"{spec!r} names no repository", "open_clip:hf-hub:OWNER/NAME")
        return "hub", repository, file
    model, at, name = rest.partition("@")
    if at:
        own = Path(name)
        if not name or not own.is_file():
            raise EncoderError(f"{spec}: there is no file {name!r}", "open_clip:MODEL@FILE")
        file = file or own  # weights given beside the spec are fine-tuned ones
    if at or (file is not None and "/" not in model):
        _check_model(model)
        return "file", model, file
    model, slash, tag = rest.partition("/")
    if not slash and _is_model(model):
        tags = open_clip_for(model).list_pretrained_tags_by_model(model)
        known = f"open_clip:{model}/{tags[0]}" if tags else f"open_clip:{model}@FILE"
        raise EncoderError(f"{spec} names no weights", f"for example {known}")
    hub_home(model, tag)
    return "tag", rest, file


def hub_home(model: str, tag: str) -> tuple[str, tuple[str, ...]]:
    """Repository on the hub that holds a published model, and the names that its weights may have there.

    Raises:
        EncoderError: the model or the tag is unknown, or is not on the hub.
    """
    if f"open_clip:{model}/{tag}" == AUTO:
        return AUTO_REPOSITORY, HUB_NAMES
    _check_model(model)
    open_clip = open_clip_for(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        known = nearest(tag, tags) if tags else f"give a file: open_clip:{model}@FILE"
        raise EncoderError(f"open_clip has no weights {tag!r} for {model}", known)
    home = open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "")
    repository, _, name = home.rpartition("/")
    if not repository:
        raise EncoderError(
            f"the weights {tag} of {model} are not on the hub", f"give a file: open_clip:{model}@FILE"
        )
    return repository, (name,) if name else HUB_NAMES


def towers_of(spec: str) -> Any:
    """The module of open_clip's towers, imported for the model that a spec names."""
    open_clip_for(re.split("[/@]", spec.removeprefix("open_clip:"))[0])
    return importlib.import_module("nc_audit.encoders.open_clip_towers")


def open_clip_for(model: str) -> ModuleType:
    """open_clip, imported without what only some models have a use for (`_FOR_SOME`), and not this one.

    It imports both packages in any case, which takes longer than all the rest of it.
    """
    config = _configs().get(model)
    settings = None if config is None else config.read_text("utf-8")
    spared = [
        package
        for package, some in _FOR_SOME.items()
        if package not in sys.modules and settings is not None and some.mark not in settings
    ]
    for package in spared:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        open_clip = importlib.import_module("open_clip")
    finally:
        for package in spared:
            del sys.modules[package]
    for package in _FOR_SOME.keys() - spared:
        _no_longer_spared(package)
    return open_clip


def _no_longer_spared(package: str) -> None:
    """Have open_clip find a package that it was imported without, for a model before this one."""
    some = _FOR_SOME[package]
    wrapper = sys.modules[f"open_clip.{some.module}"]
    if getattr(wrapper, package) is None:
        importlib.reload(wrapper)
        setattr(sys.modules["open_clip.model"], some.tower, getattr(wrapper, some.tower))


def _check_model(model: str) -> None:
    if not _is_model(model):
        raise EncoderError(
            f"open_clip has no model {model!r}", nearest(model, open_clip_for(model).list_models())
        )


def _is_model(model: str) -> bool:
    return model in _configs() or model in open_clip_for(model).list_models()


@cache
def _configs() -> dict[str, Path]:
    """The config files of open_clip's models, by name."""
    home = importlib.util.find_spec("open_clip")
    folder = Path((home and home.origin) or "").parent / "model_configs"
    return {path.stem: path for path in folder.glob("*.json")}
