"""Makes the notebooks from their sources, which are what one edits: python colab/build.py

A source is a Python file in jupytext's percent format. The badge and the cell that installs the package are the same
for all and stand here. Cells carry numbers for names and no outputs, so that the same source gives the same bytes.
"""

from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
REPOSITORY = "medseg-jax/medseg_jax"
"""Where the notebooks will lie on GitHub, to be set at publication: Colab opens them and the package from there."""

BADGE = """[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb)"""

INSTALL = """# Installs the package where it is missing (a minute or two), for the accelerator that the machine has.
import importlib.util
import os
import shutil
import subprocess
import sys

if importlib.util.find_spec("medseg_jax") is None:
    tpu = any(name.startswith(("TPU_", "COLAB_TPU")) for name in os.environ)
    extra = "[tpu]" if tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
    package = f"medseg-jax{{extra}} @ git+https://github.com/{repository}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)"""


def sources() -> list[Path]:
    """The notebooks' sources."""
    return sorted(path for path in HERE.glob("*.py") if path.name != "build.py")


def notebook(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs."""
    found = jupytext.read(source, fmt="py:percent")
    names = {"repository": REPOSITORY, "name": source.stem}
    title, *rest = found.cells
    title.source = f"{BADGE.format(**names)}\n\n{title.source}"
    cells = [title, nbformat.v4.new_code_cell(INSTALL.format(**names)), *rest]
    for number, cell in enumerate(cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "colab": {"provenance": []}})


def main() -> None:
    """Writes every notebook beside its source."""
    for source in sources():
        nbformat.write(notebook(source), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb").relative_to(HERE.parent))


if __name__ == "__main__":
    main()
