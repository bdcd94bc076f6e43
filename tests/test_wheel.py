"""What a wheel must carry besides code: the pages of report and review, and the recipes."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
    "targets"
]["wheel"]
PAGES = {
    "nc_audit/report/page": {"report.html.j2", "report.css", "report.js"},
    "nc_audit/review/page": {"index.html", "review.css", "review.js", "icon.svg"},
}


def test_the_wheel_takes_the_whole_package_and_the_recipes():
    assert WHEEL == {"packages": ["nc_audit"], "force-include": {"recipes": "nc_audit/recipes"}}
    assert (ROOT / "recipes" / "self_paced.toml").is_file()


def test_every_page_lies_in_the_package():
    for folder, names in PAGES.items():
        assert {one.name for one in (ROOT / folder).iterdir()} == names


def test_the_pages_name_no_file_that_is_not_there():
    index = (ROOT / "nc_audit/review/page/index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:href|src)="([\w.]+)"', index)) == PAGES["nc_audit/review/page"] - {
        "index.html"
    }


def test_no_page_is_ignored():
    # The build leaves out what git ignores.
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    paths = [f"{folder}/{name}" for folder, names in PAGES.items() for name in names]
    paths += [f"recipes/{one.name}" for one in (ROOT / "recipes").iterdir()]
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.stdout == ""
