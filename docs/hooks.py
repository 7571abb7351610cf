"""Pages that are made when the site is built: the help of every verb, the docstrings of the API, the public data sets.

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
from medseg_jax.data.sources import sources

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

ALONE = """    options:
      members: false"""
"""The text of a module, without what is in it."""


def on_files(files, config):
    """Adds the generated pages."""
    pages = {"cli": cli_page(), "api": api_page(), "public-data-sets": sources_page()}
    for name, content in ((f"reference/{name}.md", content) for name, content in pages.items()):
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
    for name, home in sorted(medseg_jax._HOME.items(), key=lambda pair: pair[1]):
        room, module = home.partition(".")[0], f"::: medseg_jax.{home}\n{ALONE}"
        if room == "methods" and module not in rooms[room]:
            rooms[room].append(module)  # its text has the objective, and what differs from the source
        rooms[room].append(f"::: medseg_jax.{home}.{name}")
    missing = rooms.keys() - SECTIONS.keys()
    assert not missing, f"docs/hooks.py has no heading for {missing}"
    parts = [
        "# Python API",
        "Everything below is an attribute of `medseg_jax`: `import medseg_jax as ms`, `ms.train(...)`.",
    ]
    for room, title in SECTIONS.items():
        parts += [f"## {title}", *rooms[room]]
    return "\n\n".join(parts)


def sources_page() -> str:
    """What `medseg data sources NAME` says, for all of them."""
    parts = [
        "# Public data sets",
        "Nothing is downloaded: get a set where its owners give it out, under their terms. Then",
    ]
    parts += ["```bash\nmedseg data convert --source NAME SRC DST\n```", "where SRC is a folder or an archive."]
    for source in sources().values():
        parts += [
            f"## {source.name}",
            source.title,
            f"* **Licence:** {source.licence}\n* **Cite:** {source.citation}\n* **From:** {source.origin}\n"
            f"* **How:** {source.access}\n* **Split:** {source.split}",
            f"```text\n{source.layout.strip(chr(10))}\n```",
        ]
    return "\n\n".join(parts)
