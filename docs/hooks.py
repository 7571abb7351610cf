"""Pages that are made when the site is built: the help of every verb, and the docstrings of the public API.

They cannot go out of date, since nobody writes them. Used by mkdocs (`hooks` in mkdocs.yml).
"""

import contextlib
import io
import os
from collections import defaultdict

from mkdocs.structure.files import File

import medseg_jax
from medseg_jax import cli
from medseg_jax.cli import data

SECTIONS = {
    "config": "What a run is",
    "training": "Training",
    "inference": "Prediction",
    "evaluation": "Evaluation",
    "data": "Data",
    "models": "Networks",
    "methods": "Methods",
    "runtime": "Runs",
    "types": "Words that all share",
}


def on_files(files, config):
    """Adds the generated pages."""
    for name, content in (("reference/cli.md", cli_page()), ("reference/api.md", api_page())):
        files.append(File.generated(config, name, content=content))
    return files


def cli_page() -> str:
    """`--help` of every verb."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    verbs = [[verb] for verb in cli.VERBS if verb != "data"]
    verbs[2:2] = [["data", verb] for verb in data.VERBS]
    parts = ["# Command line", "", f"```text\n{_help([])}\n```"]
    parts += [f"## medseg {' '.join(verb)}\n\n```text\n{_help(verb)}\n```" for verb in verbs]
    return "\n\n".join(parts)


def _help(verb: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main([*verb, "--help"])
    return out.getvalue().strip()


def api_page() -> str:
    """Everything that `import medseg_jax` offers, by the room it lives in."""
    rooms = defaultdict(list)
    for name, home in medseg_jax._HOME.items():
        rooms[home.partition(".")[0]].append(f"::: medseg_jax.{home}.{name}")
    missing = rooms.keys() - SECTIONS.keys()
    assert not missing, f"docs/hooks.py has no heading for {missing}"
    parts = [
        "# Python API",
        "Everything below is an attribute of `medseg_jax`: `import medseg_jax as ms`, `ms.train(...)`.",
    ]
    for room, title in SECTIONS.items():
        parts += [f"## {title}", *rooms[room]]
    return "\n\n".join(parts)
