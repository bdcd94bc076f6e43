from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nc_audit.methods.heads import Dropout, Head, HeadInputs, Heads, HeadStack


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


def plain(head: Head, vectors: torch.Tensor, keeps_input=None, keeps_hidden=None) -> torch.Tensor:
    """The head by its formula, its gradient torch's."""
    inputs = functional.layer_norm(vectors, vectors.shape[1:])
    inputs = inputs if keeps_input is None else inputs * keeps_input
    hidden = functional.gelu(head.correction[0](inputs))
    hidden = hidden if keeps_hidden is None else hidden * keeps_hidden
    return functional.normalize(head.linear(inputs) + head.correction[3](hidden), dim=1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_head_and_its_gradient_are_those_of_the_formula(dropout):
    torch.manual_seed(1)
    head = Head(6, 4, 10, dropout, dropout).double()
    vectors, weight = torch.randn(9, 6).double(), torch.randn(9, 4).double()
    head(vectors)  # what is dropped is drawn the first time
    torch.manual_seed(2)
    found = head(vectors)
    (weight * found).sum().backward()
    gradients = [one.grad.clone() for one in head.parameters()]
    head.zero_grad()
    torch.manual_seed(2)
    factors = (
        module.factors((9, dim), torch.float64, vectors.device)
        for module, dim in ((head.input_dropout, 6), (head.correction[2], 10))
    )
    expected = plain(head, vectors, *factors)
    (weight * expected).sum().backward()
    torch.testing.assert_close(found, expected)
    for gradient, one in zip(gradients, head.parameters(), strict=True):
        torch.testing.assert_close(gradient, one.grad)


@pytest.mark.parametrize("lowered", [False, True])
def test_stacked_heads_are_the_heads_and_train_them(lowered):
    torch.manual_seed(1)
    heads = [Head(6, 4, 10, 0.0, 0.0) for _ in range(3)]
    vectors = torch.randn(3, 9, 6)
    before = torch.stack([plain(head, some) for head, some in zip(heads, vectors, strict=True)]).detach()
    stack = HeadStack(heads)
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        found = stack(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, before, atol=0.02 if lowered else 1e-6, rtol=0)
    found[..., 0].sum().backward()
    assert all(one.grad.abs().sum() > 0 for one in stack.weights)
    with torch.no_grad():
        for one in stack.weights:
            one.sub_(0.5 * one.grad)
    after = torch.stack([head(some) for head, some in zip(heads, vectors, strict=True)]).detach()
    torch.testing.assert_close(stack(vectors), after)
    assert not torch.allclose(after, before, atol=0.01)


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_normalised_ahead_give_the_same_bits(kept, dtype, monkeypatch):
    torch.manual_seed(1)
    heads, vectors = Heads(6, 5, 4, 10), [torch.randn(50, 6).to(kept), torch.randn(70, 5).to(kept)]
    at = [torch.randperm(50)[:20], torch.randperm(70)[:30]]
    monkeypatch.setattr("nc_audit.methods.heads._AT_ONCE", 16)
    ahead = [HeadInputs.ahead(side, dtype) for side in vectors]
    assert all(side.is_normed and side.vectors.dtype == dtype for side in ahead)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for found, expected in zip(heads.embed(*ahead, *at), heads.embed(*vectors, *at), strict=True):
            assert torch.equal(found, expected)
    monkeypatch.setattr("nc_audit.methods.heads._MOST_AHEAD", 50 * 6 * dtype.itemsize - 1)
    large = HeadInputs.ahead(vectors[0], dtype)
    assert not large.is_normed
    assert large.vectors is vectors[0]


def test_dropout_takes_other_factors_every_time():
    torch.manual_seed(0)
    dropout = Dropout(0.5)
    masks = torch.stack([dropout(torch.ones(40, 30)) for _ in range(50)])
    assert (masks.mean(0) - 1).abs().max() < 1  # no entry is always dropped, or always kept
    together = (masks.flatten(1)[:, :-1] * masks.flatten(1)[:, 1:]).mean()
    assert together.item() == pytest.approx(1, abs=0.05)
