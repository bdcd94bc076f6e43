"""The README agrees with the code. `python tests/cli/test_readme.py` rewrites its generated parts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from nc_audit.schema import FINDING_KINDS, TABLES, columns_markdown

README = Path(__file__).parents[2] / "README.md"


def block(name: str) -> str:
    return f"<!-- columns: {name} -->\n{columns_markdown(name)}\n<!-- end -->"


def kinds() -> str:
    lines = [f"| `{kind}` | {severity} | {meaning} |" for kind, (severity, meaning) in FINDING_KINDS.items()]
    head = ["<!-- findings -->", "| kind | severity | means |", "|---|---|---|"]
    return "\n".join([*head, *lines, "<!-- end -->"])


def rewritten(text: str) -> str:
    text = re.sub(r"<!-- findings -->\n.*?<!-- end -->", lambda _: kinds(), text, flags=re.S)
    for name in TABLES:
        text = re.sub(
            rf"<!-- columns: {name} -->\n.*?<!-- end -->", lambda _, n=name: block(n), text, flags=re.S
        )
    return text


@pytest.mark.parametrize("name", TABLES)
def test_the_column_reference_is_the_schema(name: str) -> None:
    assert block(name) in README.read_text(encoding="utf-8"), "run python tests/cli/test_readme.py"


def test_the_kinds_of_findings_are_those_of_the_schema() -> None:
    assert kinds() in README.read_text(encoding="utf-8"), "run python tests/cli/test_readme.py"


def test_the_tests_command_stands_behind_its_marker() -> None:
    found = re.search(r"<!-- test command -->\n```sh\n(.+)\n```", README.read_text(encoding="utf-8"))
    assert found
    assert found[1].endswith("tests/check.py")


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
