"""The page of benchmarks says what the results say."""

import importlib.util
import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "tables.py"
spec = importlib.util.spec_from_file_location("tables", FILE)
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_goals_that_are_missed_are_said_to_be(tmp_path):
    rows = [{"name": "a", "goal": 1.0, "ratio": 1.25}, {"name": "b", "goal": 1.0, "ratio": 0.5, "voxels": 7}]
    content = {"what": "seconds", "settings": {"cores": 2}, "versions": {"jax": "1"}, "rows": rows}
    (tmp_path / "one_thing.json").write_text(json.dumps(content))
    (tmp_path / "no_rows.json").write_text("{}")
    page = tables.page(tmp_path)
    assert "## One thing" in page
    assert "No rows" not in page
    assert "| a | ≤ 1 **missed by 25 %** | 1.25 |  |" in page
    assert "| b | ≤ 1 reached | 0.5 | 7 |" in page
    assert "Versions: jax 1." in page
