from __future__ import annotations

import json
import random
import re

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from nc_audit.encoders import ImageEncoder, ImageOptions, TextEncoder, load_encoders, plan_encoders
from nc_audit.encoders.open_clip_towers import _fits
from nc_audit.errors import EncoderError

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
MODELS = {
    "tiny-clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-custom": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True},
    "tiny-linear": {
        "embed_dim": 16,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"proj_bias": True},
        "custom_text": True,
    },
    "tiny-mean": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"pool_type": "avg", "ls_init_value": 0.1},
        "text_cfg": TEXT | {"ls_init_value": 0.1},
    },
    "tiny-scaled": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"layers": 3, "final_ln_after_pool": True},
        "text_cfg": TEXT | {"scale_attn": True},
    },
    "tiny-last": {
        "embed_dim": 16,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
        "custom_text": True,
    },
}
WORDS = re.findall(
    "[a-z]+", "many green trees stand around a large square with buildings beside the river and two stadiums"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    files = {}
    for name in MODELS:
        model = open_clip.create_model(name, load_weights=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        files[name] = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, files[name])
    return files


@pytest.fixture(scope="module")
def captions():
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.choice([1, 3, 8, 12, 30, 90]))) for _ in range(900)]


def _load(weights, name, **more):
    return load_encoders(
        plan_encoders(f"open_clip:{name}@{weights[name]}", device="cpu", precision="fp32", **more)
    )


@pytest.mark.parametrize("name", MODELS)
def test_text_embeddings_equal_those_of_the_full_context(weights, captions, name):
    text = _load(weights, name).text
    assert isinstance(text, TextEncoder)
    assert text.has_tree == (name not in ("tiny-last", "tiny-scaled"))
    model = open_clip.create_model(name, load_weights=False)
    open_clip.load_checkpoint(model, str(weights[name]))
    with torch.inference_mode():
        expected = model.eval().encode_text(open_clip.get_tokenizer(name)(captions), normalize=True)
    torch.testing.assert_close(text.encode(captions), expected, rtol=0, atol=1e-5)


def test_padding_is_not_computed_and_what_captions_begin_with_is_once(weights, captions):
    text = _load(weights, "tiny-clip").text
    seen = []
    text.tower.token_embedding.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].numel())
    )
    text.encode(captions)
    tokens = [tuple(row[row > 0].tolist()) for row in open_clip.tokenize(captions)]
    beginnings = {row[:stop] for row in tokens for stop in range(1, len(row) + 1)}
    # Batches share nothing with each other, which costs a row of context at most for each.
    assert len(beginnings) <= sum(seen) <= len(beginnings) + 77 * len(seen)
    assert sum(seen) < 0.9 * sum(map(len, tokens)) < 0.5 * 77 * len(captions)
    assert max(seen) <= text.at_once


def test_only_the_class_token_of_the_last_block_is_computed(weights):
    image = _load(weights, "tiny-clip").image
    seen = []
    image.model.visual.transformer.resblocks[-1].mlp.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].shape)
    )
    image.encode(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert seen == [(3, 32)]


TOKENIZER = open_clip.SimpleTokenizer()


@given(st.text(st.characters(codec="ascii"), max_size=90) | st.text(max_size=90))
@example("&nGt;" * 15)
@example("ﬃ" * 70)
@example("! " * 45)
def test_a_caption_that_is_told_by_its_length_to_fit_does_fit(caption):
    num_tokens = len(TOKENIZER.encode(caption))
    for room in (len(caption), len(caption) - caption.count(" "), len(caption) // 2):
        assert not _fits(caption, room) or num_tokens <= room


def test_truncated_captions_are_those_beyond_the_context(weights):
    text = _load(weights, "tiny-clip").text
    assert text.truncated(["tree " * 75, "tree " * 76, "a"]) == [False, True, False]


def test_no_captions_give_no_rows(weights):
    assert _load(weights, "tiny-clip").text.encode([]).shape == (0, 16)


@pytest.mark.parametrize("name", MODELS)
def test_image_embeddings_equal_those_of_the_models_own_transform(weights, name):
    encoders = _load(weights, name)
    assert isinstance(encoders.image, ImageEncoder)
    assert encoders.image.input_size == (32, 32)
    random_pixels = np.random.default_rng(0).integers(0, 256, (4, 41, 57, 3), np.uint8)
    images = [Image.fromarray(pixels) for pixels in random_pixels]
    model = open_clip.create_model(name, load_weights=False)
    open_clip.load_checkpoint(model, str(weights[name]))
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    with torch.inference_mode():
        expected = model.eval().encode_image(
            torch.stack([transform(image) for image in images]), normalize=True
        )
    batch = torch.stack([encoders.image.preprocess(image) for image in images])
    assert batch.dtype == torch.uint8
    torch.testing.assert_close(encoders.image.encode(batch), expected, rtol=0, atol=1e-5)


def test_a_dual_encoder_is_aligned_and_has_its_scale(weights):
    plan = plan_encoders(f"open_clip:tiny-clip@{weights['tiny-clip']}")
    assert plan.aligned
    assert _load(weights, "tiny-clip").logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    mixed = plan_encoders(image_encoder=plan.image, text_encoder="tfidf")
    assert not mixed.aligned
    assert load_encoders(mixed).logit_scale is None


def test_weights_may_come_beside_the_model_name(weights):
    file = weights["tiny-clip"]
    plan = plan_encoders("open_clip:tiny-clip", image_weights=file, text_weights=file, precision="fp32")
    assert plan.aligned
    assert load_encoders(plan).image.digest == _load(weights, "tiny-clip").image.digest


def test_the_digests_tell_weights_precision_and_preprocessing_apart(weights):
    one = _load(weights, "tiny-clip")
    others = [
        load_encoders(
            plan_encoders(f"open_clip:tiny-clip@{weights['tiny-clip']}", device="cpu", precision="bf16")
        ),
        _load(weights, "tiny-clip", image_options=ImageOptions(mean=(0.5, 0.5, 0.5))),
        _load(weights, "tiny-custom"),
    ]
    assert _load(weights, "tiny-clip").image.digest == one.image.digest != one.text.digest
    assert len({one.image.digest, *(other.image.digest for other in others)}) == 4
    assert others[1].text.digest == one.text.digest
    assert len({one.text.digest, others[0].text.digest, others[2].text.digest}) == 3


def test_weights_of_another_model_are_refused(weights):
    with pytest.raises(EncoderError) as caught:
        load_encoders(plan_encoders(f"open_clip:tiny-clip@{weights['tiny-linear']}"))
    assert caught.value.message.startswith("tiny-linear.safetensors does not make open_clip:tiny-clip@")
    assert caught.value.hint == "check model name and weights"
    assert "\n" not in str(caught.value)


def test_bf16_is_near_fp32(weights, captions):
    plan = plan_encoders(f"open_clip:tiny-clip@{weights['tiny-clip']}", device="cpu", precision="bf16")
    half, full = load_encoders(plan).text.encode(captions), _load(weights, "tiny-clip").text.encode(captions)
    assert half.dtype == torch.float32
    assert 1e-6 < (1 - (half * full).sum(1)).max() < 0.01
