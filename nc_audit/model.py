"""The model of a run: projections and heads, from frozen embeddings to one space, as one safetensors file.

Shapes: I = images; C = captions; D = dimensions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nc_audit.errors import RunError
from nc_audit.run import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from nc_audit.methods.hashing import HashHeads
    from nc_audit.methods.heads import Heads
    from nc_audit.methods.projections import Projection


@dataclass(frozen=True)
class Model:
    """Final heads with the projections of their inputs.

    Without heads (None) the projections alone lead to one space, as those of aligned encoders do.
    Of hash heads, the signs of the unit vectors are the codes (`methods.hashing.binary_codes`).
    """

    heads: Heads | HashHeads | None
    image_projection: Projection
    caption_projection: Projection

    def embed(self, image_ID: Tensor, caption_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and captions in the common space.

        Args:
            image_ID: image embeddings as the encoder gives them, shape [I, D].
            caption_CD: caption embeddings, shape [C, D'].

        Returns:
            Shapes [I, width] and [C, width].
        """
        image, caption = self.image_projection(image_ID), self.caption_projection(caption_CD)
        if self.heads is not None:
            return self.heads.embed(image, caption)
        from nc_audit.methods.projections import unit_vectors

        return unit_vectors(image), unit_vectors(caption)

    def to(self, device: str) -> Model:
        """The same with heads on a device; what they make of vectors then lies there."""
        return self if self.heads is None else replace(self, heads=self.heads.to(device))

    def save(self, path: Path) -> None:
        """Write the model atomically."""
        from safetensors.torch import save_file

        heads = self.heads
        state = {} if heads is None else heads.state_dict()
        tensors = {f"heads.{name}": value for name, value in state.items()}
        for side, projection in (("image", self.image_projection), ("caption", self.caption_projection)):
            tensors |= {
                f"{side}_projection.mean": projection.mean,
                f"{side}_projection.matrix": projection.matrix,
            }
        with replacing(path) as partial:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()},
                partial,
                {"sizes": json.dumps(None if heads is None else heads.sizes)},
            )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a model that `save` wrote.

        Raises:
            RunError: the file is damaged, or another version made it.
        """
        from safetensors import SafetensorError, safe_open

        from nc_audit.methods.hashing import HashHeads
        from nc_audit.methods.heads import Heads
        from nc_audit.methods.projections import Projection

        heads: Heads | HashHeads | None = None
        try:
            with safe_open(path, "pt") as file:
                sizes = json.loads(file.metadata()["sizes"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if sizes is not None:
                heads = HashHeads(**sizes) if "bits" in sizes else Heads(**sizes)
                heads.load_state_dict(
                    {n.removeprefix("heads."): t for n, t in tensors.items() if n.startswith("heads.")}
                )
                heads.eval()
            image, caption = (
                Projection.of(tensors[f"{side}_projection.mean"], tensors[f"{side}_projection.matrix"])
                for side in ("image", "caption")
            )
        except (SafetensorError, RuntimeError, TypeError, KeyError) as problem:
            raise RunError(
                f"{path.name} is damaged or of another version of nc-audit",
                "run nc-audit score with --force on the dataset to make it anew",
            ) from problem
        return cls(heads, image, caption)
