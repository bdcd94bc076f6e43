from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from nc_audit.bench import runner, tables
from nc_audit.bench.runner import Grid, bench_dataset
from nc_audit.dataset import load_pairs
from nc_audit.errors import DatasetError, DiskError, RecipeError

SMALL = (
    "train.steps=160",
    "train.epochs=4",
    "train.first_counted_epoch=2",
    "train.pace_from=2",
    "train.width=48",
    "train.hidden=48",
    "train.components=32",
    "train.first_look_dims=[16]",
    "train.first_look_rounds=2",
    "score.candidates=100",
)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict:
    """An untrained network of timm's smallest kind: it tells colours apart, which is enough here."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False)
    path = tmp_path_factory.mktemp("weights") / "test.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return {
        "image": {"encoder": "timm:test_resnet", "weights": str(path), "size": 64},
        "text": {"encoder": "tfidf"},
    }


class Notes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int | None) -> None:
        pass


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A drawn dataset without planted noise, in Karpathy's json with splits."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("clean")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    images = []
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
    names = list(colours)
    for number in range(90):
        one, other = names[number % 4], names[(number // 4) % 4]
        pixels = np.zeros((48, 48, 3), np.uint8)
        pixels[:, :24], pixels[:, 24:] = colours[one], colours[other]
        noise = generator.integers(-12, 12, pixels.shape)
        Image.fromarray((pixels.astype(int) + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{one}_{number}.png"
        )
        captions = [f"{one} left of {other} {number % 7}", f"a {other} field beside {one}, take {number}"]
        images.append(
            {
                "filename": f"{one}_{number}.png",
                "split": "test" if number % 5 == 0 else "train",
                "sentences": [{"raw": caption} for caption in captions],
            }
        )
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Embeddings that all benches of this file use, so that images are learnt from once."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def out(shared, tmp_path) -> Path:
    """A bench folder with no results and the shared embeddings."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "embeddings").symlink_to(shared, target_is_directory=True)
    return tmp_path / "out"


def run(clean: Path, out: Path, encoders: dict, **changes) -> list[dict]:
    grid = Grid(**({"rates": (0.0, 0.3), "recipes": ("similarity",), "seeds": (0, 1)} | changes))
    return bench_dataset(clean, out, grid, settings=encoders, overrides=SMALL, device="cpu", watch=Notes())


