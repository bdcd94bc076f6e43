from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.encoders.prefixes import prefix_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=30)


def trees_of(sequences, most_nodes=10**6, after=0):
    longest = max(map(len, sequences)) + 2
    tokens = torch.tensor([row + [after] * (longest - len(row)) for row in sequences])
    return list(prefix_trees(tokens, torch.tensor([len(row) for row in sequences]), most_nodes))


@given(SEQUENCES, st.integers(1, 40), st.integers(0, 3))
def test_every_sequence_is_in_one_tree_and_read_along_its_nodes(sequences, most_nodes, after):
    found = []
    for tree in trees_of(sequences, most_nodes, after):
        for row, nodes, length, end in zip(tree.rows, tree.node_BL, tree.length_B, tree.end_B, strict=True):
            assert tree.token_U[nodes[:length]].tolist() == sequences[row]
            assert end == nodes[length - 1]
            found.append(int(row))
    assert sorted(found) == list(range(len(sequences)))


@given(SEQUENCES)
def test_nodes_are_the_distinct_beginnings_each_where_it_stands_first(sequences):
    (tree,) = trees_of(sequences)
    longest = tree.node_BL.shape[1]
    begun = {}
    for row, nodes in zip(tree.rows.tolist(), tree.node_BL.tolist(), strict=True):
        for at in range(len(sequences[row])):
            begun.setdefault(tuple(sequences[row][: at + 1]), set()).add(nodes[at])
    assert sorted(node for nodes in begun.values() for node in nodes) == list(range(len(tree.token_U)))
    assert all(len(nodes) == 1 for nodes in begun.values())
    for node, place in enumerate(tree.place_U.tolist()):
        row, at = divmod(place, longest)
        assert tree.node_BL[row, at] == node
        assert at < tree.length_B[row]


@given(SEQUENCES, st.integers(1, 40))
def test_a_tree_of_more_than_one_sequence_keeps_to_its_size(sequences, most_nodes):
    for tree in trees_of(sequences, most_nodes):
        if len(tree.rows) > 1:
            assert len(tree.token_U) <= most_nodes
            assert tree.node_BL.numel() <= 4 * most_nodes
