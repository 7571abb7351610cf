"""Makes docs/benchmarks/index.md from those files of benchmarks/results that hold rows (see benchmarks/README.md).

python benchmarks/tables.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Speed against peers

Made by `benchmarks/tables.py` from `benchmarks/results/`; `benchmarks/README.md` says how to repeat it.
Both sides ran on one machine, in turns. A ratio is ours / theirs: below 1 we are faster. A goal is what we had set out
to reach.
The machine was shared with other work: compare ratios, not seconds; "cpu" is CPU time, which suffers least.
Sections without a peer compare methods or networks of ours. The selective scan has
[a page of its own](../explanation/selective-scan.md).
"""


PROOF = ("first_losses",)
"""Keys that show that both sides compute the same, and are no figure of speed."""


def cell(value: Any) -> str:
    """A figure with three digits, a list with crosses, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return " × ".join(map(cell, value)) if isinstance(value, list) else str(value)


def verdict(row: dict[str, Any]) -> str:
    """Whether the goal is reached by the row's first ratio, and by how much not."""
    if row["ratio"] <= row["goal"]:
        return f"≤ {cell(row['goal'])} reached"
    return f"≤ {cell(row['goal'])} **missed by {100 * (row['ratio'] / row['goal'] - 1):.0f} %**"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, one column a key; keys that only some rows have leave gaps."""
    rows = [{k: verdict(row) if k == "goal" and "ratio" in row else v for k, v in row.items()} for row in rows]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in PROOF]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("_", " ")


def section(title: str, content: dict[str, Any]) -> str:
    """One results file as a section."""
    settings = ", ".join(f"{key.replace('_', ' ')}: {cell(value)}" for key, value in content["settings"].items())
    sides = content["versions"].items()
    nested = all(isinstance(found, dict) for _, found in sides)
    versions = "; ".join(f"{side}: {flat(found)}" for side, found in sides) if nested else flat(content["versions"])
    return f"## {title}\n\n{content['what']}. {settings}.\n\n{table(content['rows'])}\n\nVersions: {versions}.\n"


def flat(versions: dict[str, str]) -> str:
    """name version, name version, ..."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def page(results: Path) -> str:
    """The whole page."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    found = [section(name.replace("_", " ").capitalize(), c) for name, c in files.items() if "rows" in c]
    return "\n".join([HEAD, *found])


if __name__ == "__main__":
    target = ROOT / "docs" / "benchmarks" / "index.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(ROOT / "benchmarks" / "results"))