@pytest.fixture(scope="module")
def benched(clean, shared, encoders, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("bench")
    (out / "embeddings").symlink_to(shared, target_is_directory=True)
    return out, run(
        clean, out, encoders, recipes=("self_paced", "similarity"), test_split="test", with_downstream=True
    )


def test_every_cell_is_there_once_and_rate_0_only_once_for_all_kinds(benched):
    _, results = benched
    cells = [(one["recipe"], one["kind"], one["rate"], one["seed"]) for one in results]
    assert len(set(cells)) == len(cells) == 2 * 2 * 2
    assert {one["kind"] for one in results if one["rate"] == 0} == {"none"}


def test_the_injected_datasets_are_kept_with_their_truth_and_load(benched, clean):
    out, results = benched
    path = out / "injected" / "caption-0.3-1.parquet"
    table = pq.read_table(path)
    truth = table["known_noise"].to_numpy(zero_copy_only=False)
    stated = next(one for one in results if one["rate"] == 0.3 and one["seed"] == 1)
    assert truth.mean() == pytest.approx(stated["true_rate"], abs=0.02)
    own: dict[str, set[str]] = {}
    for image, caption in zip(table["image"].to_pylist(), table["original_caption"].to_pylist(), strict=True):
        own.setdefault(image, set()).add(caption)
    for image, caption, noisy in zip(
        table["image"].to_pylist(), table["caption"].to_pylist(), truth.tolist(), strict=True
    ):
        assert noisy == (caption not in own[image])
    from nc_audit.dataset import LoadOptions

    loaded = load_pairs(path, LoadOptions(image_root=clean / "images"))
    assert loaded.pairs["known_noise"].to_pylist() == truth.tolist()


def test_the_test_split_stays_out_of_training_and_is_what_retrieval_searches(benched, clean):
    out, results = benched
    table = pq.read_table(out / "injected" / "caption-0.3-0.parquet")
    numbers = {int(name.split("_")[1].split(".")[0]) for name in table["image"].to_pylist()}
    assert not any(number % 5 == 0 for number in numbers)
    assert len(table) == 2 * 72
    for one in results:
        assert one["retrieval"]["rsum"] == pytest.approx(6 * one["retrieval"]["mr"], abs=1e-3)
        assert 0 < one["retrieval"]["i2t_r1"] <= one["retrieval"]["i2t_r10"] <= 100


def test_downstream_compares_what_an_export_would_keep(benched):
    _, results = benched
    for one in results:
        found = one["downstream"]
        assert set(found) == {"raw", "drop_noisy", "reweight", "random_drop", "oracle", "recovered"}
        assert all(0 <= found[name] <= 100 for name in found if name != "recovered")
        if one["rate"] == 0:
            assert found["oracle"] == found["raw"], "without noise the oracle keeps everything"
            assert found["recovered"] is None


def test_a_bench_goes_on_where_it_stopped_and_a_cut_line_is_measured_again(clean, out, encoders):
    first = run(clean, out, encoders, seeds=(0,))
    path = out / runner.RESULTS
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    path.write_text(lines[0] + "\n" + lines[1][:40])
    before = lines[0]
    again = run(clean, out, encoders, seeds=(0,))
    lines = path.read_text().splitlines()
    assert lines[0] == before
    assert [one["key"] for one in again] == [one["key"] for one in first]
    same = [name for name in first[1] if name != "seconds"]
    assert {name: again[1][name] for name in same} == {name: first[1][name] for name in same}
    third = run(clean, out, encoders, seeds=(0,))
    assert third == again, "seconds too: nothing was measured"


def test_a_broken_line_in_the_middle_is_no_silent_loss(tmp_path):
    (tmp_path / runner.RESULTS).write_text('{"key": 1}\n{"ke\n{"key": 2}\n')
    with pytest.raises(RecipeError) as caught:
        runner.read_results(tmp_path)
    assert caught.value.message == f"{tmp_path / 'results.jsonl'}: line 2 is no result"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (0.97,)}, "a noise rate must lie between 0 and 0.95, got 0.97"),
        ({"kinds": ("captoin",)}, "unknown kind of noise 'captoin'"),
        ({"recipes": ("self_pacd",)}, "no recipe is called self_pacd"),
        ({"recipes": ()}, "nothing to measure"),
        ({"with_downstream": True}, "--downstream needs clean pairs to compare on"),
        ({"test_split": "tset"}, "no row is of the split 'tset'"),
    ],
)
def test_a_wrong_grid_is_told_in_a_line(clean, out, encoders, changes, message):
    with pytest.raises((RecipeError, DatasetError)) as caught:
        run(clean, out, encoders, **changes)
    assert caught.value.message == message


def test_settings_of_other_methods_do_not_make_a_cell_new(encoders):
    one = runner.Layers(settings=encoders, overrides=SMALL).recipe("similarity", 3)
    other = runner.Layers(settings=encoders, overrides=(*SMALL, "train.rrsitr.margin=0.3")).recipe(
        "similarity", 3
    )
    assert one.train.settings_in_use() == other.train.settings_in_use()
    assert one.train.seed == 3
    third = runner.Layers(settings=encoders, overrides=SMALL).recipe("rrsitr+train.rrsitr.margin=0.3")
    assert third.train.settings_in_use()["rrsitr"]["margin"] == 0.3


def test_noise_by_classes_of_file_names_and_by_blocks(clean, out, encoders):
    results = run(clean, out, encoders, kinds=("class", "block"), rates=(0.3,), seeds=(0,))
    assert [one["kind"] for one in results] == ["class", "block"]
    assert all(0.1 < one["true_rate"] < 0.35 for one in results)
    table = pq.read_table(out / "injected" / "class-0.3-0.parquet")
    for image, caption in zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True):
        assert image.split("_")[0] in caption, "captions of a class stay within it"


# --- tables


RESULTS = [
    {"recipe": "a", "kind": "caption", "rate": 0.4, "seed": 0, "auroc": 0.90, "rate_error": -0.10, "x": None},
    {"recipe": "a", "kind": "caption", "rate": 0.4, "seed": 1, "auroc": 0.92, "rate_error": -0.12, "x": None},
    {"recipe": "b", "kind": "caption", "rate": 0.4, "seed": 0, "auroc": 0.89, "rate_error": 0.02, "x": None},
]


def test_mean_and_sample_deviation_over_seeds():
    rows = tables.summarise(RESULTS)
    assert [(row.recipe, row.seeds) for row in rows] == [("a", 2), ("b", 1)]
    assert rows[0].mean["auroc"] == pytest.approx(0.91)
    assert rows[0].spread["auroc"] == pytest.approx(np.std([0.90, 0.92], ddof=1))
    assert "x" not in rows[0].mean


