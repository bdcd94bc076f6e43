"""Small heads that carry frozen image and caption embeddings into one space.

Shapes: B = vectors; D = dimensions; I = images; C = captions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Head(nn.Module):
    """One side's head: a linear map plus a small two-layer correction, to unit vectors."""

    def __init__(
        self, num_inputs: int, width: int, hidden: int, input_dropout: float, dropout: float
    ) -> None:
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

    def __init__(
        self,
        num_image: int,
        num_caption: int,
        width: int = 256,
        hidden: int = 512,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
        log_scale: float = 2.3,
        max_scale: float = 60.0,
    ) -> None:
        super().__init__()
        self.sizes = {"num_image": num_image, "num_caption": num_caption, "width": width, "hidden": hidden}
        self.image = Head(num_image, width, hidden, input_dropout, dropout)
        self.caption = Head(num_caption, width, hidden, input_dropout, dropout)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.max_log_scale = math.log(max_scale)

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
