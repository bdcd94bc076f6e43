"""Local embeddings for methods that use them: patches of images, words of captions, reduced and kept like the others.

Only encoders with a `tokens` method have them. Reduction is by principal components learnt from an even subset, kept
beside the shards; a token of padding is all zero, and stays so. Shards hold each image's tokens as one flat vector.

Shapes: N = images or captions; T = tokens; D = dimensions of a token; K = reduced ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nc_audit.embed import AHEAD, DECODERS, EmbeddingStore, decoded_ahead
from nc_audit.methods.projections import Projection, principal_projection
from nc_audit.run import digest_of, replacing

if TYPE_CHECKING:
    from nc_audit.encoders import ImageEncoder, TextEncoder

DIMS = 64
LEARNT_FROM = 512
PER_SHARD = 2048

Progress = Callable[[int, int], None]
T = TypeVar("T")


def has_tokens(encoder: Any) -> bool:
    """Whether an encoder exposes local embeddings."""
    return hasattr(encoder, "tokens")


def image_tokens(
    encoder: ImageEncoder,
    image_ids: Sequence[str],
    read: Callable[[int], bytes],
    store: EmbeddingStore,
    *,
    batch_size: int = 64,
    num_workers: int = DECODERS,
    progress: Progress | None = None,
) -> Tensor:
    """Local embeddings of images, shape [N, T, K]; all zero for an image that cannot be decoded.

    Args:
        encoder: fitted or frozen, with `tokens`.
        image_ids: distinct, in canonical order.
        read: bytes of an image by its position.
        store: where they are kept.
        batch_size: images per batch.
        num_workers: threads that decode.
        progress: called with images done and images in all.
    """

    def batches(at: Sequence[int]) -> Iterable[Tensor]:
        decoded = decoded_ahead(encoder, read, at, num_workers, AHEAD * batch_size)
        for start in range(0, len(at), batch_size):
            got = [image for image, _ in (next(decoded) for _ in at[start : start + batch_size])]
            found = [image for image in got if image is not None]
            tokens = encoder.tokens(torch.stack(found)) if found else None  # type: ignore[attr-defined]
            yield _spread(tokens, [image is not None for image in got])

    return _kept("image", encoder, image_ids, batches, store, progress)


def caption_tokens(
    encoder: TextEncoder,
    caption_ids: Sequence[str],
    captions: Sequence[str],
    store: EmbeddingStore,
    *,
    batch_size: int = 512,
    progress: Progress | None = None,
) -> Tensor:
    """Local embeddings of captions, shape [N, T, K]; positions past a caption's end are zero."""

    def batches(at: Sequence[int]) -> Iterable[Tensor]:
        for start in range(0, len(at), batch_size):
            yield encoder.tokens([captions[one] for one in at[start : start + batch_size]])  # type: ignore[attr-defined]

    return _kept("caption", encoder, caption_ids, batches, store, progress)


def _spread(tokens: Tensor | None, is_there: list[bool]) -> Tensor:
    """Tokens of the images that are there among zeros for the others."""
    if tokens is None:
        return torch.zeros(len(is_there), 1, 1)
    spread = torch.zeros(len(is_there), *tokens.shape[1:])
    spread[torch.tensor(is_there)] = tokens
    return spread


def _kept(
    side: str,
    encoder: ImageEncoder | TextEncoder,
    ids: Sequence[str],
    batches: Callable[[Sequence[int]], Iterable[Tensor]],
    store: EmbeddingStore,
    progress: Progress | None,
) -> Tensor:
    step = max(1, len(ids) // LEARNT_FROM)
    learnt_from = list(range(0, len(ids), step))[:LEARNT_FROM]
    digest = digest_of([encoder.digest, DIMS, [ids[at] for at in learnt_from]])
    path = store.folder / f"tokens-{side}-{digest[:16]}.safetensors"
    projection, num_tokens = _reduction(path, lambda: batches(learnt_from))
    dim = num_tokens * projection.matrix.shape[1]
    kind = f"{side}_tokens"
    _, known, _ = store.read(kind, digest, ids, dim)
    missing = [at for at, is_known in enumerate(known.tolist()) if not is_known]
    done = len(ids) - len(missing)
    for start in range(0, len(missing), PER_SHARD):
        rows = missing[start : start + PER_SHARD]
        reduced = [_reduced(tokens, projection, num_tokens) for tokens in batches(rows)]
        store.write(kind, digest, [ids[row] for row in rows], torch.cat(reduced), [None] * len(rows))
        done += len(rows)
        if progress:
            progress(done, len(ids))
    vectors, _, _ = store.read(kind, digest, ids, dim)
    return torch.from_numpy(vectors).view(len(ids), num_tokens, -1)


def _reduction(path: Path, learn: Callable[[], Iterable[Tensor]]) -> tuple[Projection, int]:
    """The projection of tokens and their number per image or caption, learnt once."""
    if not path.is_file():
        parts = list(learn())
        num_tokens = max(part.shape[1] for part in parts)
        tokens = torch.cat(
            [part.flatten(0, 1)[part.flatten(0, 1).abs().sum(1) > 0] for part in parts if part.shape[2] > 1]
        )
        projection = principal_projection(tokens, DIMS, whitening=0.5)
        with replacing(path) as partial:
            save_file(
                {
                    "mean": projection.mean.contiguous(),
                    "matrix": projection.matrix.contiguous(),
                    "num_tokens": torch.tensor(num_tokens),
                },
                partial,
            )
    held = load_file(path)
    return Projection(held["mean"], held["matrix"]), int(held["num_tokens"])


def _reduced(tokens_NTD: Tensor, projection: Projection, num_tokens: int) -> Tensor:
    """Projected tokens, padded to `num_tokens` with zeros (or cut to it) and flattened."""
    is_there = tokens_NTD.abs().sum(2, keepdim=True) > 0
    if tokens_NTD.shape[2] != len(projection.mean):  # a batch without one image
        return torch.zeros(len(tokens_NTD), num_tokens * projection.matrix.shape[1])
    reduced = projection(tokens_NTD.float()) * is_there
    fixed = torch.zeros(len(reduced), num_tokens, reduced.shape[2])
    most = min(num_tokens, reduced.shape[1])
    fixed[:, :most] = reduced[:, :most]
    return fixed.flatten(1)
