from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from nc_audit.encoders import ImageEncoder, ImageOptions, load_encoders, plan_encoders
from nc_audit.errors import EncoderError

MODEL = "test_resnet"
WEIGHTS = Path(__file__).parents[3] / "shared" / "weights" / "mobilenetv2_100.tf_imagenet.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def _load(file, **options):
    plan = plan_encoders(
        image_encoder=f"timm:{MODEL}",
        image_weights=file,
        device="cpu",
        precision="fp32",
        image_options=ImageOptions(**options),
    )
    return load_encoders(plan).image


def test_embeddings_are_the_pooled_output_of_the_model(file):
    encoder = _load(file, size=64, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    assert isinstance(encoder, ImageEncoder)
    assert encoder.input_size == (64, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    batch = torch.stack([encoder.preprocess(Image.fromarray(one)) for one in pixels])
    assert torch.equal(batch, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    model = timm.create_model(MODEL, pretrained=False, checkpoint_path=str(file)).eval()
    floats = (
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    ) / (torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(floats), pre_logits=True)
    vectors = encoder.encode(batch)
    assert vectors.shape == (2, encoder.dim)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_image_is_cut_away(file):
    encoder = _load(file, size=64)
    pixels = np.zeros((50, 300, 3), np.uint8)
    pixels[:, :10] = 255
    seen = encoder.preprocess(Image.fromarray(pixels))
    assert seen.shape == (3, 64, 64)
    assert (seen[:, :, 0] > 200).all()
    assert (seen[:, :, 10:] < 30).all()


def test_the_models_own_preprocessing_is_the_default(file):
    encoder = _load(file)
    config = timm.data.resolve_model_data_config(timm.create_model(MODEL))
    assert (3, *encoder.input_size) == config["input_size"]
    assert (encoder.mean, encoder.std) == (config["mean"], config["std"])


def test_the_digest_sees_weights_options_and_preprocessing(file, tmp_path):
    one = _load(file)
    model = timm.create_model(MODEL, pretrained=False, checkpoint_path=str(file))
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    tensors["conv1.weight" if "conv1.weight" in tensors else next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    digests = [
        _load(tmp_path / "other.safetensors"),
        _load(file, size=64),
        _load(file, options={"output_stride": 16}),
    ]
    assert _load(file).digest == one.digest
    assert len({one.digest, *(other.digest for other in digests)}) == 4


def test_weights_without_classifier_fit(file, tmp_path):
    bare = timm.create_model(MODEL, pretrained=False, num_classes=0)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in bare.state_dict().items()}},
        tmp_path / "bare.pt",
    )
    assert _load(tmp_path / "bare.pt").dim == _load(file).dim


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    own = timm.create_model(MODEL, pretrained=False, num_classes=0).state_dict()
    count = sum(not key.endswith("num_batches_tracked") for key in own)
    with pytest.raises(EncoderError) as caught:
        _load(tmp_path / "other.safetensors")
    assert str(caught.value) == (
        f"other.safetensors does not fit timm:{MODEL}: {count} of {count} tensors are missing or have another shape "
        f"(first: {next(iter(own))}) (check the model name and [image] options)"
    )


def test_an_unknown_option_is_named(file):
    with pytest.raises(EncoderError) as caught:
        _load(file, options={"pad_tpye": "same"})
    assert "with options {'pad_tpye': 'same'}: " in str(caught.value)
    assert "'pad_tpye'" in str(caught.value)


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="../shared/weights is not here")
def test_the_shared_mobilenet_loads():
    options = ImageOptions({"pad_type": "same"}, (0.5,) * 3, (0.5,) * 3, 224)
    plan = plan_encoders(
        image_encoder="timm:mobilenetv2_100", image_weights=WEIGHTS, image_options=options, precision="fp32"
    )
    encoder = load_encoders(plan).image
    vectors = encoder.encode(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    assert vectors.shape == (2, 1280) == (2, encoder.dim)
    assert 0.05 < vectors.mean() < 2
