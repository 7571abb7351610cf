"""Every test that docs/explanation/guarantees.md names exists, and every promise names one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def named_in(file: Path) -> dict[str, bool]:
    """Test functions of a file and whether they are marked slow."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name: any("slow" in ast.unparse(d) for d in f.decorator_list) for f in functions}


def test_every_named_test_exists():
    assert len(NAMED) > 30
    missing = [f"{file}::{name}" for file, name in NAMED if name not in named_in(ROOT / file)]
    assert not missing


def test_every_promise_names_a_test_of_the_default_run():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section[0] for section in sections[:7]] == list("1234567")
    for section in sections:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
        assert any(not named_in(ROOT / file)[name] for file, name in named), section[:60]
