"""Small heads that carry frozen image and caption embeddings into one space.

Shapes: B = vectors; D = dimensions; I = images; C = captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nc_audit.methods.rows import rows_at
from nc_audit.room import room_for

_DRAWN = 1 << 20  # random factors of a dropout, at least
_EPS = 1e-5  # added to the variance of what is normalised
_AT_ONCE = 2_048  # vectors: what heads make of them on the way stays in the cache
_MOST_AHEAD = 1 << 28  # bytes of inputs that are normalised ahead


@dataclass(frozen=True)
class HeadInputs:
    """What a head takes in, shape [..., D]; normalised already, and in the precision of its products, or not."""

    vectors: Tensor
    is_normed: bool = False

    @classmethod
    def ahead(cls, vectors_ND: Tensor, dtype: torch.dtype) -> HeadInputs:
        """Inputs that are met many times, normalised once; as they are where that would take much memory.

        Heads give the same bits either way.

        Args:
            vectors_ND: as they are given, in half precision or more.
            dtype: what heads multiply in.
        """
        if vectors_ND.numel() * dtype.itemsize > _MOST_AHEAD:
            return cls(vectors_ND)
        normed = torch.empty_like(vectors_ND, dtype=dtype)
        for part, made in zip(vectors_ND.split(_AT_ONCE), normed.split(_AT_ONCE), strict=True):
            made.copy_(_normed(part))
        return cls(normed, is_normed=True)

    def __getitem__(self, at: Any) -> HeadInputs:
        some = rows_at(self.vectors, at) if isinstance(at, Tensor) else self.vectors[at]
        return HeadInputs(some, self.is_normed)

    def __len__(self) -> int:
        return len(self.vectors)

    def to(self, device: torch.device) -> HeadInputs:
        """The same on a device."""
        return HeadInputs(self.vectors.to(device), self.is_normed)


def _normed(vectors: Tensor) -> Tensor:
    """Of mean 0 and variance 1, float32 or more."""
    full = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return functional.layer_norm(full, full.shape[-1:], eps=_EPS)


class Dropout(nn.Module):
    """Dropout whose random factors are drawn once, and then taken from a random place on every time.

    To draw them anew costs a processor about as much as the product that follows.

    Args:
        chance: of an entry to be dropped, 0..1, rounded to 1/256; the others grow so that the mean stays.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.dropped_of_256 = min(255, round(256 * chance))
        self._drawn = torch.empty(0)

    def factors(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What entries are multiplied by; None where all stay as they are."""
        if not self.training or self.dropped_of_256 == 0:
            return None
        num = math.prod(shape)
        drawn = self._drawn
        if len(drawn) < 2 * num or drawn.dtype != dtype or drawn.device != device:
            size = max(_DRAWN, 4 * num)
            words = torch.randint(-(2**63), 2**63 - 1, ((size + 7) // 8,))
            stays = words.view(torch.uint8) >= self.dropped_of_256
            drawn = self._drawn = stays.to(dtype).mul_(256 / (256 - self.dropped_of_256)).to(device)
        start = int(torch.randint(len(drawn) - num + 1, ()))
        return drawn[start : start + num].view(shape)

    def forward(self, values: Tensor) -> Tensor:
        """The values with some set to 0 in training, as they are in evaluation."""
        factors = self.factors(values.shape, values.dtype, values.device)
        return values if factors is None else values * factors


class Head(nn.Module):
    """One side's head: a linear map plus a small two-layer correction, to unit vectors."""

    def __init__(
        self, num_inputs: int, width: int, hidden: int, input_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.input_dropout = Dropout(input_dropout)
        self.linear = nn.Linear(num_inputs, width)
        self.correction = nn.Sequential(
            nn.Linear(num_inputs, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, width)
        )

    @property
    def layers(self) -> tuple[nn.Linear, Dropout, nn.Linear]:
        """Of the correction: up to the hidden units, their dropout, and down from them."""
        rise, _, dropout, fall = self.correction
        return cast("tuple[nn.Linear, Dropout, nn.Linear]", (rise, dropout, fall))

    def forward(self, inputs: Tensor | HeadInputs) -> Tensor:
        """Unit vectors of inputs [B, D], shape [B, width], float32 whatever the precision of the products.

        The unit vector along linear(u) + correction(u), with u the inputs normalised (without scale and shift: the maps
        have both) and after dropout. The inputs are frozen: no gradient goes into them. They may be kept in half
        precision.
        """
        return _unit_vectors(_given(inputs)[None], [weights[None] for weights in _weights(self)], self)[0]


class HeadStack(nn.Module):
    """Heads of one kind that train side by side: one product for all of them.

    It holds the weights; the heads' own become views of them, so that they follow.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        stacked = [
            torch.stack(same).detach() for same in zip(*(_weights(head) for head in heads), strict=True)
        ]
        self.weights = nn.ParameterList(stacked)
        for number, head in enumerate(heads):
            both, both_bias, fall, fall_bias = (one[number] for one in stacked)
            width = len(fall)
            rise_of, _, fall_of = head.layers
            head.linear.weight.data, head.linear.bias.data = both[:width], both_bias[:width]
            rise_of.weight.data, rise_of.bias.data = both[width:], both_bias[width:]
            fall_of.weight.data, fall_of.bias.data = fall, fall_bias
        self.kind = heads[0]

    def forward(self, inputs: Tensor | HeadInputs) -> Tensor:
        """Unit vectors of inputs [K, B, D] by each of K heads, shape [K, B, width]."""
        return _unit_vectors(_given(inputs), list(self.weights), self.kind)


def _given(inputs: Tensor | HeadInputs) -> HeadInputs:
    return HeadInputs(inputs) if isinstance(inputs, Tensor) else inputs


def _weights(head: Head) -> tuple[Tensor, ...]:
    """Both maps of the inputs in one, and their biases; the second layer's."""
    rise, _, fall = head.layers
    return (
        torch.cat([head.linear.weight, rise.weight]),
        torch.cat([head.linear.bias, rise.bias]),
        fall.weight,
        fall.bias,
    )


def _unit_vectors(given: HeadInputs, weights: Sequence[Tensor], kind: Head) -> Tensor:
    """What heads of a kind, with these weights, make of inputs [K, B, D], in autocast's precision."""
    device = given.vectors.device
    lowered = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if lowered else weights[0].dtype
    shape, hidden = given.vectors.shape, weights[2].shape[2]
    with torch.autocast(device.type, enabled=False):
        normed = given.vectors if given.is_normed else _normed(given.vectors.detach())
        return _UnitVectors.apply(
            normed.to(dtype),
            *weights,
            kind.input_dropout.factors(shape[1:], dtype, device),  # the same entries of every head
            kind.layers[1].factors((shape[1], hidden), dtype, device),
        )


class _UnitVectors(torch.autograd.Function):
    """`Head.forward` of several heads, with its gradient worked out by hand.

    Both maps of the inputs are one product, and nothing is kept or computed that the gradient does not need.
    Shapes: K = heads; W = width; H = hidden units; T = W + H.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normed_KBD: Tensor,
        both_KTD: Tensor,
        both_bias_KT: Tensor,
        fall_KWH: Tensor,
        fall_bias_KW: Tensor,
        keeps_input: Tensor | None,
        keeps_hidden: Tensor | None,
    ) -> Tensor:
        width, dtype = fall_KWH.shape[1], normed_KBD.dtype
        inputs = normed_KBD if keeps_input is None else normed_KBD * keeps_input
        both = both_KTD.to(dtype)
        bias = both_bias_KT.clone()
        bias[:, :width] += fall_bias_KW
        mapped = torch.baddbmm(bias[:, None].to(dtype), inputs, both.mT)
        risen = mapped[..., width:]
        bent = functional.gelu(risen)
        if keeps_hidden is not None:
            bent.mul_(keeps_hidden)
        fall = fall_KWH.to(dtype)
        vectors = torch.baddbmm(mapped[..., :width], bent, fall.mT).to(both_KTD.dtype)
        length = torch.linalg.vector_norm(vectors, dim=2, keepdim=True).clamp_min_(1e-12)
        unit = vectors / length
        ctx.save_for_backward(inputs, risen, keeps_hidden, bent, fall, unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_KBW: Tensor) -> tuple[Tensor | None, ...]:
        inputs, risen, keeps_hidden, bent, fall, unit, length = ctx.saved_tensors
        width, full = unit.shape[2], unit.dtype
        along = torch.linalg.vecdot(gradient_KBW, unit)[..., None]
        # apart from the place it takes below, as products copy what is not in one piece
        of_sum = torch.addcmul(gradient_KBW, unit, along, value=-1).div_(length).to(inputs.dtype)
        of_bent = of_sum @ fall
        if keeps_hidden is not None:
            of_bent.mul_(keeps_hidden)
        of_mapped = inputs.new_empty(*unit.shape[:2], width + bent.shape[2])
        of_mapped[..., :width] = of_sum
        torch.ops.aten.gelu_backward.grad_input(of_bent, risen, grad_input=of_mapped[..., width:])
        of_bias = of_mapped.sum(1).to(full)
        return (
            None,
            (of_mapped.mT @ inputs).to(full),
            of_bias,
            (of_sum.mT @ bent).to(full),
            of_bias[:, :width],
            None,
            None,
        )


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
        image_in: Tensor | HeadInputs,
        caption_in: Tensor | HeadInputs,
        image_at: Tensor | None = None,
        caption_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of all images and captions, or of those named, in evaluation mode.

        Args:
            image_in: what the image head takes in, shape [I, D].
            caption_in: what the caption head takes in, shape [C, D'].
            image_at: indices of the images wanted; all when not given.
            caption_at: indices of the captions wanted, likewise.

        Returns:
            Shapes [I, width] and [C, width], or as many rows as are wanted.
        """
        was_training = self.training
        self.eval()
        image = _in_parts(self.image, _given(image_in), image_at)
        caption = _in_parts(self.caption, _given(caption_in), caption_at)
        self.train(was_training)
        return image, caption


def _in_parts(head: Head, inputs: HeadInputs, at: Tensor | None) -> Tensor:
    """What a head makes of inputs [N, D] or of some of them, a part at a time and into one tensor, [N, width]."""
    num = len(inputs) if at is None else len(at)
    device = head.linear.weight.device
    width = head.linear.out_features
    made = room_for(num, width) if device.type == "cpu" else torch.empty(num, width, device=device)
    for start in range(0, num, _AT_ONCE):
        chosen = slice(start, start + _AT_ONCE)
        made[chosen] = head(inputs[chosen if at is None else at[chosen]].to(device))
    return made
