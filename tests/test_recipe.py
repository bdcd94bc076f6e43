from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from nc_audit.errors import RecipeError
from nc_audit.recipe import (
    Recipe,
    build_recipe,
    find_recipe,
    list_recipes,
    read_recipe,
    recipes_folder,
    show,
)

LISTS_EVERY_KEY = "nc-audit recipes show self_paced lists every key"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(**arguments) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        build_recipe(**arguments)
    return caught.value


# --- layers


def test_without_layers_the_defaults_hold():
    recipe = build_recipe()
    assert recipe == Recipe()
    assert (recipe.train.method, recipe.image.encoder, recipe.text.encoder) == ("self_paced", "auto", "auto")
    assert (recipe.tag.clean_at, recipe.tag.noisy_at) == (0.2, 0.8)
    assert recipe.score.candidates == 1000


def test_later_layers_win_key_by_key(tmp_path):
    first = write(
        tmp_path, "first", "[train]\nsteps = 10\nlr = 0.5\nwidth = 8\n[image.options]\na = 1\nb = 2\n"
    )
    second = write(tmp_path, "second", "[train]\nsteps = 20\n[image.options]\nb = 3\n")
    recipe = build_recipe(
        [first, second],
        ["train.lr=0.25", "train.seed=7"],
        {"train": {"seed": 3, "width": 9, "hidden": None}, "dataset": {"split": "train"}},
    )
    assert recipe.train.steps == 20, "the second recipe over the first"
    assert recipe.train.width == 9, "an option over the recipes"
    assert recipe.train.lr == 0.25, "--set over the recipes"
    assert recipe.train.seed == 7, "--set over an option"
    assert recipe.train.hidden == 512, "an option that is not given changes nothing"
    assert recipe.image.options == {"a": 1, "b": 3}
    assert recipe.dataset.split == "train"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.seed=4", "train", "seed", 4),
        ("train.lr = 1e-2", "train", "lr", 0.01),
        ("export.reweight=true", "export", "reweight", True),
        ("image.encoder=timm:resnet18", "image", "encoder", "timm:resnet18"),
        ('image.encoder="patches"', "image", "encoder", "patches"),
        ("train.first_look_dims=[8, 16]", "train", "first_look_dims", (8, 16)),
        ("export.drop=['noisy', 'ambiguous']", "export", "drop", ("noisy", "ambiguous")),
        ("image.mean=0.5", "image", "mean", 0.5),
        ("image.options.pad_type=same", "image", "options", {"pad_type": "same"}),
        ("dataset.image_root=a=b", "dataset", "image_root", "a=b"),
    ],
)
def test_set_parses_toml_values_and_bare_words(override, section, key, value):
    assert getattr(getattr(build_recipe(overrides=[override]), section), key) == value


@pytest.mark.parametrize("text", ["train.seed", "seed=1", ".seed=1", "train.=1", "=1", ""])
def test_set_without_section_key_and_value_is_refused(text):
    problem = problems_of(overrides=[text])
    assert problem.message == f"--set {text} is not section.key=value"
    assert problem.hint == "for example --set train.seed=1"


# --- problems


def test_all_problems_are_told_at_once_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "bad",
        '[train]\nstep = 5\nlr = -1\nwidth = "wide"\n[scores]\nx = 1\n[export]\nreweigth = true\n',
    )
    problem = problems_of(names=[path], overrides=["score.candidates=1"])
    expected = [
        'train.width: input should be a valid integer, unable to parse string as an integer (got "wide")',
        "train.lr: input should be greater than 0 (got -1)",
        "unknown key train.step (did you mean steps?)",
        "score.candidates: input should be greater than or equal to 2 (got 1)",
        "unknown key export.reweigth (did you mean reweight?)",
        "unknown key scores (did you mean score?)",
    ]
    assert sorted(problem.problems) == sorted(expected)
    assert problem.message == "the recipe has 6 problems: " + "; ".join(problem.problems)
    assert problem.hint == LISTS_EVERY_KEY
    assert isinstance(problem, ValueError)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.sead=1", "unknown key train.sead (did you mean seed?)"),
        ("tag.zzz=1", "unknown key tag.zzz (known: clean_at, noisy_at)"),
        ("nonsense.key=1", "unknown key nonsense (known: dataset, image, text, train, score, tag, export)"),
        ("tag.clean_at=0.9", "tag: clean_at must not be above noisy_at"),
        ("train.clean_at=0.99", "train: clean_at must be below noisy_at"),
        ("train.epochs=2", "train: first_counted_epoch must not be above epochs"),
        ("train.pace=quick", "train.pace: input should be 'cosine', 'divided' or 'none' (got \"quick\")"),
        ("train.shrinkage=1", "train.shrinkage: input should be less than 1 (got 1)"),
    ],
)
def test_one_problem_as_a_whole_message(override, text):
    problem = problems_of(overrides=[override])
    assert problem.message == f"the recipe has 1 problem: {text}"
    assert problem.problems == [text]
    assert str(problem) == f"the recipe has 1 problem: {text} ({LISTS_EVERY_KEY})"


