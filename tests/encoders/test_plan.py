from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import open_clip
import pytest
import torch

from nc_audit import hub
from nc_audit.encoders import (
    BUILTIN_COST,
    find_weights,
    load_encoders,
    plan_encoders,
    weights,
)
from nc_audit.encoders.open_clip_specs import AUTO, AUTO_REPOSITORY, HUB_NAMES, hub_home
from nc_audit.encoders.patches import Patches
from nc_audit.encoders.tfidf import Tfidf
from nc_audit.errors import EncoderError
from nc_audit.pipeline import score_dataset
from nc_audit.recipe import build_recipe


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def offline(monkeypatch, no_cache):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return no_cache


def _message(**arguments) -> str:
    with pytest.raises(EncoderError) as caught:
        plan_encoders(**arguments)
    return str(caught.value)


def test_auto_without_weights_or_network_is_builtin_and_says_so(offline):
    plan = plan_encoders()
    assert (plan.image, plan.text, plan.aligned) == ("patches", "tfidf", False)
    assert plan.notes == (
        f"encoder: builtin (patches + tfidf), because {AUTO} is not in the cache and HF_HUB_OFFLINE is set",
        BUILTIN_COST,
    )
    encoders = load_encoders(plan)
    assert isinstance(encoders.image, Patches)
    assert isinstance(encoders.text, Tfidf)
    assert encoders.logit_scale is None


def test_auto_takes_weights_that_are_in_the_cache(offline):
    folder = offline / f"models--{AUTO_REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "open_clip_model.safetensors").write_bytes(b"")
    plan = plan_encoders()
    assert (plan.image, plan.text, plan.aligned) == (AUTO, AUTO, True)
    assert plan.notes == (f"encoder: {AUTO}, from the weights in the cache",)


def test_auto_names_the_repository_that_open_clip_names():
    model, _, tag = AUTO.removeprefix("open_clip:").partition("/")
    assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"] == f"{AUTO_REPOSITORY}/"
    assert hub_home(model, tag) == (AUTO_REPOSITORY, HUB_NAMES)
    assert model in open_clip.list_models()


