from __future__ import annotations

import numpy as np
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.methods.uncertainty import energy, energy_separation, relative_energy

energies = st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=30)


@given(energies, st.floats(-10, 5), st.floats(0.1, 5))
def test_equals_the_formula(drawn, low, gap):
    high = low + gap
    expected = [max(0.0, u - low if clean else high - u) ** 2 for u, clean in drawn]
    value, clean = (torch.tensor(side) for side in zip(*drawn, strict=True))
    found = energy_separation(value.double(), clean, low, high)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_clean_energies_are_pulled_down_and_others_lifted_only_beyond_their_bounds():
    value = torch.tensor([-3.0, 1.0, 3.0, -3.0], requires_grad=True)
    is_clean = torch.tensor([True, True, False, False])
    energy_separation(value, is_clean, -1.0, 2.0).sum().backward()
    assert value.grad.tolist() == [0.0, 4.0, 0.0, -10.0]


@given(strategies.logits(), st.integers(1, 4))
def test_repeating_every_candidate_leaves_the_relative_energy(logits, times):
    num = torch.tensor([logits.shape[1]])
    once = relative_energy(energy(logits), num)
    repeated = relative_energy(energy(logits.repeat(1, times)), num * times)
    np.testing.assert_allclose(repeated, once, atol=1e-9)


@given(strategies.logits())
def test_the_relative_energy_lies_between_the_extreme_logits(logits):
    found = relative_energy(energy(logits), torch.tensor([logits.shape[1]]))
    assert (found >= -logits.amax(1) - 1e-9).all()
    assert (found <= -logits.mean(1) + 1e-9).all()
