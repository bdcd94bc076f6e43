"""Small heads that carry frozen image and caption embeddings into one space.

Shapes: B = vectors; D = dimensions; I = images; C = captions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nc_audit.room import room_for


class Dropout(nn.Module):
    """Dropout by one random byte an entry: the chance in 256ths, at a fifth of the cost of torch's on a processor.

    Args:
        chance: of an entry to be dropped, 0..1, rounded to 1/256; the others grow so that the mean stays.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.dropped_of_256 = min(255, round(256 * chance))

    def forward(self, values: Tensor) -> Tensor:
        """The values with some set to 0 in training, as they are in evaluation."""
        if not self.training or self.dropped_of_256 == 0:
            return values
        num = values.numel()
        words = torch.randint(-(2**63), 2**63 - 1, ((num + 7) // 8,), device=values.device)
        stays = words.view(torch.uint8)[:num].view(values.shape) >= self.dropped_of_256
        return values * stays.to(values.dtype).mul_(256 / (256 - self.dropped_of_256))


class Head(nn.Module):
    """One side's head: a linear map plus a small two-layer correction, to unit vectors."""

    def __init__(
        self, num_inputs: int, width: int, hidden: int, input_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_inputs)
        self.input_dropout = Dropout(input_dropout)
        self.linear = nn.Linear(num_inputs, width)
        self.correction = nn.Sequential(
            nn.Linear(num_inputs, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Unit vectors, shape [B, width], float32 whatever the precision of the products."""
        inputs = self.input_dropout(self.norm(vectors_BD))
        return functional.normalize((self.linear(inputs) + self.correction(inputs)).float(), dim=1)


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
    def embed(
        self,
        image_ID: Tensor,
        caption_CD: Tensor,
        image_at: Tensor | None = None,
        caption_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of all images and captions, or of those named, in evaluation mode.

        Args:
            image_ID: what the image head takes in, shape [I, D].
            caption_CD: what the caption head takes in, shape [C, D'].
            image_at: indices of the images wanted; all when not given.
            caption_at: indices of the captions wanted, likewise.

        Returns:
            Shapes [I, width] and [C, width], or as many rows as are wanted.
        """
        was_training = self.training
        self.eval()
        image = _in_parts(self.image, image_ID, image_at)
        caption = _in_parts(self.caption, caption_CD, caption_at)
        self.train(was_training)
        return image, caption


def _in_parts(head: Head, vectors_ND: Tensor, at: Tensor | None, part: int = 8_192) -> Tensor:
    """What a head makes of vectors or of some of them, a part at a time and into one tensor, [N, width]."""
    num = len(vectors_ND) if at is None else len(at)
    device = head.linear.weight.device
    width = head.linear.out_features
    made = room_for(num, width) if device.type == "cpu" else torch.empty(num, width, device=device)
    for start in range(0, num, part):
        chosen = slice(start, start + part)
        made[chosen] = head((vectors_ND[chosen] if at is None else vectors_ND[at[chosen]]).to(device))
    return made
