from __future__ import annotations

import dataclasses
import json

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from nc_audit.encoders import ImageOptions, load_encoders, plan_encoders
from nc_audit.encoders.open_clip_towers import OpenClipModel

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
MODELS = {
    "outputs-clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "outputs-average": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"pool_type": "avg"},
        "text_cfg": TEXT | {"proj_bias": True},
        "custom_text": True,
    },
    "outputs-late-norm": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"final_ln_after_pool": True},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
        "custom_text": True,
    },
    "outputs-resnet": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT},
}
CAPTIONS = ["two boats", "many green trees stand beside a very wide river", ".", "trees " * 100]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    found = {}
    for name in MODELS:
        model = open_clip.create_model(name, load_weights=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        found[name] = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, found[name])
    return found


def _plan(files, name):
    return plan_encoders(f"open_clip:{name}@{files[name]}", device="cpu", precision="fp32")


def _loaded(files, name):
    plan = _plan(files, name)
    return OpenClipModel(plan.image, None, plan)


def _bytes(number=3):
    return torch.randint(
        0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("name", MODELS)
def test_outputs_with_gradient_are_the_frozen_embeddings(files, name):
    model = _loaded(files, name)
    image_BD, _ = model.image_outputs(_bytes())
    caption_BD, _, _ = model.caption_outputs(model.tokenise(CAPTIONS))
    torch.testing.assert_close(image_BD, model.image_encoder().encode(_bytes()), rtol=0, atol=1e-5)
    torch.testing.assert_close(caption_BD, model.text_encoder().encode(CAPTIONS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["outputs-clip", "outputs-average", "outputs-late-norm"])
def test_patches_pass_the_same_norm_and_projection_as_the_embedding(files, name):
    model = _loaded(files, name)
    _, tokens_BPD = model.image_outputs(_bytes())
    visual = model.model.visual
    transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in _bytes()]
    with torch.no_grad():
        pixels = torch.stack([transform(picture) for picture in pictures])
        last = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        expected = last["image_intermediates"][-1] @ visual.proj
    assert tokens_BPD.shape == (3, 16, 16)
    torch.testing.assert_close(tokens_BPD, expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_patches_is_the_embedding_of_a_tower_that_averages(files):
    image_BD, tokens_BPD = _loaded(files, "outputs-average").image_outputs(_bytes())
    torch.testing.assert_close(
        functional.normalize(tokens_BPD.mean(1), dim=1), image_BD, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["outputs-clip", "outputs-average"])
def test_words_are_neither_start_nor_end_nor_padding(files, name):
    model = _loaded(files, name)
    tokens_BL = model.tokenise(CAPTIONS)
    caption_BD, outputs_BLD, is_word_BL = model.caption_outputs(tokens_BL)
    assert tokens_BL.shape == (4, 77)
    assert outputs_BLD.shape == (4, 77, 16)
    assert is_word_BL.sum(1).tolist() == [2, 9, 1, 75]
    assert is_word_BL[0, :4].tolist() == [False, True, True, False]
    end_B = tokens_BL.argmax(1)
    own = functional.normalize(outputs_BLD[torch.arange(4), end_B], dim=1)
    torch.testing.assert_close(own, caption_BD)


def test_a_caption_without_a_word_has_its_end(files):
    model = _loaded(files, "outputs-clip")
    _, outputs_BLD, is_word_BL = model.caption_outputs(model.tokenise(["", "two boats"]))
    assert is_word_BL.tolist() == [[False, True, False, False], [False, True, True, False]]
    assert outputs_BLD.shape[1] == 4


def test_no_patches_or_words_where_the_towers_are_not_clips_own(files):
    model = _loaded(files, "outputs-resnet")
    assert model.image_outputs(_bytes())[1] is None
    assert not hasattr(model.image_encoder(), "tokens")
    late = _loaded(files, "outputs-late-norm")
    assert late.caption_outputs(late.tokenise(CAPTIONS))[1:] == (None, None)
    assert not hasattr(late.text_encoder(), "tokens")


def test_frozen_encoders_give_the_same_tokens_with_zeros_for_padding(files):
    model = _loaded(files, "outputs-clip")
    encoder, text = model.image_encoder(), model.text_encoder()
    torch.testing.assert_close(encoder.tokens(_bytes()), model.image_outputs(_bytes())[1])
    tokens_NLD = text.tokens(CAPTIONS[:2])
    assert tokens_NLD.shape == (2, 11, 16)
    assert (tokens_NLD.abs().sum(2) > 0).sum(1).tolist() == [2, 9]
    torch.testing.assert_close(tokens_NLD[:1, :4], text.tokens(CAPTIONS[:1]), rtol=0, atol=1e-5)


def test_gradients_reach_every_weight_that_makes_the_outputs(files):
    model = _loaded(files, "outputs-clip")
    model.model.requires_grad_(True)
    image_BD, patches_BPD = model.image_outputs(_bytes())
    caption_BD, words_BLD, _ = model.caption_outputs(model.tokenise(CAPTIONS))
    ((image_BD @ caption_BD[:3].T).sum() + patches_BPD.pow(2).sum() + words_BLD.pow(2).sum()).backward()
    without = {name for name, value in model.model.named_parameters() if value.grad is None}
    assert without == {"logit_scale"}
    assert not model.model.visual.output_tokens


def test_changed_weights_change_the_digests_of_model_and_encoders(files):
    model = _loaded(files, "outputs-clip")
    before = model.digest(), model.image_encoder().digest, model.text_encoder().digest
    assert before == (model.digest(), model.image_encoder().digest, model.text_encoder().digest)
    with torch.no_grad():
        model.model.visual.proj += 1
    after = model.digest(), model.image_encoder().digest, model.text_encoder().digest
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_weights_beside_the_spec_take_the_place_of_its_file(files, tmp_path):
    model = _loaded(files, "outputs-clip")
    with torch.no_grad():
        model.model.visual.proj += 1
    tuned = tmp_path / "towers.safetensors"
    save_file({name: value.contiguous() for name, value in model.tensors.items()}, tuned)
    plan = dataclasses.replace(_plan(files, "outputs-clip"), image_weights=tuned, text_weights=tuned)
    encoders = load_encoders(plan)
    assert encoders.image.digest == model.image_encoder().digest
    torch.testing.assert_close(encoders.image.encode(_bytes()), model.image_encoder().encode(_bytes()))
    assert plan.image_options == ImageOptions()
