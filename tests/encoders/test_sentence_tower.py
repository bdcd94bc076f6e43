from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nc_audit.encoders import find_weights, load_encoders, plan_encoders
from nc_audit.errors import EncoderError

pytest.importorskip("sentence_transformers", reason="the extra st is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "tree", "house", "many", "red", "##s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of random weights that knows a few words and reads 16 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    base = tmp_path_factory.mktemp("bert")
    BertTokenizerFast(vocab={word: at for at, word in enumerate(WORDS)}).save_pretrained(base)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(base)
    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(32)], device="cpu")
    whole = tmp_path_factory.mktemp("sentences")
    model.save(str(whole))
    return whole


def encoder_of(folder: Path):
    return load_encoders(plan_encoders(image_encoder="patches", text_encoder=f"st:{folder}")).text


def test_captions_become_vectors_whatever_stands_beside_them(folder):
    encoder = encoder_of(folder)
    captions = ["a red tree", "many houses", "a", "many red trees a house"]
    together = encoder.encode(captions)
    assert together.shape == (4, encoder.dim) == (4, 32)
    assert together.dtype == torch.float32
    alone = torch.cat([encoder.encode([caption]) for caption in captions])
    torch.testing.assert_close(together, alone, atol=0.02, rtol=0.02)
    assert not torch.allclose(together[0], together[1], atol=0.05)


def test_long_captions_are_known_to_be_cut(folder):
    encoder = encoder_of(folder)
    assert encoder.truncated(["a tree", "red " * 14, "red " * 15]) == [False, False, True]


def test_the_digest_follows_the_weights_and_not_the_place(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert encoder_of(moved).digest == encoder_of(folder).digest
    from safetensors.torch import load_file, save_file

    tensors = load_file(moved / "model.safetensors")
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert encoder_of(moved).digest != encoder_of(folder).digest


def test_the_plan_names_the_folder_without_its_place(folder):
    plan = plan_encoders(image_encoder="patches", text_encoder=f"st:{folder}")
    assert plan.facts()["text"] == f"st:{folder.name}"
    assert not plan.aligned


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("st:", "st: names no model", "st:OWNER/NAME or st:FOLDER"),
        (
            "st:./nowhere",
            "there is no folder nowhere",
            "give the folder of a sentence-transformers model",
        ),
    ],
)
def test_what_cannot_be_a_model_is_refused_at_once(spec, message, hint):
    with pytest.raises(EncoderError) as caught:
        plan_encoders(text_encoder=spec)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(EncoderError) as caught:
        plan_encoders(text_encoder=f"st:{tmp_path}")
    assert caught.value.message == f"{tmp_path} is no sentence-transformers model"


def test_a_model_that_is_not_at_hand_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plan = plan_encoders(image_encoder="patches", text_encoder="st:no-such-model")
    for ask in (find_weights, load_encoders):
        with pytest.raises(EncoderError) as caught:
            ask(plan)
        assert caught.value.message == (
            "the weights of st:no-such-model are not in the cache, and HF_HUB_OFFLINE is set"
        )


def test_it_encodes_captions_only():
    with pytest.raises(EncoderError) as caught:
        plan_encoders("st:all-MiniLM-L6-v2")
    assert caught.value.message == "st:all-MiniLM-L6-v2 encodes captions only"
    assert caught.value.hint == "--image-encoder patches --text-encoder st:all-MiniLM-L6-v2"
