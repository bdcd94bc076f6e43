"""Processes that embed together, started by torchrun itself: the same bytes as one process makes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nc_audit import embed, team
from nc_audit.embed import EmbeddingStore, embed_captions, embed_images
from nc_audit.team import ALONE, Team, of_torchrun

NUM = 53
GONE, BROKEN = 20, 31


class Numbers:
    """Encoders of both sides whose vectors are known, and which count what they encode."""

    spec, digest, dim, input_size = "numbers", "d" * 32, 2, (1, 1)

    def __init__(self) -> None:
        self.encoded = 0

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.tensor(np.array(image.convert("RGB"))[0, 0])

    def encode(self, batch: Tensor | list[str]) -> Tensor:
        self.encoded += len(batch)
        if isinstance(batch, Tensor):
            return batch[:, :2].float()
        return torch.tensor([[len(text), len(batch)] for text in batch], dtype=torch.float32)


def picture(at: int) -> bytes:
    if at == GONE:
        raise FileNotFoundError(2, "No such file")
    return b"no image" if at == BROKEN else b"P6 1 1 255\n" + bytes([at, 7, 0])


def embed_here(folder: Path, who: Team) -> dict[str, object]:
    """Embeds both sides in small shards, and says what this process did and saw."""
    embed.IMAGES_PER_SHARD, embed.CAPTIONS_PER_SHARD = 8, 5
    images, texts, store = Numbers(), Numbers(), EmbeddingStore(folder)
    ids = [f"{at:04}" for at in range(NUM)]
    vectors, failures = embed_images(images, ids, picture, store, batch_size=4, team=who)
    captions = embed_captions(texts, ids, ["x" * at for at in range(NUM)], store, team=who)
    return {
        "encoded": [images.encoded, texts.encoded],
        "failures": dict(sorted(failures.items())),
        "sum": [float(np.nansum(vectors)), float(captions.sum())],
    }


def torchrun(size: int, *command: str | Path, cwd: Path) -> str:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, *map(str, command)], cwd=cwd, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrow"))}


def test_three_processes_make_the_shards_of_one(tmp_path, monkeypatch):
    for name in ("IMAGES_PER_SHARD", "CAPTIONS_PER_SHARD"):
        monkeypatch.setattr(embed, name, getattr(embed, name))  # set back behind `embed_here`
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    alone = embed_here(tmp_path / "one", ALONE)
    torchrun(3, __file__, "three", cwd=tmp_path)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "three")
    saw = [json.loads((tmp_path / f"three/{rank}.json").read_text()) for rank in range(3)]
    assert {"0020", "0031"} == set(alone["failures"])
    assert all(one["failures"] == alone["failures"] and one["sum"] == alone["sum"] for one in saw)
    # each a third of the 7 and 11 shards, what is gone or broken not encoded
    assert [one["encoded"] for one in saw] == [[20, 20], [16, 18], [15, 15]]


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    assert of_torchrun() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")  # as clusters set it for processes that know nothing of each other
    assert of_torchrun() == ALONE
    assert ALONE.agreed(3) == 3
    assert ALONE.gathered("a") == ["a"]
    assert ALONE.share([1, 2]) == [1, 2]


@pytest.mark.slow
def test_score_by_two_processes_is_score_by_one(tmp_path):
    """Through the command line; a second time nothing is left to do, and a broken dataset ends all of them."""
    options = ["--encoder", "builtin", "--set", "train.steps=60", "--set", "train.epochs=3"]
    score = ["-m", "nc_audit", "score", "drawn", *options, "--out"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(team.__file__).parents[1])}
    for command in (["-m", "nc_audit", "demo", "drawn", "--images", "1100"], [*score, "one"]):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, env=env)
    torchrun(2, *score, "two", cwd=tmp_path)
    assert len(list((tmp_path / "two/embeddings").glob("image-*.arrow"))) == 2
    assert bytes_of(tmp_path / "one/embeddings") == bytes_of(tmp_path / "two/embeddings")
    for name in ("pairs.parquet", "scores.parquet", "tags.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    summary = json.loads(torchrun(2, *score, "two", "--json", cwd=tmp_path))
    assert summary["rows"] == len(pytest.importorskip("pandas").read_parquet(tmp_path / "two/pairs.parquet"))
    with pytest.raises(AssertionError, match="absent does not exist"):
        torchrun(2, "-m", "nc_audit", "score", "absent", cwd=tmp_path)


if __name__ == "__main__":
    me = of_torchrun()
    Path(sys.argv[1], f"{me.rank}.json").write_text(json.dumps(embed_here(Path(sys.argv[1]), me)))
