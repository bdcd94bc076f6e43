from __future__ import annotations

import pickle  # noqa: TID251 - the hostile file

import pytest
import torch
from safetensors.torch import save_file

from nc_audit.encoders.weights import digest_of_encoder, read_weights
from nc_audit.errors import EncoderError


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name, dump in (("a.pt", torch.save), ("b.pkl", None)):
        path = tmp_path / name
        if dump is None:
            path.write_bytes(pickle.dumps({"weights": Hostile()}))
        else:
            dump({"weights": Hostile()}, path)
        with pytest.raises(EncoderError) as caught:
            read_weights(path)
        assert str(caught.value) == (
            f"{name} is a pickle that holds more than tensors, and reading it could run code "
            "(convert it to safetensors where you trust it)"
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_what_is_no_weights_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights" * 50)
    with pytest.raises(EncoderError, match=f"^{name} is ") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(EncoderError) as caught:
        read_weights(tmp_path / "a.pt")
    assert str(caught.value) == "a.pt holds no tensors by name (give a safetensors or torch state dict)"


def test_training_wrappers_are_taken_off(tmp_path):
    weight = torch.arange(4.0)
    torch.save({"epoch": 3, "state_dict": {"module.a": weight, "module.b": weight}}, tmp_path / "a.pt")
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        read = read_weights(tmp_path / name)
        assert set(read) == {"a", "b"}
        assert torch.equal(read["a"], weight)


def test_the_digest_sees_every_bit_and_no_order():
    one, two = torch.zeros(3), torch.ones(3)
    digest = digest_of_encoder({"x": 1, "y": 2}, {"a": one, "b": two})
    assert digest == digest_of_encoder({"y": 2, "x": 1}, {"b": two, "a": one})
    changed = two.clone()
    changed[1] = torch.nextafter(changed[1], torch.tensor(2.0))
    others = [
        digest_of_encoder({"x": 1, "y": 3}, {"a": one, "b": two}),
        digest_of_encoder({"x": 1, "y": 2}, {"a": one, "b": changed}),
        digest_of_encoder({"x": 1, "y": 2}, {"a": one, "c": two}),
        digest_of_encoder({"x": 1, "y": 2}, {"a": one.double(), "b": two}),
        digest_of_encoder({"x": 1, "y": 2}, {"a": one.view(3, 1), "b": two}),
    ]
    assert len({digest, *others}) == 6
