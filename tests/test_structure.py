"""The import direction between our own modules, and what stays out of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nc_audit

PACKAGE = Path(nc_audit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ANYBODY_MAY = {"errors", "schema", "run", "recipe", "methods", "decisions", "hub", "room", "process", "words"}
"""What every module may import, itself aside."""

ALSO = {
    "train": {"nc_audit.calibrate", "nc_audit.model"},
    "score": {"nc_audit.calibrate", "nc_audit.model", "nc_audit.unlikely_words"},
    "calibrate": set(),
    "tag": set(),
    "dataset": set(),
    "report": {"nc_audit.dataset.images"},
    "export": {
        "nc_audit.report",
        "nc_audit.report.text",
        "nc_audit.report.joined",
        "nc_audit.report.summary",
        "nc_audit.dataset.guard",
    },
    "review": {
        "nc_audit.dataset",
        "nc_audit.report.text",
        "nc_audit.report.joined",
        "nc_audit.tag",
    },
    "encoders": {"nc_audit.dataset", "nc_audit.dataset.images"},
    "tokens": {"nc_audit.embed", "nc_audit.encoders"},
    "bench": {
        "nc_audit.dataset",
        "nc_audit.dataset.rows",
        "nc_audit.embed",
        "nc_audit.encoders",
        "nc_audit.tokens",
        "nc_audit.train",
        "nc_audit.train.loop",
        "nc_audit.train.lockstep",
        "nc_audit.score",
        "nc_audit.calibrate",
        "nc_audit.model",
        "nc_audit.pipeline",
        "nc_audit.unlikely_words",
    },
    "embed": {"nc_audit.dataset", "nc_audit.dataset.images", "nc_audit.encoders", "nc_audit.team"},
    "team": set(),
    "unlikely_words": set(),
    "cluster": {"nc_audit.pipeline", "nc_audit.team"},
}
"""What a stage may import beyond that; of the dataset and the report only the names below."""

NAMES = {
    ("export", "nc_audit.report"): {
        "check_tags",
        "count_values",
        "joined",
        "noise_rate_text",
        "summary",
        "text",
    },
    ("encoders", "nc_audit.dataset"): {"decode_image"},
    ("review", "nc_audit.dataset"): {"decode_image"},
    ("embed", "nc_audit.dataset"): {"decode_image"},
}

FOUNDATION = {
    "errors": set(),
    "schema": {"errors"},
    "run": {"errors", "schema", "decisions", ""},
    "recipe": {"errors", "run"},
    "decisions": {"errors"},
    "hub": set(),
    "process": set(),
    "room": {"run"},
    "words": set(),
    "model": {"errors", "run", "methods"},
}
"""What the modules that everybody may import may import themselves; "" is the package's own name and version."""

ONLY_IN = {"rich": "console.py", "typer": "cli.py"}
LAZY = {"torch", "pandas", "datasets", "sklearn", "open_clip", "timm", "scipy", "transformers"}
MAY_BE_HEAVY = {"train", "score", "rivals", "calibrate", "embed", "methods", "encoders", "bench", "tokens"}


def imports(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Module, imported name ("" for a whole module) and whether it happens when the file is imported."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, "", at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}: relative import"
                yield from ((child.module or "", alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                for inner in child.body:
                    yield from walk(ast.Module([inner], []), False)
            else:
                inside_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, at_import and not inside_function)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def part_of(path: Path) -> str:
    """Top-level module or subpackage that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own(module: str) -> str | None:
    """Our top-level module that an imported name belongs to; None when it is not ours, "" for the package."""
    first, *rest = module.split(".")
    return (rest[0] if rest else "") if first == "nc_audit" else None


def resolved(module: str, name: str) -> str:
    """`from nc_audit import tag` names the module nc_audit.tag; `from nc_audit import __version__` does not."""
    is_module = (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
    return f"nc_audit.{name}" if module == "nc_audit" and name and is_module else module


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) == "methods"], ids=ids)
def test_methods_import_torch_the_standard_library_our_errors_and_room_only(path):
    for module, _, _ in imports(path):
        allowed = module.split(".")[0] in {"torch", *sys.stdlib_module_names}
        ours = module in {"nc_audit.errors", "nc_audit.room"} or module.startswith("nc_audit.methods")
        assert allowed or ours, module


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in ALSO], ids=ids)
def test_stages_do_not_import_each_other(path):
    part = part_of(path)
    for plain_module, name, _ in imports(path):
        module = resolved(plain_module, name)
        ours = own(module)
        if ours is None or ours in ANYBODY_MAY | {part, ""}:
            continue
        assert module in ALSO[part], f"{ids(path)} imports {module}"
        names = NAMES.get((part, module))
        assert names is None or name in names, f"{ids(path)} imports {name} from {module}"


@pytest.mark.parametrize("part", sorted(FOUNDATION))
def test_what_everybody_imports_imports_nothing_above_itself(part):
    found = {own(resolved(module, name)) for module, name, _ in imports(PACKAGE / f"{part}.py")} - {None}
    assert found <= FOUNDATION[part]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_the_console_prints_and_only_the_command_line_knows_typer(path):
    for module, _, _ in imports(path):
        owner = ONLY_IN.get(module.split(".")[0])
        assert owner is None or ids(path) == owner, f"{ids(path)} imports {module}"
        assert own(module) not in {"cli", "console"} or part_of(path) in {"cli", "__main__"}, module


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    if part_of(path) not in MAY_BE_HEAVY:
        heavy = {
            module for module, _, at_import in imports(path) if at_import and module.split(".")[0] in LAZY
        }
        assert not heavy


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_is_pickled(path):
    assert not {module.split(".")[0] for module, _, _ in imports(path)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
    }


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def imported_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running some code in a fresh interpreter."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in json.loads(told.stderr.splitlines()[-1])}


HELP = """
from nc_audit.cli import main
sys.argv = ["nc-audit", *{arguments}]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["report", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    loaded = imported_by(HELP.format(arguments=arguments))
    assert "typer" in loaded
    assert not loaded & {*LAZY, "numpy", "pyarrow"}


def test_the_library_face_of_tagging_leaves_torch_alone():
    assert not imported_by("import nc_audit.tag, nc_audit.run, nc_audit.recipe, nc_audit.pipeline") & LAZY


def test_the_tests_of_the_structure_see_imports(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.b\n"
        "try:\n    import c\nexcept ImportError:\n    pass\n"
        "def f():\n    from d import e\nclass G:\n    import h\n"
    )
    assert set(imports(path)) == {
        ("typing", "TYPE_CHECKING", True),
        ("a.b", "", False),
        ("c", "", True),
        ("d", "e", False),
        ("h", "", True),
    }
