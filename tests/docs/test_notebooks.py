"""The notebooks are those of their sources, small, and run from top to bottom."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

COLAB = Path(__file__).parents[2] / "colab"
SOURCES = [path for path in sorted(COLAB.glob("*.py")) if path.name != "build.py"]

nbformat = pytest.importorskip("nbformat", reason="pip install 'medseg-jax[notebooks]'")
pytest.importorskip("jupytext", reason="pip install 'medseg-jax[notebooks]'")


def ids(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("colab_build", COLAB / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three():
    assert ids(COLAB / "quick_start.py") in [ids(path) for path in SOURCES]
    assert len(SOURCES) == 3


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_the_notebook_is_that_of_its_source(build, source):
    """python colab/build.py makes them anew."""
    written = source.with_suffix(".ipynb").read_text()
    assert written == nbformat.writes(build.notebook(source)) + "\n"
    nbformat.validate(nbformat.reads(written, as_version=4))
    assert len(written) < 20_000
    assert all(not cell.get("outputs") for cell in json.loads(written)["cells"])


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_the_badge_opens_this_notebook_and_links_lead_somewhere(build, source):
    first, *rest = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    text = "".join(first["source"])
    assert f"colab.research.google.com/github/{build.REPOSITORY}/blob/main/colab/{source.stem}.ipynb" in text
    assert "\n# " in text  # the title comes with the badge
    prose = "".join("".join(cell["source"]) for cell in rest if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (COLAB / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_the_notebook_runs(source, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    for name, value in {"MEDSEG_STEPS": "6", "MEDSEG_SIZE": "32", "MEDSEG_SEEDS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "Dice" in text
    assert "\x1b" not in text  # no terminal's colours and bars
    assert not any("text/html" in output.get("data", {}) for output in outputs)  # and no box around every line
