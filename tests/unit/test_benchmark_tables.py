"""The page of benchmarks says what the results say."""

import importlib.util
import json
from pathlib import Path

import pytest

from medseg_jax.config import load

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


@pytest.fixture
def preflight():
    spec = importlib.util.spec_from_file_location("preflight_tables", FILE.with_name("preflight.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sizes_of_every_config_are_known_to_preflight(preflight):
    configs = {path: load(preflight.ROOT / path) for path in preflight.config_files()}
    real = {p for p, config in configs.items() if not config.plan and not config.data.startswith("phantoms")}
    assert {Path(p).stem for p in real} <= preflight.DATA.keys()


def test_tables_of_preflight(preflight, tmp_path, monkeypatch):
    """A row a stage, what does not fit with what it needs; a page keeps all that stands around the markers."""
    seconds = {"matrix units": 0.009, "HBM": 0.002, "interconnect": 0.001}
    fine = {
        "stage": "train",
        "status": "compiled",
        "rows_per_chip": 4.0,
        "seconds": 61.0,
        "memory": {"total": 4 * 2**30},
        "counts": {"matmul_flops": 2e12, "bytes": 3e9, "collectives": {"all-reduce": {"count": 2, "bytes": 5e6}}},
        "roofline": {"step": 0.009, "binds": "matrix units", "seconds": seconds, "efficiency": 0.9},
    }
    large = {"stage": "more", "status": "out of memory", "needed": 20 * 2**30, "rows_per_chip": 8.0}
    found = {"chips": 16, "memory_per_chip": 16 * 2**30, "stages": [fine, large]}
    results = tmp_path / "preflight.json"
    results.write_text(json.dumps({"compiled": {f"{preflight.MODELS[0]} v5e-16": found}}))
    monkeypatch.setattr(preflight, "RESULTS", results)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- preflight -->old<!-- end of preflight -->b\n<!-- scaling --><!-- end of scaling -->c")
    preflight.write_tables(page)
    text = page.read_text()
    row = "| unet_hippocampus | v5e-16 | train | 4 | 4.00 GiB (25%) | 2 | 3 | 5 MB | 9 ms | matrix units | 61 s |"
    assert row in text
    assert "| more | 8 | out of memory (needs 20.0 GiB) |" in text
    assert "| unet_hippocampus | 16 | 4 | 5 | 2 | 1 | 9 | 90.0% |" in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("c")


def test_steps_of_a_run_of_several_stages_are_those_of_all(monkeypatch):
    monkeypatch.syspath_prepend(FILE.parent)
    evidence = importlib.import_module("evidence")
    log = [{"step": step, "seconds": 60.0} for step in (10, 20, 1, 10, 30)]  # the second stage begins at 1
    assert evidence._steps(log).tolist() == [10, 10, 1, 9, 20]
    assert evidence._minutes(log) == 50
