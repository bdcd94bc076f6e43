from __future__ import annotations

import numpy as np
import oracles
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import unit_vectors

from nc_audit.methods.neighbours import nearest_references
from nc_audit.methods.neighbours import neighbour_distance as of_looked_up


def neighbour_distance(
    query: torch.Tensor,
    other: torch.Tensor,
    reference: torch.Tensor,
    reference_other: torch.Tensor,
    trust: torch.Tensor,
    excluded: torch.Tensor,
    *options: float,
) -> torch.Tensor:
    """Both steps, with every reference looked up."""
    nearest, at = nearest_references(query, reference, len(reference), block=4)
    return of_looked_up(nearest, at, excluded.gather(1, at), other, reference_other, trust, *options)


def test_looking_up_enough_gives_the_same_as_looking_up_all():
    query, other, reference, reference_other, trust, excluded = drawn(3)
    nearest, at = nearest_references(query, reference, 4 + int(excluded.sum(1).max()))
    found = of_looked_up(nearest, at, excluded.gather(1, at), other, reference_other, trust, 4)
    whole = neighbour_distance(query, other, reference, reference_other, trust, excluded, 4)
    np.testing.assert_allclose(found, whole, atol=1e-12)


def drawn(seed: int, num: int = 6, references: int = 15) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    return (
        unit_vectors(num, 5, seed),
        unit_vectors(num, 5, seed + 1),
        unit_vectors(references, 5, seed + 2),
        unit_vectors(references, 5, seed + 3),
        torch.from_numpy(rng.random(references)),
        torch.from_numpy(rng.random((num, references)) < 0.3),
    )


@given(strategies.seeds, st.integers(1, 30), st.sampled_from([0.1, 1.0, 5.0]))
def test_equals_the_oracle(seed, num_neighbours, sharpness):
    args = drawn(seed)
    expected = oracles.neighbour_distance(*(a.numpy() for a in args), num_neighbours, sharpness)
    found = neighbour_distance(*args, num_neighbours, sharpness)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert ((found >= 0) & (found <= 2)).all()


def test_without_sharpness_all_neighbours_count_alike():
    args = drawn(0)
    expected = oracles.neighbour_distance(*(a.numpy() for a in args), 9, 0.0)
    np.testing.assert_allclose(neighbour_distance(*args, 9, 0.0), expected, atol=1e-9)


def test_excluded_references_have_no_say():
    query, other, reference, reference_other, trust, excluded = drawn(0)
    before = neighbour_distance(query, other, reference, reference_other, trust, excluded, 4)
    # The pairs themselves, with the most misleading other side, stand among the references but are excluded.
    own = torch.cat([excluded, torch.ones(6, 6, dtype=torch.bool)], 1)
    after = neighbour_distance(
        query,
        other,
        torch.cat([reference, query]),
        torch.cat([reference_other, -other]),
        torch.cat([trust, torch.ones(6, dtype=torch.float64)]),
        own,
        4,
    )
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_references_without_trust_have_no_say():
    args = list(drawn(1))
    args[5] = torch.zeros_like(args[5])
    args[4] = args[4].clone()
    args[4][3] = 0.0
    everyone = neighbour_distance(*args, 15)
    args[3] = args[3].clone()
    args[3][3] *= -1
    np.testing.assert_allclose(neighbour_distance(*args, 15), everyone, atol=1e-12)


def test_one_where_nobody_may_vote():
    args = list(drawn(2))
    args[5] = torch.ones_like(args[5])
    assert neighbour_distance(*args, 5).tolist() == [1.0] * 6
    args[5] = torch.zeros_like(args[5])
    args[4] = torch.zeros_like(args[4])
    assert neighbour_distance(*args, 5).tolist() == [1.0] * 6


def test_agreeing_neighbours_give_zero_and_contradicting_ones_two():
    side = unit_vectors(1, 5, 3)
    reference = unit_vectors(8, 5, 4)
    trust, free = torch.ones(8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.bool)
    same = neighbour_distance(side, side, reference, side.repeat(8, 1), trust, free, 5)
    opposite = neighbour_distance(side, side, reference, -side.repeat(8, 1), trust, free, 5)
    np.testing.assert_allclose(same, 0.0, atol=1e-12)
    np.testing.assert_allclose(opposite, 2.0, atol=1e-12)
