"""Where weights come from, how they are read safely, and on what they run.

A file given by the user, the hub's cache, or the hub, in this order; never a pickle that holds more than tensors.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nc_audit.errors import EncoderError
from nc_audit.hub import refusal

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file by name; training wrappers around them are taken off.

    Raises:
        EncoderError: the file is absent, is a pickle that holds more than tensors, or is not a weights file.
    """
    if not path.is_file():
        raise EncoderError(f"there is no weights file {path}", "give the path of a safetensors or torch file")
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            # mapped: what is only looked at is not read
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        if "nsupported" in str(problem) or "eights_only" in str(problem) or "TorchScript" in str(problem):
            raise EncoderError(
                f"{path.name} is a pickle that holds more than tensors, and reading it could run code",
                "convert it to safetensors where you trust it",
            ) from problem
        raise EncoderError(
            f"{path.name} is not a weights file: {first}", "give a safetensors or torch file"
        ) from problem
    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    tensors = (
        {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    )
    if not tensors:
        raise EncoderError(f"{path.name} holds no tensors by name", "give a safetensors or torch state dict")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def digest_of_encoder(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest of facts (JSON-able) and of every tensor's name, type, shape and bytes; 32 hex digits."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]


def digest_ahead(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Future[str]:
    """`digest_of_encoder` of the tensors as they stand, in the making by a thread of its own.

    A model may be laid out anew meanwhile, its weights replaced but not written into.
    """
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    thread = ThreadPoolExecutor(1)
    try:
        return thread.submit(digest_of_encoder, facts, held)
    finally:
        thread.shutdown(wait=False)


def cached_file(repository: str, names: Sequence[str]) -> Path | None:
    """The first of the named files that the hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def check_at_hand(
    repository: str,
    names: Sequence[str],
    spec: str,
    hint: str = "give local weights, fetch them once where there is a network, or use --encoder builtin",
) -> Path | None:
    """The first of the named files that the hub's cache holds; None where the hub has to be asked, and can be.

    Raises:
        EncoderError: it is not in the cache, and the hub cannot be reached.
    """
    found = cached_file(repository, names)
    why_not = refusal("models", repository) if found is None else None
    if why_not is not None:
        raise EncoderError(f"the weights of {spec} are not in the cache, and {why_not}", hint)
    return found


def hub_file(repository: str, names: Sequence[str], spec: str) -> Path:
    """The first of the named files, from the hub's cache or else fetched from the hub.

    Raises:
        EncoderError: it is not in the cache, and the hub cannot be reached or has none of the files.
    """
    found = check_at_hand(repository, names, spec)
    if found is not None:
        return found
    from huggingface_hub import hf_hub_download

    problems = []
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as problem:
            problems.append((str(problem).splitlines() or [type(problem).__name__])[0])
    raise EncoderError(
        f"the weights of {spec} cannot be fetched: {problems[-1]}",
        f"tried {', '.join(names)} of {repository}",
    )


def choose_device(device: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        EncoderError: the device is unknown, or is cuda and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise EncoderError(f"unknown device {device!r}", "known: auto, cpu, cuda")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise EncoderError("no CUDA device can be used", "--device cpu, or install a torch build with CUDA")
    return ("cuda" if has_cuda else "cpu") if device == "auto" else device


def choose_precision(precision: str, device: str) -> str:
    """`fp32` or `bf16`; auto takes bf16 where the hardware multiplies it natively.

    Raises:
        EncoderError: the precision is unknown.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise EncoderError(f"unknown precision {precision!r}", "known: auto, fp32, bf16")
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & _processor_flags() else "fp32"


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    flags = (line for line in text.splitlines() if line.startswith("flags"))
    return set(next(flags, "").split())


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """The context to encode in."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def lowered_(model: torch.nn.Module, precision: str) -> None:
    """Keep the matrices of a model that trains no more in the precision they are multiplied in, in place.

    Within `autocast` the products are the same; without this, it casts every matrix again for every batch, which costs
    a large model nearly half its time on a processor.
    """
    if precision != "bf16":
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
            module.to(torch.bfloat16)
        elif isinstance(module, torch.nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
                if (matrix := getattr(module, name)) is not None:
                    matrix.data = matrix.data.to(torch.bfloat16)


def pixel_steps(transform: Any) -> Callable[[Image.Image], Tensor]:
    """The steps of a torchvision transform that precede its conversion to floats, ending in uint8 [3, H, W].

    Bytes are a quarter of the floats to pass between threads; scaling and normalising happen on the whole batch.
    """
    from torchvision.transforms import functional

    steps = []
    for step in transform.transforms:
        if "Tensor" in type(step).__name__:
            break
        steps.append(step)

    def apply(image: Image.Image) -> Tensor:
        for step in steps:
            image = step(image)
        return functional.pil_to_tensor(image)

    return apply


def normalised(batch: Tensor, mean: Sequence[float], std: Sequence[float], device: str) -> Tensor:
    """Bytes [B, 3, H, W] to normalised float32 on the device, channels last (faster for convolutions)."""
    moved = batch.to(device, non_blocking=True).float().div_(255)
    shape = (1, len(mean), 1, 1)
    moved.sub_(torch.tensor(mean, device=device).view(shape)).div_(
        torch.tensor(std, device=device).view(shape)
    )
    return moved.contiguous(memory_format=torch.channels_last)
