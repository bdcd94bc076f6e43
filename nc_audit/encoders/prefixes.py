"""A causal text tower on distinct beginnings of captions: what captions share from their start is computed once.

With a causal mask, what a token becomes depends on the tokens before it alone. Sorted captions share their beginnings
with their neighbours ("there are many ..."), nearly half of all tokens in UCM-Captions, so what works token by token
(norms, projections, perceptrons: nearly all multiplications) is done for the nodes of a tree of beginnings, and only
attention for each caption. Of the last block only what the end-of-text token needs is computed. Padding is not.

Shapes: B = captions; L = text positions; U = nodes, the distinct beginnings; D = width; H = heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nc_audit.encoders.blocks import attended_by, feed, heads_of

_MOST_PADDED = 4  # times as many positions as nodes, at most, for which a batch's attention is worked out


@dataclass(frozen=True)
class PrefixTree:
    """Token sequences as a tree of their distinct beginnings.

    Attributes:
        rows: which sequences, as positions among those given, int64 [B], in the order of the tree.
        token_U: token of each node, int64 [U].
        place_U: where the node stands first, counted through [B, L] row by row, int64 [U].
        node_BL: node of each position, int64 [B, L]; any node after the end of a sequence.
        end_B: node of the last token of each sequence, int64 [B].
        length_B: tokens of each sequence, int64 [B].
    """

    rows: Tensor
    token_U: Tensor
    place_U: Tensor
    node_BL: Tensor
    end_B: Tensor
    length_B: Tensor

    def to(self, device: str) -> PrefixTree:
        """The tree on a device; `rows` stay."""
        rest = (self.token_U, self.place_U, self.node_BL, self.end_B, self.length_B)
        return PrefixTree(self.rows, *(tensor.to(device) for tensor in rest))


def prefix_trees(tokens_BL: Tensor, length_B: Tensor, most_nodes: int) -> Iterator[PrefixTree]:
    """Trees that hold all sequences, each of `most_nodes` nodes at most where one sequence is not longer.

    Args:
        tokens_BL: token numbers, int64 [B, L], of any value after the end of a sequence.
        length_B: tokens of each sequence, 1..L, int64 [B].
        most_nodes: nodes of a tree, at most; its positions, padding included, are four times as many at most.
    """
    longest = int(length_B.max())
    is_in_BL = torch.arange(longest) < length_B[:, None]
    tokens_BL = tokens_BL[:, :longest].masked_fill(~is_in_BL, -1)
    order = torch.from_numpy(np.lexsort(tokens_BL.T.flip(0).numpy()))
    tokens_BL, length_B = tokens_BL[order], length_B[order]
    shared = (tokens_BL[1:] == tokens_BL[:-1]).to(torch.int64).cumprod(1).sum(1)
    shared = torch.minimum(shared, length_B[1:])
    added = [0, *(length_B[1:] - shared).tolist()]
    start = 0
    while start < len(order):
        stop, num_nodes, widest = start + 1, int(length_B[start]), int(length_B[start])
        while stop < len(order):
            wider = max(widest, int(length_B[stop]))
            padded = (stop + 1 - start) * wider
            if num_nodes + added[stop] > most_nodes or padded > _MOST_PADDED * most_nodes:
                break
            num_nodes, widest, stop = num_nodes + added[stop], wider, stop + 1
        yield _tree(
            order[start:stop], tokens_BL[start:stop, :widest], length_B[start:stop], shared[start : stop - 1]
        )
        start = stop


def _tree(rows: Tensor, tokens_BL: Tensor, length_B: Tensor, shared: Tensor) -> PrefixTree:
    """The tree of sorted sequences, each of which begins with that many tokens of the one before it."""
    at_L = torch.arange(tokens_BL.shape[1])
    is_new_BL = (at_L >= torch.cat([shared.new_zeros(1), shared])[:, None]) & (at_L < length_B[:, None])
    number_BL = is_new_BL.flatten().cumsum(0).view_as(is_new_BL) - 1
    # A position that is not new has the node of the nearest row before that is: all between share it.
    node_BL = number_BL.masked_fill(~is_new_BL, 0).cummax(0).values
    place_U = is_new_BL.flatten().nonzero()[:, 0]
    end_B = node_BL.gather(1, length_B[:, None] - 1)[:, 0]
    return PrefixTree(rows, tokens_BL.flatten()[place_U], place_U, node_BL, end_B, length_B)


def last_hidden(tower: Any, tree: PrefixTree) -> Tensor:
    """What the blocks of a causal text tower make of the last token of each sequence, [B, D].

    Args:
        tower: open_clip's own text tower, whose blocks are plain (`is_plain`).
        tree: on the tower's device.
    """
    dtype = tower.transformer.get_cast_dtype()
    position_U = tree.place_U % tree.node_BL.shape[1]
    hidden = tower.token_embedding(tree.token_U).to(dtype)
    hidden = hidden + tower.positional_embedding.to(dtype)[position_U]
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        hidden = feed(block, hidden, _attended(block.attn, block.ln_1(hidden), tree))
    seen = _attended_at_end(last.attn, last.ln_1(hidden), tree)
    return feed(last, hidden[tree.end_B], seen)


def _attended(attention: nn.MultiheadAttention, normed_UD: Tensor, tree: PrefixTree) -> Tensor:
    """Causal attention of every node to those before it, heads side by side, [U, D]."""
    of_nodes = functional.linear(normed_UD, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (heads_of(part, attention) for part in of_nodes[tree.node_BL].chunk(3, -1))
    seen_BHLd = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return seen_BHLd.transpose(1, 2).flatten(2).flatten(0, 1)[tree.place_U]


def _attended_at_end(attention: nn.MultiheadAttention, normed_UD: Tensor, tree: PrefixTree) -> Tensor:
    """Attention of the last token of each sequence to all of it, heads side by side, [B, D]."""
    is_in_BL = torch.arange(tree.node_BL.shape[1], device=normed_UD.device) < tree.length_B[:, None]
    return attended_by(
        attention, normed_UD[tree.end_B], normed_UD, lambda of_nodes: of_nodes[tree.node_BL], is_in_BL
    )