@pytest.mark.parametrize("key", ["train.lr", "train.weight_decay", "train.log_scale", "train.pace_growth"])
def test_infinities_and_what_is_no_number_are_refused(key):
    for value in ("nan", "inf", "-inf"):
        (problem,) = problems_of(overrides=[f"{key}={value}"]).problems
        assert problem.startswith(f"{key}: ")


def test_a_section_that_is_no_table_is_named(tmp_path):
    problem = problems_of(names=[write(tmp_path, "bad", "train = 3\n")])
    assert len(problem.problems) == 1
    assert problem.problems[0].startswith("train: ")


# --- files


def test_unknown_names_are_answered_with_the_nearest():
    problem = problems_of(names=["self_pased"])
    assert (problem.message, problem.hint) == ("no recipe is called self_pased", "did you mean self_paced?")


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "none.toml")
    problem = problems_of(names=[path])
    assert problem.message == f"recipe {path} is not a file"
    assert problem.hint == "nc-audit recipes lists those that come with the tool"


def test_a_file_that_is_not_toml_is_named(tmp_path):
    path = write(tmp_path, "bad", "[train\n")
    problem = problems_of(names=[path])
    assert problem.message.startswith(f"recipe {path} is not TOML: ")
    assert problem.hint == "nc-audit recipes show self_paced prints a good one"


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    problem = problems_of(names=[str(path)])
    assert problem.message.startswith(f"recipe {path} cannot be read: ")
    assert problem.hint == "give a TOML file in UTF-8"


def test_deep_nesting_is_no_crash(tmp_path):
    path = write(tmp_path, "deep", "v = " + "[" * 100_000)
    assert problems_of(names=[path]).message.startswith(f"recipe {path} is not TOML: ")


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = write(tmp_path, "marked", "\ufeff[train]\nseed = 5\n")
    assert build_recipe([path]).train.seed == 5


def test_the_packaged_recipes_are_found():
    assert {"self_paced", "builtin", "mobilenet_tfidf"} <= set(list_recipes())
    assert find_recipe("self_paced") == recipes_folder() / "self_paced.toml"


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_packaged_recipe_builds_and_opens_with_what_it_is(name):
    assert isinstance(build_recipe([name]), Recipe)
    first, *rest = list_recipes()[name].read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert first.endswith(".") or first.endswith("default.")
    assert any(line.startswith("# command   nc-audit score DATASET") for line in rest)


# --- show


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_shown_recipes_build_the_same_recipe(name, tmp_path):
    recipe = build_recipe([name])
    assert build_recipe([write(tmp_path, "shown", show(recipe))]) == recipe


words = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=20)
names = st.text("abc_9 .-\"'é", min_size=1, max_size=5)


@given(
    words,
    st.dictionaries(names, st.one_of(st.booleans(), st.integers(-9, 9), words)),
    st.floats(1e-6, 10),
    st.lists(st.integers(1, 512), min_size=1, max_size=4),
    st.one_of(st.none(), st.floats(0, 1), st.tuples(*[st.floats(0, 1)] * 3)),
)
def test_show_round_trips_through_toml(split, options, lr, dims, mean):
    recipe = build_recipe(
        settings={
            "dataset": {"split": split},
            "image": {"options": options, "mean": mean},
            "train": {"lr": lr, "first_look_dims": dims},
        }
    )
    again = Recipe.model_validate(tomllib.loads(show(recipe)))
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize(
    "text", ["del \x7f", "\U0001f6f0 satellite", "line\nbreak", "\x1b[31m", 'quote " back \\']
)
def test_show_escapes_what_toml_does_not_take_as_it_is(text):
    for image in ({"weights": text}, {"options": {text: 1}}):
        recipe = build_recipe(settings={"image": image})
        assert Recipe.model_validate(tomllib.loads(show(recipe))) == recipe


def test_show_explains_every_key():
    text = show(Recipe())
    for section, info in Recipe.model_fields.items():
        assert f"[{section}]" in text
        for key, field in info.annotation.model_fields.items():
            if isinstance(getattr(getattr(Recipe(), section), key), BaseModel):
                assert f"[{section}.{key}]" in text
                continue
            assert f"{key} = " in text
            assert field.description
            assert f"# {field.description}" in text


def test_the_digest_tells_settings_apart():
    digests = {build_recipe(overrides=o).digest() for o in ([], ["train.seed=1"], ["tag.noisy_at=0.7"])}
    assert len(digests) == 3
    assert build_recipe(overrides=["train.seed=0"]).digest() == build_recipe().digest()


def test_reading_does_not_check(tmp_path):
    assert read_recipe(Path(write(tmp_path, "any", "[x]\ny = 1\n"))) == {"x": {"y": 1}}
