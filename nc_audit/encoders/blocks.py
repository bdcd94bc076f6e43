"""The blocks of open_clip's transformers taken apart, to compute only what is needed of them.

Shapes: B = sequences; L = positions; D = width; H = heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional


def is_plain(transformer: Any) -> bool:
    """Whether blocks are of open_clip's plain kind, whose parts are known here."""
    return all(
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and type(block.attn) is nn.MultiheadAttention
        and block.attn.in_proj_weight is not None
        and block.attn.bias_k is None
        and not block.attn.add_zero_attn
        for block in transformer.resblocks
    )


def feed(block: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """A block after its attention, token by token, [..., D]."""
    hidden = hidden + block.ls_1(block.attn.out_proj(seen))
    return hidden + block.ls_2(block.mlp(block.ln_2(hidden)))


def attended_by(
    attention: nn.MultiheadAttention,
    asking_BD: Tensor,
    normed: Tensor,
    by_sequence: Callable[[Tensor], Tensor],
    is_in_BL: Tensor | None = None,
) -> Tensor:
    """Attention of one token of each sequence to all of it, heads side by side, before `out_proj`.

    `nn.MultiheadAttention` given one token and a sequence would copy its weights for every position.

    Args:
        attention: one whose three projections lie in one matrix.
        asking_BD: the tokens that attend, normed.
        normed: all tokens, normed, [..., D].
        by_sequence: what was made of all tokens, [..., 2D], as [B, L, 2D].
        is_in_BL: which positions are of the sequence; all where not given.

    Returns:
        Shape [B, D].
    """
    width, weight, bias = asking_BD.shape[1], attention.in_proj_weight, attention.in_proj_bias
    query_B1D = functional.linear(asking_BD, weight[:width], bias[:width])[:, None]
    both_BL2D = by_sequence(functional.linear(normed, weight[width:], bias[width:]))
    query, key, value = (heads_of(part, attention) for part in (query_B1D, *both_BL2D.chunk(2, -1)))
    mask = None if is_in_BL is None else is_in_BL[:, None, None, :]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).flatten(1)


def heads_of(part_BLD: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """[B, L, D] as [B, H, L, D / H]."""
    return part_BLD.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
