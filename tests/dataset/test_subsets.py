"""Datasets whose card lists subsets: which of their files are read, by name, by default, or not without being asked."""

from __future__ import annotations

import pytest
from dataset_checks import column, load
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.dataset.subsets import subsets_of
from nc_audit.errors import DatasetError

TWO = """\
---
language: en
configs:
- config_name: en
  data_files:
  - split: train
    path: en/a-*.csv
  - split: test
    path: ["en/b.csv"]
- config_name: 2014
  data_files: "fr/**/*.csv"
  default: true
---
# A dataset
"""


def table(*captions: str) -> str:
    return "image,caption\n" + "".join(f"x.png,{caption}\n" for caption in captions)


@pytest.fixture
def two(tmp_path, write, draw):
    draw("en/x.png", "fr/x.png", "fr/deep/x.png")
    write("en/a-0.csv", table("one"))
    write("en/a-1.csv", table("two"))
    write("en/b.csv", table("three"))
    write("fr/c.csv", table("un"))
    write("fr/deep/d.csv", table("deux"))
    return write("README.md", TWO).parent


def test_the_default_subset_is_read_and_the_others_are_named(two):
    loaded = load(two)
    assert sorted(column(loaded, "caption")) == ["deux", "un"]
    assert "the subset 2014 is read; --subset reads another: en" in loaded.notes


def test_a_subset_by_name_has_the_splits_of_its_card(two):
    loaded = load(two, subset="en")
    assert list(zip(column(loaded, "caption"), column(loaded, "split"), strict=True)) == [
        ("one", "train"),
        ("two", "train"),
        ("three", "test"),
    ]
    assert len(load(two, subset="en", split="test").pairs) == 1


def test_without_a_default_one_has_to_be_named(two, write):
    write("README.md", TWO.replace("  default: true\n", ""))
    with pytest.raises(DatasetError, match="has 2 subsets: en, 2014") as caught:
        load(two)
    assert "--subset en" in caught.value.hint
    with pytest.raises(DatasetError, match="no subset 'enn'") as caught:
        load(two, subset="enn")
    assert caught.value.hint == "did you mean en?"


def test_the_only_subset_is_read_and_files_it_leaves_out_are_noted(tmp_path, write, draw):
    draw("x.png")
    write("a.csv", table("one"))
    write("old.csv", table("two"))
    write("README.md", "---\nconfigs:\n- data_files: a.csv\n---\n")
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["one"]
    assert "not read, as README.md lists them in no subset: old.csv" in loaded.notes


@pytest.mark.parametrize(
    "card",
    [
        "# no head",
        "---\nconfigs: none\n---\n",
        "---\nconfigs: [1, {}, null, {data_files: 3}, {config_name: [a], data_files: a.csv}]\n---\n",
        "---\nconfigs:\n- data_files: ../outside.csv\n- data_files: /etc/*\n- data_files: hf://x/y.csv\n---\n",
        "---\nconfigs: [\n---\n",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nconfigs: [{config_name: *b, data_files: *b}]\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nconfigs:\n- config_name: images\n  data_files: '*.png'\n---\n",
    ],
)
def test_a_card_that_lists_no_file_with_pairs_changes_nothing(tmp_path, write, draw, card):
    draw("x.png")
    write("a.csv", table("one"))
    write("README.md", card)
    assert column(load(tmp_path), "caption") == ["one"]


def test_a_subset_of_what_has_none_is_refused(tmp_path, write, draw):
    draw("x.png")
    path = write("a.csv", table("one"))
    for where in (tmp_path, path, tmp_path / "*.csv"):
        with pytest.raises(DatasetError, match="no subset 'en'"):
            load(where, subset="en")


def test_a_folder_as_datasets_pushes_it_to_the_hub(tmp_path, draw):
    """Each subset a folder of Parquet shards, the card as the library itself writes it."""
    datasets = pytest.importorskip("datasets")
    cards = pytest.importorskip("huggingface_hub")
    data = cards.DatasetCardData()
    draw("x.png")
    for name, captions in (("en", ["one", "two"]), ("fr", ["un", "deux"])):
        infos = {}
        for split, caption in zip(("train", "test"), captions, strict=True):
            path = tmp_path / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict({"image": ["../x.png"], "caption": [caption]}).to_parquet(path)
            infos[split] = [f"{name}/{split}-*"]
        datasets.utils.metadata.MetadataConfigs(
            {name: {"data_files": [{"split": split, "path": paths} for split, paths in infos.items()]}}
        ).to_dataset_card_data(data)
    (tmp_path / "README.md").write_text(f"---\n{data}\n---\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="has 2 subsets: en, fr"):
        load(tmp_path)
    loaded = load(tmp_path, subset="fr", image_root=tmp_path / "en")
    assert sorted(zip(column(loaded, "split"), column(loaded, "caption"), strict=True)) == [
        ("test", "deux"),
        ("train", "un"),
    ]


@given(st.text(alphabet="-: \n[]{}&*!'\"abconfigsdata_e", max_size=60))
def test_no_card_is_too_odd(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_text(f"---\nconfigs:\n- {text}\n---\n", encoding="utf-8")
    for subset in subsets_of(folder):
        subset.files(["a", "a/b"])
