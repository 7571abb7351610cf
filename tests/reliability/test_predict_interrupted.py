"""A prediction stopped at any moment leaves only whole files under final names, and the same command finishes it."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

CODE = """
import signal, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from fakes import make_run, threshold
from medseg_jax.cli import predict as verb
from medseg_jax.runtime import run as runs
folder = Path(sys.argv[2])
def network(image):
    time.sleep(0.004)
    return threshold(image)
runs.open_run = lambda path, checkpoint: make_run(Path(path), (8, 16, 16), network)
print("ready", flush=True)
options = ["--probabilities", "--uncertainty"]
try:
    sys.exit(verb.main([str(folder / "run"), "-i", str(folder / "in"), "-o", str(folder / "out"), *options]))
except KeyboardInterrupt:
    sys.exit(130)
"""
CASES = 4


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, str(Path(__file__).parents[1]), str(folder)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def whole_files(folder: Path) -> set[str]:
    """Names under which something lies; each is read from its first byte to its last."""
    names = set()
    for path in (folder / "out").rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        names.add(path.name)
        if path.name.endswith(".nii.gz"):
            np.asarray(nib.load(path).dataobj)
        elif path.suffix == ".npz":
            with np.load(path) as file:
                assert file["probabilities"].shape[-1] == 3
        else:
            json.loads(path.read_text())
    return names


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param(signal.SIGKILL, -9, id="kill"),
        pytest.param(signal.SIGTERM, 143, id="term"),
        pytest.param(signal.SIGINT, 130, id="int", marks=pytest.mark.slow),
    ],
)
def test_stopped_at_several_moments_it_goes_on_and_ends_the_same(tmp_path, how, code):
    rng = np.random.default_rng(0)
    images = {f"c{i}": rng.integers(0, 31, (40, 44, 36)).astype(np.int16) for i in range(CASES)}
    for name, array in images.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    moments = random.Random(int(how))
    stops, finished, untouched = 0, set(), {}
    while True:
        process = start(tmp_path)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.2) if stops < 4 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode in (code, -how), errors  # -how: before the work has begun, or after its end
        stops += 1
        whole_files(tmp_path)
        journal = tmp_path / "out" / "predict.json"
        done = set(json.loads(journal.read_text())["cases"]) if journal.exists() else set()
        assert done >= finished, "a finished case is never lost"
        finished = done
        for id in finished:
            stamp = (tmp_path / "out" / f"{id}.nii.gz").stat().st_mtime_ns
            assert untouched.setdefault(id, stamp) == stamp, "a finished case is never repeated"
    assert stops >= 1, "a moment must fall into the work"
    assert len(whole_files(tmp_path)) == CASES * (1 + 3 + 1) + 2
    for name, array in images.items():
        label = np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(label, (array > 10).astype(np.uint8) + (array > 20))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")], "drafts of killed ones are removed"


def test_two_predictions_into_one_folder_are_refused(tmp_path):
    import fcntl

    from medseg_jax.inference.journal import lock
    from medseg_jax.types import UserError

    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another prediction"), lock(tmp_path / "out"):
        pass
    os.close(handle)
    (tmp_path / "out" / ".mine").write_text("")
    (tmp_path / "out" / ".123-a.nii.gz").write_text("")
    with lock(tmp_path / "out"):
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".mine"]