def test_a_hub_that_never_answers_is_given_up_within_two_seconds(monkeypatch, no_cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        start = time.monotonic()
        refusal = hub.refusal("models", "owner/name")
        assert time.monotonic() - start < 2
    assert refusal in ("the hub does not answer", "the hub cannot be reached")


@pytest.mark.parametrize(
    ("status", "refusal"),
    [("200 OK", None), ("404 Not Found", "the hub answers 404 for owner/name")],
)
def test_the_answer_of_the_hub_decides(monkeypatch, no_cache, status, refusal):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        assert hub.refusal("models", "owner/name") == refusal
        thread.join()


def test_published_weights_that_cannot_be_had_are_refused_quickly(offline):
    for arguments in ({"encoder": AUTO}, {"image_encoder": "timm:resnet18"}):
        plan = plan_encoders(**arguments)
        for ask in (find_weights, load_encoders):
            with pytest.raises(EncoderError) as caught:
                ask(plan)
            assert str(caught.value) == (
                f"the weights of {plan.image} are not in the cache, and HF_HUB_OFFLINE is set "
                "(give local weights, fetch them once where there is a network, or use --encoder builtin)"
            )


def test_weights_of_a_file_or_learnt_from_the_set_are_at_hand(offline, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    find_weights(plan_encoders("builtin"))
    find_weights(plan_encoders(f"open_clip:ViT-B-32@{tmp_path / 'weights.safetensors'}"))
    find_weights(
        plan_encoders(
            image_encoder="timm:resnet18",
            text_encoder="tfidf",
            image_weights=tmp_path / "weights.safetensors",
        )
    )


def test_a_run_whose_weights_cannot_be_had_is_not_begun(offline, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "captions.csv").write_text("image,caption\na.png,a tree\n")
    recipe = build_recipe(
        settings={
            "image": {"encoder": "open_clip:ViT-B-32/openai"},
            "text": {"encoder": "open_clip:ViT-B-32/openai"},
        }
    )
    with pytest.raises(EncoderError, match="are not in the cache"):
        score_dataset(tmp_path / "set", tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "tfdif"}, "unknown encoder 'tfdif' (did you mean tfidf?)"),
        ({"encoder": "builtins"}, "unknown encoder 'builtins' (did you mean builtin?)"),
        ({"encoder": "tfidf"}, "tfidf encodes captions only (--image-encoder patches --text-encoder tfidf)"),
        (
            {"encoder": "timm:resnet18"},
            "timm:resnet18 encodes images only (--image-encoder timm:resnet18 --text-encoder tfidf)",
        ),
        ({"text_encoder": "patches"}, "unknown text encoder 'patches' (known: open_clip:, tfidf, st:)"),
        (
            {"image_encoder": "builtin"},
            "builtin chooses both sides at once (give --encoder builtin and no --image-encoder)",
        ),
        ({"image_encoder": "timm:resnet81"}, "timm has no model 'resnet81' (did you mean resnet18?)"),
        (
            {"encoder": "open_clip:ViT-B-33/openai"},
            "open_clip has no model 'ViT-B-33' (did you mean ViT-B-32?)",
        ),
        (
            {"encoder": "open_clip:ViT-B-32/openia"},
            "open_clip has no weights 'openia' for ViT-B-32 (did you mean openai?)",
        ),
        (
            {"encoder": "open_clip:ViT-B-32"},
            "open_clip:ViT-B-32 names no weights (for example open_clip:ViT-B-32/openai)",
        ),
        (
            {"encoder": "open_clip:ViT-B-32@absent.pt"},
            "open_clip:ViT-B-32@absent.pt: there is no file 'absent.pt' (open_clip:MODEL@FILE)",
        ),
        (
            {"encoder": "open_clip:hf-hub:owner"},
            "'open_clip:hf-hub:owner' names no repository (open_clip:hf-hub:OWNER/NAME)",
        ),
        (
            {"image_encoder": "timm:resnet18", "image_weights": Path("absent.pt")},
            "--image-weights: there is no file absent.pt (give the path of a safetensors or torch file)",
        ),
        ({"encoder": "builtin", "device": "gpu"}, "unknown device 'gpu' (known: auto, cpu, cuda)"),
        ({"encoder": "builtin", "precision": "fp16"}, "unknown precision 'fp16' (known: auto, fp32, bf16)"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(arguments, message):
    assert _message(**arguments) == message


def test_weights_for_an_encoder_that_learns_are_refused(tmp_path):
    file = tmp_path / "weights.pt"
    file.touch()
    assert _message(encoder="builtin", image_weights=file) == (
        "patches learns from the dataset and takes no --image-weights (give --image-encoder)"
    )
    assert _message(encoder="builtin", text_weights=file) == (
        "tfidf learns from the dataset and takes no --text-weights (give --text-encoder)"
    )


def test_one_side_is_completed():
    plan = plan_encoders(image_encoder="timm:resnet18")
    assert (plan.image, plan.text) == ("timm:resnet18", "tfidf")
    assert plan.notes == ("no text encoder is named beside timm:resnet18: captions go through tfidf",)
    plan = plan_encoders(text_encoder="tfidf")
    assert (plan.image, plan.text) == ("patches", "tfidf")
    plan = plan_encoders(image_encoder=AUTO)
    assert (plan.image, plan.text, plan.aligned, plan.notes) == (AUTO, AUTO, True, ())
    plan = plan_encoders(image_encoder=AUTO, text_encoder="tfidf")
    assert (plan.image, plan.text, plan.aligned) == (AUTO, "tfidf", False)
    plan = plan_encoders("builtin", image_encoder="timm:resnet18")
    assert (plan.image, plan.text) == ("timm:resnet18", "tfidf")


def test_the_facts_of_a_plan_hold_no_folders(tmp_path):
    file = tmp_path / "weights.pt"
    file.touch()
    facts = plan_encoders(image_encoder="timm:resnet18", image_weights=file).facts()
    assert facts["image_weights"] == "weights.pt"
    assert str(tmp_path) not in str(facts)
    facts = plan_encoders(f"open_clip:ViT-B-32@{file}").facts()
    assert (facts["image"], facts["text"]) == (
        "open_clip:ViT-B-32@weights.pt",
        "open_clip:ViT-B-32@weights.pt",
    )


def test_bf16_is_chosen_only_where_the_processor_has_it(monkeypatch):
    for flags, chosen in ({"avx2"}, "fp32"), ({"avx2", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"):
        monkeypatch.setattr(weights, "_processor_flags", lambda flags=flags: flags)
        assert weights.choose_precision("auto", "cpu") == chosen
    assert weights.choose_precision("fp32", "cpu") == "fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_where_there_is_none():
    assert _message(encoder="builtin", device="cuda") == (
        "no CUDA device can be used (--device cpu, or install a torch build with CUDA)"
    )
