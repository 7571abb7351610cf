"""Damaged files of every format: an array or a UserError, never anything else."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from files import AFFINE
from medseg_jax.data import io
from medseg_jax.types import Geometry, UserError


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, bytes]:
    """A small valid file of every kind."""
    folder = tmp_path_factory.mktemp("samples")
    label = np.random.default_rng(0).integers(0, 3, (9, 9, 9)).astype(np.uint8)
    files = {}
    for ending, kind in io.SUFFIXES.items():
        if ending in io.DETACHED:  # the header of the attached form, and its voxels in a file of their own
            whole = files[io.DETACHED[ending]]
            mark, line = (
                (b"\n\n", b"\ndata file: fuzzed.raw\n\n") if ending == ".nhdr" else (b"LOCAL\n", b"fuzzed.raw\n")
            )
            files[ending], files[f"{ending} voxels"] = (
                whole.replace(mark, line, 1).split(line)[0] + line,
                whole.split(mark, 1)[1],
            )
            continue
        array = label[0] if kind == "picture" else label
        image = array[..., None]
        io.write_image(folder / f"a{ending}", image, Geometry(array.shape, AFFINE if kind != "picture" else np.eye(4)))
        files[ending] = (folder / f"a{ending}").read_bytes()
    return files


def mutate(raw: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(raw)
    for _ in range(rng.integers(1, 6)):
        # Headers are where the interesting bytes are.
        data[rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 128))] = rng.integers(256)
    return bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)


def fuzz(samples, folder, ending, seed):
    path = folder / f"fuzzed{ending}"
    path.write_bytes(mutate(samples[ending], seed))
    (folder / "fuzzed.raw").write_bytes(samples.get(f"{ending} voxels", b""))
    for read in (io.read_image, io.read_label):
        try:
            array, geometry = read(path)
        except UserError:
            continue
        assert array.shape[: len(geometry.shape)] == geometry.shape
        assert np.isfinite(geometry.affine).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ending=st.sampled_from(sorted(io.SUFFIXES)), seed=st.integers(0, 2**32))
def test_fuzzed_files_raise_only_user_errors(samples, tmp_path, ending, seed):
    fuzz(samples, tmp_path, ending, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ending", sorted(io.SUFFIXES))
def test_fuzzed_files_long(samples, tmp_path, ending):
    for seed in range(2000):
        fuzz(samples, tmp_path, ending, seed)
