"""Prediction of real files: a network that thresholds must give the thresholded file, in the file's own space."""

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from medseg_jax.data import io
from medseg_jax.data.plan import Plan
from medseg_jax.inference.predict import CasesFailed, predict
from medseg_jax.inference.sliding_window import memory_bound
from medseg_jax.types import Labels

DATA = Path(os.environ.get("MEDSEG_DATA", ""))
pytestmark = pytest.mark.skipif(not os.environ.get("MEDSEG_DATA"), reason="MEDSEG_DATA names no folder of real data")


def make_run(folder: Path, patch: tuple[int, ...], channels: int, threshold: float, **changes: Any):
    """A run whose network tells whether the first channel exceeds a threshold."""

    @jax.jit
    def network(image):
        above = (image[..., :1] > threshold).astype(jnp.float32)
        return jnp.concatenate([1 - above, above], -1)

    dim = len(patch)
    values: dict[str, Any] = {
        "dim": dim,
        "spacing": None,
        "patch_size": patch,
        "batch_size": 2,
        "normalization": ({"scheme": "none"},) * channels,
        "strides": ((1,) * dim,),
        "kernel_sizes": ((3,) * dim,),
        "features": (4,),
        "crop_nonzero": False,
        "steps": 1,
        "classes": ("bright",),
        "in_channels": channels,
    }
    names = tuple(f"channel {i}" for i in range(channels))
    labels = Labels.simple("bright")
    return SimpleNamespace(
        path=folder,
        plan=Plan(**values | changes),
        labels=labels,
        channels=names,
        predict=network,
        checkpoint="best",
        step=1,
        members=(),
        thresholds=None,
    )


FILES = [
    ("hippocampus_msd04/imagesTr/*.nii.gz", (40, 56, 40)),
    ("hippocampus_msd04/imagesTr/*.nii.gz", (24, 24)),
    ("sts_ctpet/STS_002/PET_image.nii.gz", (32, 64, 64)),
    ("la2018/*/*.h5", (64, 64, 64)),
    ("vessels/DRIVE/training/images/*.tif", (256, 256)),
    ("vessels/CHASEDB1/training/images/*.jpg", (256, 256)),
    ("vessels/STARE/training/images/*.ppm", (256, 256)),
    ("jsrt/native/images/*.png", (512, 512)),
    ("dsb2018/stage1_train/*/images/*.png", (128, 128)),
    ("idrid/images/*.jpg", (1024, 1024)),
]


@pytest.mark.parametrize(("pattern", "patch"), FILES)
def test_thresholding_network_gives_the_thresholded_file(tmp_path, pattern, patch):
    path = sorted(DATA.glob(pattern))[0]
    image, geometry = io.read_image(path)
    threshold = float(np.median(image[..., 0]))
    run = make_run(tmp_path, patch, image.shape[-1], threshold)
    (written,) = predict(run, path, tmp_path / "out", progress=False)
    label, found = io.read_label(written)
    np.testing.assert_array_equal(label, image[..., 0] > threshold)
    assert found.shape == geometry.shape
    if io.SUFFIXES[io.suffix(path)] == "nifti":
        before, after = nib.load(path), nib.load(written)
        np.testing.assert_array_equal(after.affine, before.affine)
        for key in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"):
            np.testing.assert_array_equal(after.header[key], before.header[key], err_msg=key)
    else:
        assert written.suffix == (".png" if len(geometry.shape) == 2 else path.suffix)


def test_a_fundus_image_of_12_megapixels_stays_below_the_printed_bound(tmp_path):
    path = sorted(DATA.glob("idrid/images/*.jpg"))[0]
    image, _ = io.read_image(path)
    run = make_run(tmp_path, (512, 512), 3, 100.0)
    from medseg_jax.inference.sliding_window import predict_slabs

    array = image[None].astype(np.float32)
    tracemalloc.start()
    for _ in predict_slabs(run.predict, array, (512, 512), 2, 0.5, 2, axis=1):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = memory_bound(array.shape[:-1], (512, 512), 3, 2, 2, axis=1)
    assert peak + array.nbytes < bound + 1_000_000
    assert bound < array.nbytes + 0.8 * array[..., :2].nbytes + 60e6


def test_ct_and_pet_on_their_own_grids_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for channel, name in enumerate(("CT", "PET")):
        (tmp_path / "in" / f"STS_002_{channel:04d}.nii.gz").symlink_to(
            DATA / "sts_ctpet" / "STS_002" / f"{name}_image.nii.gz"
        )
    with pytest.raises(CasesFailed, match="same space"):
        predict(make_run(tmp_path, (32, 32, 32), 2, 0.0), tmp_path / "in", tmp_path / "out", progress=False)


def test_resampling_keeps_the_place_of_a_hippocampus(tmp_path):
    path = sorted(DATA.glob("hippocampus_msd04/imagesTr/*.nii.gz"))[0]
    image, _ = io.read_image(path)
    threshold = float(np.median(image))
    run = make_run(tmp_path, (24, 24, 24), 1, threshold, spacing=(0.7, 0.8, 0.9))
    (written,) = predict(run, path, tmp_path / "out", progress=False)
    label, _ = io.read_label(written)
    expected = image[..., 0] > threshold
    dice = 2 * (label * expected).sum() / (label.sum() + expected.sum())
    assert dice > 0.97
