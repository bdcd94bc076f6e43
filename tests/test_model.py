from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nc_audit.errors import RunError
from nc_audit.methods.heads import Heads
from nc_audit.methods.projections import Projection, principal_projection
from nc_audit.model import Model


@pytest.fixture
def model() -> Model:
    """Untrained heads behind a projection of 12 dimensions to 6, and captions as they are."""
    generator = torch.Generator().manual_seed(0)
    heads = Heads(6, 5, width=8, hidden=16, input_dropout=0.2, dropout=0.5)
    heads.eval()
    return Model(
        heads, principal_projection(torch.randn(50, 12, generator=generator), 6, 0.5), Projection.identity(5)
    )


def test_a_saved_model_comes_back_exactly(model, tmp_path):
    path = tmp_path / "model" / "heads.safetensors"
    model.save(path)
    again = Model.load(path)
    for name, value in model.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[name], value), name
    for mine, theirs in (
        (model.image_projection, again.image_projection),
        (model.caption_projection, again.caption_projection),
    ):
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.matrix, theirs.matrix)
    assert again.heads.sizes == model.heads.sizes
    assert not again.heads.training
    image, caption = torch.randn(9, 12), torch.randn(4, 5)
    # Only nearly equal: a matrix that is laid out by columns multiplies in another order.
    for one, other in zip(model.embed(image, caption), again.embed(image, caption), strict=True):
        torch.testing.assert_close(one, other)
    third = Model.load(path)
    for one, other in zip(third.embed(image, caption), again.embed(image, caption), strict=True):
        assert torch.equal(one, other)


def test_the_logit_scale_comes_back(model, tmp_path):
    model.heads.log_scale.data.fill_(3.7)
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(Model.load(tmp_path / "m.safetensors").heads.scale(), model.heads.scale())


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    model.save(tmp_path / "a")
    model.save(tmp_path / "b")
    Model.load(tmp_path / "a").save(tmp_path / "c")
    first = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == first
    assert (tmp_path / "c").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_embeddings_go_through_projection_and_heads(model):
    image, caption = torch.randn(3, 12), torch.randn(2, 5)
    expected = model.heads.embed(model.image_projection(image), caption)
    for one, other in zip(model.embed(image, caption), expected, strict=True):
        assert torch.equal(one, other)


def test_a_file_that_is_cut_off_is_not_read(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"m\.safetensors is damaged or of another version"):
        Model.load(path)


def test_a_model_of_a_version_with_other_weights_is_refused(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path)
    weights = load_file(path) | {"heads.image.norm.weight": torch.ones(6)}
    save_file(weights, path, metadata={"sizes": json.dumps(model.heads.sizes)})
    with pytest.raises(RunError, match="another version"):
        Model.load(path)


def test_a_model_without_heads_normalises_what_it_projects(tmp_path):
    generator = torch.Generator().manual_seed(1)
    image, caption = torch.randn(9, 7, generator=generator), 3 * torch.randn(4, 7, generator=generator)
    plain = Model(None, Projection.identity(7), Projection.identity(7))
    for vectors, found in zip((image, caption), plain.embed(image, caption), strict=True):
        torch.testing.assert_close(found, vectors / vectors.norm(dim=1, keepdim=True))
    path = tmp_path / "m.safetensors"
    plain.save(path)
    again = Model.load(path)
    assert again.heads is None
    for one, other in zip(plain.embed(image, caption), again.embed(image, caption), strict=True):
        assert torch.equal(one, other)
    again.save(tmp_path / "n.safetensors")
    assert (tmp_path / "n.safetensors").read_bytes() == path.read_bytes()
