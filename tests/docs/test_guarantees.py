"""Every test that docs/explanation/guarantees.md names exists, and every promise names one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def named_in(file: Path) -> dict[str, bool]:
    """Test functions of a file and whether all of their cases are marked slow, by themselves or with the file."""
    body = ast.parse(file.read_text()).body
    whole = any(isinstance(node, ast.Assign) and ast.unparse(node) == "pytestmark = pytest.mark.slow" for node in body)
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {f.name: whole or any(ast.unparse(d) == "pytest.mark.slow" for d in f.decorator_list) for f in functions}


def test_every_named_test_exists():
    assert len(NAMED) > 30
    missing = [f"{file}::{name}" for file, name in NAMED if name not in named_in(ROOT / file)]
    assert not missing


def test_slow_ones_are_called_slow():
    """A test is called slow by the word before it, in its sentence or up to a semicolon."""
    for part in re.split(r"; |\. |\.\n|\n\* ", PAGE):
        before, *after = part.split("*slow*")
        for text, said in [(before, False), *((rest, True) for rest in after)]:
            for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
                assert named_in(ROOT / file)[name] == said, name


def test_every_promise_names_a_test_of_the_default_run():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section[0] for section in sections[:7]] == list("1234567")
    for section in sections:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
        assert any(not named_in(ROOT / file)[name] for file, name in named), section[:60]
