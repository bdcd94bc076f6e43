from __future__ import annotations

import pytest
import torch

from nc_audit.methods.heads import Heads


def test_embeddings_are_unit_vectors_and_dropout_is_off():
    heads = Heads(6, 5, width=8, hidden=16, input_dropout=0.5, dropout=0.5).train()
    image, caption = heads.embed(torch.randn(7, 6), torch.randn(9, 5))
    assert (image.shape, caption.shape) == ((7, 8), (9, 8))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(caption.norm(dim=1), torch.ones(9))
    assert heads.training
    rows = torch.randn(7, 6)
    assert torch.equal(heads.embed(rows, torch.randn(1, 5))[0], heads.embed(rows, torch.randn(1, 5))[0])


def test_more_rows_than_one_chunk():
    heads = Heads(3, 3, width=2, hidden=4)
    rows = torch.randn(16_384 + 5, 3)
    image, _ = heads.embed(rows, rows[:1])
    torch.testing.assert_close(image[-5:], heads.embed(rows[-5:], rows[:1])[0])


@pytest.mark.parametrize(("log_scale", "expected"), [(-1.0, 1.0), (2.0, 7.389056), (9.0, 60.0)])
def test_the_scale_keeps_its_bounds(log_scale, expected):
    assert Heads(2, 2, log_scale=log_scale, max_scale=60.0).scale().item() == pytest.approx(
        expected, rel=1e-5
    )