def test_the_best_is_marked_in_its_direction():
    heads, cells = tables.detection_table(tables.summarise(RESULTS))
    auroc, error = heads.index("AUROC"), heads.index("rate error")
    assert cells[0][auroc] == "0.910 ±0.014*"
    assert cells[1][auroc] == "0.890"
    assert cells[1][error] == "+0.020*", "nearer zero is better"
    assert cells[0][error] == "-0.110 ±0.014"
    text = tables.markdown(heads, cells)
    assert "| **0.910 ±0.014** |" in text
    assert text.splitlines()[1] == "|" + "---|" * len(heads)


def test_a_matrix_has_a_line_per_recipe_and_marks_the_best_of_each_column():
    more = [{"recipe": "b", "kind": "none", "rate": 0.0, "seed": 0, "auroc": None, "rate_error": 0.01}]
    heads, cells = tables.matrix(tables.summarise([*RESULTS, *more]), "auroc")
    assert heads == ["AUROC", "caption 40%"], "a control has no AUROC and no column"
    assert cells == [["a", "0.910 ±0.014*"], ["b", "0.890"]]
    heads, cells = tables.matrix(tables.summarise([*RESULTS, *more]), "rate_error")
    assert heads == ["rate error", "caption 40%", "0%"]
    assert cells == [["a", "-0.110 ±0.014", ""], ["b", "+0.020*", "+0.010*"]]


def test_a_recipe_alone_is_not_called_the_best():
    _, cells = tables.detection_table(tables.summarise(RESULTS[:1]))
    assert not any(cell.endswith("*") for cell in cells[0])


# --- the commands


def invoke(*args: str | Path, cwd: Path, monkeypatch) -> str:
    """What a command prints on stdout, in this process."""
    from typer.testing import CliRunner  # noqa: TID251

    from nc_audit.cli import app

    monkeypatch.chdir(cwd)
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done.stdout


def flags(encoders: dict) -> list[str]:
    image = encoders["image"]
    settings = [*SMALL, f"image.size={image['size']}"]
    return [
        *(
            "--image-encoder",
            image["encoder"],
            "--image-weights",
            image["weights"],
            "--text-encoder",
            "tfidf",
        ),
        *(part for one in settings for part in ("--set", one)),
    ]


def test_bench_prints_a_matrix_per_quantity_and_json_alone(clean, out, encoders, monkeypatch):
    grid = ["--rates", "0,30%", "--recipes", "similarity,lemon", "--out", out, *flags(encoders)]
    shown = invoke("bench", clean, *grid, cwd=out.parent, monkeypatch=monkeypatch)
    heads = [line.split() for line in shown.splitlines() if "caption 30%" in line]
    assert [line[0] for line in heads] == ["AUROC", "F1", "rate", "ECE", "seconds"]
    text = invoke("bench", clean, *grid, "--json", cwd=out.parent, monkeypatch=monkeypatch)
    results = json.loads(text)
    assert {(one["recipe"], one["rate"]) for one in results} == {
        (recipe, rate) for recipe in ("similarity", "lemon") for rate in (0.0, 0.3)
    }
    markdown = invoke("bench", clean, *grid, "--format", "md", cwd=out.parent, monkeypatch=monkeypatch)
    assert markdown.splitlines()[0] == "| AUROC | caption 30% |"


def test_evaluate_measures_a_split_and_says_when_it_was_trained_on(clean, tmp_path, encoders, monkeypatch):
    settings = ["--recipe", "similarity", *flags(encoders)]
    invoke("score", clean, "--split", "train", *settings, cwd=tmp_path, monkeypatch=monkeypatch)
    unseen = json.loads(
        invoke("evaluate", "--split", "test", "--json", cwd=tmp_path, monkeypatch=monkeypatch)
    )
    assert unseen["trained_on"] == 0
    assert (unseen["images"], unseen["pairs"]) == (18, 36)
    assert unseen["retrieval"]["rsum"] == pytest.approx(6 * unseen["retrieval"]["mr"])
    seen = json.loads(invoke("evaluate", "--split", "train", "--json", cwd=tmp_path, monkeypatch=monkeypatch))
    assert seen["trained_on"] == 1
    shown = invoke("evaluate", cwd=tmp_path, monkeypatch=monkeypatch)
    assert "all rows: 90 images" in shown
    assert "80.0 % of these pairs sat in the training of the run" in shown


def test_a_result_for_which_there_is_no_room_leaves_the_others_whole(tmp_path):
    runner._append(tmp_path, {"key": "a"})
    before = (tmp_path / runner.RESULTS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"results\.jsonl could not be written"):
            runner._append(tmp_path, {"key": "b" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / runner.RESULTS).read_bytes() == before
    runner._append(tmp_path, {"key": "b"})
    assert [one["key"] for one in runner.read_results(tmp_path)] == ["a", "b"]
