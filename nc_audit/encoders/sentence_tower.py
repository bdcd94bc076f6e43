"""Text encoder from sentence-transformers (an extra): a local folder, the hub's cache, or the hub."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nc_audit.encoders.weights import autocast, check_at_hand, digest_of_encoder
from nc_audit.errors import EncoderError

if TYPE_CHECKING:
    from nc_audit.encoders import EncoderPlan

MARKS = ("modules.json", "config.json")  # one of them stands in every model folder
BATCH = 128


def check_spec(spec: str) -> None:
    """Whether the extra is installed, and a named folder is there and a model.

    Raises:
        EncoderError: it is not.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise EncoderError(
            f"{spec} needs the package sentence-transformers", "pip install 'nc-audit[st]', or use tfidf"
        )
    name = spec.removeprefix("st:")
    if not name:
        raise EncoderError("st: names no model", "st:OWNER/NAME or st:FOLDER")
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / mark).is_file() for mark in MARKS):
        raise EncoderError(
            f"{folder} is no sentence-transformers model", f"it should hold {' or '.join(MARKS)}"
        )
    if not folder.is_dir() and (name.count("/") > 1 or name.startswith(("/", ".", "~"))):
        raise EncoderError(f"there is no folder {folder}", "give the folder of a sentence-transformers model")


class SentenceEncoder:
    """Sentence embeddings as the model gives them (most have unit length); nothing but its own code is run."""

    def __init__(self, plan: EncoderPlan) -> None:
        self.spec = plan.text
        self.device, self.precision = plan.device, plan.precision
        if plan.text_weights is not None:
            raise EncoderError(f"{self.spec} takes no --text-weights", "name its folder: st:FOLDER")
        self.model = _load(*find_weights(self.spec), plan)
        self.dim = int(self.model.get_embedding_dimension())
        facts = {
            "spec": "st",  # the same weights are the same encoder, wherever their folder is
            "modules": [type(module).__name__ for module in self.model],
            "longest": self.model.max_seq_length,
            "precision": self.precision,
        }
        self.digest = digest_of_encoder(facts, self.model.state_dict())

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to vectors [N, D], float32, on the CPU; the library sorts them by length."""
        with autocast(self.device, self.precision):
            vectors = self.model.encode(
                list(captions), batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True
            )
        return vectors.float().cpu()

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """For each caption, whether it has more tokens than the model reads."""
        longest = self.model.max_seq_length
        if longest is None:
            return [False] * len(captions)
        logger = logging.getLogger("transformers.tokenization_utils_base")
        level = logger.level
        logger.setLevel(logging.ERROR)  # a caption that is too long is what is asked for, not a warning
        try:
            tokens = self.model.tokenizer(list(captions), truncation=False)["input_ids"]
        finally:
            logger.setLevel(level)
        return [len(one) > longest for one in tokens]


def find_weights(spec: str) -> tuple[str, bool]:
    """Where sentence-transformers finds a model: its folder, or its name on the hub; and whether it is a folder.

    Names without an owner are sentence-transformers' own.

    Raises:
        EncoderError: it is not in the cache, and the hub cannot be reached.
    """
    name = spec.removeprefix("st:")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), True
    repository = name if "/" in name else f"sentence-transformers/{name}"
    check_at_hand(
        repository,
        MARKS,
        spec,
        "give a local folder (st:FOLDER), fetch it once where there is a network, or use tfidf",
    )
    return repository, False


def _load(where: str, is_local: bool, plan: EncoderPlan) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            where, device=plan.device, trust_remote_code=False, local_files_only=is_local
        )
    except Exception as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise EncoderError(
            f"{plan.text} cannot be loaded: {first}", "give the folder of a sentence-transformers model"
        ) from problem
    return model.eval()
