"""The documentation says what the program does: its code runs, its commands exist, the site builds strictly."""

import functools
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from medseg_jax import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every `medseg ...` of a page's shell blocks, continued lines joined, comments dropped; and of its sentences."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += [line for line in re.findall(r"`(medseg [^`]+)`", prose) if line != "medseg data"]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"medseg\s", line)]


@functools.cache
def help_of(*verb: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert cli.main([*verb, "--help"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_has_its_verb_and_its_flags(page):
    for words in commands(page):
        verb = words[:2] if words[0] == "data" else words[:1]
        text = help_of(*verb)
        for flag in (w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)):
            known = re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)
            # verbs that take a config also take its fields
            field = verb[0] in ("train", "check") and re.fullmatch(
                r"--(seed|data|ema|labelled|workers|tensorboard|stages\..+)", flag
            )
            assert known or field, f"{page.name}: medseg {shlex.join(words)}: no {flag}"


def test_the_python_tutorial_runs(tmp_path):
    code = "\n".join(blocks(ROOT / "docs" / "tutorials" / "python.md", "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Dice" in done.stdout


@pytest.mark.slow
def test_the_first_tutorial_runs(tmp_path):
    for line in "\n".join(blocks(ROOT / "docs" / "tutorials" / "first-model.md", "bash")).splitlines():
        words = shlex.split(line)
        program = ["-m", "medseg_jax.cli"] if words[0] == "medseg" else []
        command = [sys.executable, *program, *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "scores" / "summary.json").exists()
    assert (tmp_path / "runs" / "first" / "report.html").exists()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'medseg-jax[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "medseg train" in (tmp_path / "site" / "reference" / "cli.html").read_text()
    assert "Raises" in (tmp_path / "site" / "reference" / "api.html").read_text()
