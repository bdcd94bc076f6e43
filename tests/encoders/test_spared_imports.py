"""When open_clip is imported, and without what; in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PLAIN = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
WORDS = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
CODE = """
import json, sys
from nc_audit.encoders.open_clip_specs import towers_of
towers_of("open_clip:ViT-B-32/openai")
spared = sorted({"timm", "transformers"} - set(sys.modules))
import open_clip
open_clip.add_model_config(sys.argv[1])
towers_of("open_clip:odd@weights")
model = open_clip.create_model("odd", load_weights=False, pretrained_hf=False)
print(json.dumps([spared, type(model.visual).__name__, type(getattr(model, "text", None)).__name__]))
"""


def made_after_a_plain_one(folder: Path, config: dict[str, object]) -> tuple[list[str], str, str]:
    """What was spared for the plain model, and the towers of a model of that config made after it."""
    (folder / "odd.json").write_text(json.dumps(config))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(folder / "odd.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return tuple(json.loads(found.stdout.splitlines()[-1]))


def test_a_timm_tower_is_made_after_a_model_without_one(tmp_path):
    vision = {"timm_model_name": "mobilenetv3_small_050", "timm_model_pretrained": False, "image_size": 32}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": WORDS}
    spared, image, _ = made_after_a_plain_one(tmp_path, config)
    assert image == "TimmModel"
    assert "timm" in spared


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra st)"
)
def test_a_transformers_tower_is_made_after_a_model_without_one(tmp_path):
    from transformers import BertConfig

    BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(tmp_path / "bert")
    text = {
        "hf_model_name": str(tmp_path / "bert"),
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
    }
    config = {"embed_dim": 16, "vision_cfg": PLAIN, "text_cfg": text}
    spared, _, words = made_after_a_plain_one(tmp_path, config)
    assert words == "HFTextEncoder"
    assert "transformers" in spared


def test_a_file_of_weights_is_planned_without_open_clip(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    code = (
        "import sys; from nc_audit.encoders import find_weights, plan_encoders;"
        "find_weights(plan_encoders('open_clip:ViT-B-32@weights.pt')); print('open_clip' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
