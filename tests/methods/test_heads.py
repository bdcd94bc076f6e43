from __future__ import annotations

import pytest
import torch

from nc_audit.methods.heads import Dropout, Heads


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


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(chance):
    torch.manual_seed(0)
    dropout = Dropout(chance)
    found = dropout(torch.ones(301, 401))
    dropped = (found == 0).double().mean().item()
    assert dropped == pytest.approx(round(256 * chance) / 256, abs=0.005)
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    assert len(found.unique()) == 1 + (chance > 0)
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


def test_dropped_entries_follow_the_seed_and_get_no_gradient():
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        values = torch.ones(50, 7, requires_grad=True)
        Dropout(0.5)(values).sum().backward()
        masks.append(values.grad)
    assert torch.equal(*masks)
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}
