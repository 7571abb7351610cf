"""Prediction of files and folders: the label lies where the image lies, whatever its orientation, spacing, format."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import (
    Counter,
    expected_label,
    folder_of_cases,
    make_run,
    random_volume,
    threshold,
    write_nifti,
)
from medseg_jax.data.cache import preprocess, restore
from medseg_jax.data.geometry import resample, spacing_canonical, to_canonical
from medseg_jax.inference import uncertainty
from medseg_jax.inference.cases import find_cases, load_case
from medseg_jax.inference.ensemble import resample_slabs
from medseg_jax.inference.predict import CasesFailed, Display, Settings, predict, segment
from medseg_jax.inference.sliding_window import predict_volume
from medseg_jax.types import Geometry, Labels

# ------------------------------------------------------------------------------------------------- shape, place, header


ORIENTATIONS = [
    "".join(codes[i] for i in order)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for codes in (a + b + c for a in "RL" for b in "AP" for c in "SI")
]


def oriented(codes: str, spacing: tuple[float, ...], shape: tuple[int, ...], tilt: float = 0.05) -> np.ndarray:
    """Affine of a file whose axes point to `codes`, slightly oblique."""
    signs = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world, sign = signs[code]
        affine[world, axis] = sign * spacing[axis]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = [-31.5, 12.25, 7]
    return affine


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_label_of_a_pointwise_network_is_the_thresholded_file_in_all_48_orientations(tmp_path, codes):
    assert len(set(ORIENTATIONS)) == 48
    shape, spacing = (5, 9, 7), (0.7, 1.3, 2.1)
    array = random_volume(*shape)
    affine = oriented(codes, spacing, shape)
    write_nifti(tmp_path / "in" / "a_0000.nii.gz", array, affine)
    run = make_run(tmp_path / "run", patch=(4, 4, 4) if codes[0] in "RA" else (4, 4))
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    assert path == tmp_path / "out" / "a.nii.gz"
    label = nib.load(path)
    np.testing.assert_array_equal(np.asarray(label.dataobj), expected_label(array))
    source = nib.load(tmp_path / "in" / "a_0000.nii.gz")
    np.testing.assert_array_equal(label.affine, source.affine)
    for key in ("descrip", "sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b", "qoffset_x"):
        np.testing.assert_array_equal(label.header[key], source.header[key], err_msg=key)
    assert label.get_data_dtype() == np.uint8


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    patch=st.sampled_from([(4, 4, 4), (8, 4, 6), (4, 4), (8, 16)]),
    codes=st.sampled_from(ORIENTATIONS),
    crop=st.booleans(),
)
def test_any_shape_against_any_patch(tmp_path_factory, shape, patch, codes, crop):
    folder = tmp_path_factory.mktemp("case")
    array = random_volume(*shape, seed=sum(shape))
    if crop:
        array[:, : shape[1] // 2] = 0
    write_nifti(folder / "in" / "a.nii", array, oriented(codes, (1, 1.5, 2), shape))
    run = make_run(folder / "run", patch=patch, crop_nonzero=crop)
    (path,) = predict(run, folder / "in", folder / "out", progress=False, overlap=0.3)
    assert path.name == "a.nii"
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected_label(array))


def smooth(image):
    """Probabilities that vary smoothly, so that interpolating them makes a difference."""
    x = np.asarray(image)[..., :1] / 31
    return np.concatenate([(1 - x) ** 2, 2 * x * (1 - x), x**2], -1).astype(np.float32)


@pytest.mark.parametrize(
    ("patch", "spacing", "plan_spacing"),
    [
        ((4, 4, 4), (1, 1, 1), (1.4, 0.8, 1.1)),
        ((4, 4, 4), (1, 1, 5), (2.5, 2.0, 2.0)),
        ((4, 4, 4), (5, 1, 1), (5, 1.3, 1.3)),
        ((4, 4), (1, 1, 8), (8, 0.6, 0.6)),
        ((4, 4), (1, 1, 8), (5, 1, 1)),
        ((4, 4), (2, 2, 2), (1, 3, None)),
    ],
)
@pytest.mark.parametrize("codes", ["SAR", "RAS", "LPI", "PSL"])
def test_resampled_slabs_are_what_restore_makes_of_the_whole_volume(tmp_path, patch, spacing, plan_spacing, codes):
    rng = np.random.default_rng(1)
    shape = (12, 17, 9)
    array = rng.normal(15, 8, shape).astype(np.float32)
    array[:2] = 0
    write_nifti(tmp_path / "in" / "a.nii.gz", array, oriented(codes, spacing, shape))
    run = make_run(tmp_path / "run", patch=patch, network=smooth, spacing=plan_spacing, crop_nonzero=True)
    (case,) = find_cases(tmp_path / "in", run.channels)
    image, geometry = load_case(case, run.channels)
    done = preprocess(image, None, geometry, run.plan)
    assert done.record.resampled_shape != done.record.crop_shape
    whole = restore(predict_volume(smooth, done.image, patch, 3), done.record, geometry, run.plan)
    kept = np.zeros((*done.record.canonical_shape, 3), np.float32)
    seen = []
    label = segment([(run, done)], geometry, Settings(), kept, progress=lambda *rows: seen.append(rows))
    np.testing.assert_allclose(kept, to_canonical(whole, geometry, channels=True), atol=2e-6)
    clear = np.sort(whole, -1)
    clear = clear[..., -1] - clear[..., -2] > 1e-5
    np.testing.assert_array_equal(label[clear], run.labels.decode(whole)[clear])
    assert clear.mean() > 0.99
    assert label.shape == shape
    assert seen[-1][0] == seen[-1][1] > 1
    assert len(np.unique(label)) == 3
    assert spacing_canonical(geometry) == pytest.approx(done.record.original_spacing)


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(*[st.integers(1, 9)] * 3),
    target=st.tuples(*[st.integers(1, 14)] * 3),
    axis=st.integers(0, 1),
    coarse=st.sampled_from([None, 0, 1, 2]),
    cuts=st.lists(st.integers(1, 8), max_size=4),
)
def test_slabs_of_any_thickness_resample_as_a_whole(source, target, axis, coarse, cuts):
    if axis:
        source, target = (1, *source[1:]), (1, *target[1:])
    array = np.random.default_rng(0).random((*source, 2)).astype(np.float32)
    edges = [0, *sorted({c for c in cuts if c < source[axis]}), source[axis]]
    slabs = [(a, array.take(range(a, b), axis)) for a, b in pairwise(edges)]
    parts = list(resample_slabs(slabs, source, target, axis, coarse))
    position = 0
    for start, part in parts:
        assert start == position
        position += part.shape[axis]
    whole = np.concatenate([part for _, part in parts], axis)
    np.testing.assert_allclose(whole, resample(array, target, 1, coarse), atol=1e-6)


def test_test_time_augmentation_reaches_the_network(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii", random_volume(4, 4, 4))
    seen = []

    def network(image):
        seen.append(np.asarray(image))
        return threshold(image)

    run = make_run(tmp_path / "run", patch=(4, 4, 4), network=network)
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", tta=True, progress=False)
    assert len(seen) == 8
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected_label(random_volume(4, 4, 4)))


def test_overlapping_classes_become_bit_masks(tmp_path):
    array = random_volume(5, 6, 7)
    write_nifti(tmp_path / "in" / "a.nii.gz", array)

    def network(image):
        return np.concatenate([np.asarray(image) > 10, np.asarray(image) > 20], -1).astype(np.float32)

    run = make_run(tmp_path / "run", network=network)
    run.labels = Labels.overlapping("low", "high")
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), (array > 10) + 2 * (array > 20))


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("ending", "expected"), [(".png", ".png"), (".jpg", ".png"), (".bmp", ".png"), (".tif", ".png")]
)
@pytest.mark.parametrize("patch", [(8, 8), (32, 64)])
def test_pictures_become_png_label_maps(tmp_path, ending, expected, patch):
    blocks = np.kron(random_volume(3, 5).astype(np.uint8) * 5, np.ones((8, 8), np.uint8))
    (tmp_path / "in").mkdir()
    Image.fromarray(blocks).save(tmp_path / "in" / f"IMG 7{ending}", **({"quality": 100} if ending == ".jpg" else {}))
    run = make_run(tmp_path / "run", patch=patch, network=lambda x: threshold(np.round(np.asarray(x) / 5)))
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    assert path.name == f"IMG 7{expected}"
    np.testing.assert_array_equal(np.array(Image.open(path)), expected_label(np.round(blocks / 5)))


def test_a_picture_that_is_resized_for_the_network_comes_back_in_its_own_size(tmp_path):
    picture = np.zeros((90, 70), np.uint8)
    picture[20:60, 10:50] = 30
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "a.png")
    run = make_run(tmp_path / "run", patch=(16, 16), network=smooth, working_size=(32, 48))
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    label = np.array(Image.open(path))
    assert label.shape == picture.shape
    assert ((label > 0) == (picture > 0)).mean() > 0.95


@pytest.mark.parametrize("ending", [".npy", ".npz", ".h5"])
def test_arrays_keep_their_format(tmp_path, ending):
    from medseg_jax.data import io

    array = random_volume(5, 9, 12)
    geometry = Geometry(array.shape, unit="px")
    io.write_image(tmp_path / "in" / f"a{ending}", array[..., None], geometry)
    (path,) = predict(make_run(tmp_path / "run"), tmp_path / "in", tmp_path / "out", progress=False)
    assert path.name == f"a{ending}"
    np.testing.assert_array_equal(io.read_label(path)[0], expected_label(array))


# -------------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_probabilities_lie_in_the_space_of_the_image(tmp_path, spacing):
    array = random_volume(6, 8, 10)
    array[:2] = 0
    write_nifti(tmp_path / "in" / "a.nii.gz", array, oriented("LPS", (1, 1, 1), array.shape))
    run = make_run(tmp_path / "run", network=smooth, crop_nonzero=True, spacing=spacing)
    out = tmp_path / "out"
    (path,) = predict(run, tmp_path / "in", out, save_probabilities=True, progress=False)
    with np.load(out / "probabilities" / "a.npz") as file:
        probabilities = file["probabilities"]
        assert list(file["classes"]) == ["background", "low", "high"]
    assert probabilities.dtype == np.float16
    assert probabilities.shape == (*array.shape, 3)
    np.testing.assert_array_equal(probabilities[:2, ..., 0], 1)
    np.testing.assert_allclose(probabilities.sum(-1, dtype=np.float32), 1, atol=2e-3)
    if spacing is None:
        np.testing.assert_allclose(probabilities[2:], smooth(array[2:, ..., None]), atol=1e-3)
    label = np.asarray(nib.load(path).dataobj)
    top = np.sort(probabilities.astype(np.float32), -1)
    clear = top[..., -1] - top[..., -2] > 2e-3
    np.testing.assert_array_equal(label[clear], probabilities.argmax(-1)[clear])
    for i, name in enumerate(("low", "high"), 1):
        image = nib.load(out / "probabilities" / f"a_{name}.nii.gz")
        np.testing.assert_array_equal(image.affine, nib.load(path).affine)
        np.testing.assert_allclose(image.get_fdata(), probabilities[..., i], atol=1e-6)
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "dataset.json", "predict.json", "probabilities"]


def test_probabilities_of_pictures_are_grey_pictures(tmp_path):
    (tmp_path / "in").mkdir()
    picture = random_volume(20, 30).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "in" / "a.jpg", quality=100)
    run = make_run(tmp_path / "run", (8, 8), network=smooth)
    predict(run, tmp_path / "in", tmp_path / "out", save_probabilities=True, progress=False)
    with np.load(tmp_path / "out" / "probabilities" / "a.npz") as file:
        high = file["probabilities"][..., 2].astype(np.float32)
    grey = np.array(Image.open(tmp_path / "out" / "probabilities" / "a_high.png"))
    np.testing.assert_allclose(grey / 255, high, atol=0.003)


def test_probabilities_asked_for_later_repeat_the_case(tmp_path):
    source, out = folder_of_cases(tmp_path / "in", 1), tmp_path / "out"
    network = Counter()
    run = make_run(tmp_path / "run", network=network)
    predict(run, source, out, progress=False)
    calls = network.calls
    predict(run, source, out, save_probabilities=True, progress=False)
    assert network.calls == 2 * calls
    predict(run, source, out, save_probabilities=True, progress=False)
    predict(run, source, out, progress=False)
    assert network.calls == 2 * calls


# ------------------------------------------------------------------------------------ ensembles, views, post-processing


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_the_maps_of_an_ensemble_are_the_formulas_of_its_members(tmp_path, spacing):
    array = random_volume(6, 8, 10)
    array[:2] = 0
    write_nifti(tmp_path / "in" / "a.nii.gz", array, oriented("LPS", (1, 1, 1), array.shape))
    runs = [
        make_run(tmp_path / "one", (4, 4, 4), smooth, spacing=spacing, crop_nonzero=True),
        make_run(tmp_path / "two", (4, 6), lambda x: smooth(31 - np.asarray(x)), spacing=None),
    ]
    alone = []
    for i, run in enumerate(runs):
        predict(run, tmp_path / "in", tmp_path / f"out{i}", save_probabilities=True, progress=False)
        with np.load(tmp_path / f"out{i}" / "probabilities" / "a.npz") as file:
            alone.append(file["probabilities"].astype(np.float32))
    (path,) = predict(
        runs, tmp_path / "in", tmp_path / "both", save_probabilities=True, save_uncertainty=True, progress=False
    )
    with np.load(tmp_path / "both" / "probabilities" / "a.npz") as file:
        together = file["probabilities"].astype(np.float32)
    np.testing.assert_allclose(together, (alone[0] + alone[1]) / 2, atol=2e-3)
    expected = uncertainty.maps(alone, (alone[0] + alone[1]) / 2, True)
    for name, values in expected.items():
        image = nib.load(tmp_path / "both" / "uncertainty" / f"a_{name}.nii.gz")
        np.testing.assert_array_equal(image.affine, nib.load(path).affine)
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.get_fdata(), values, atol=6e-3)
    assert values.max() > 0.1


@pytest.mark.parametrize("tta", [("scale",), ("flips", "scale"), ("flips", "rot90", "scale")])
@pytest.mark.parametrize("patch", [(4, 4, 4), (6, 6)])
def test_views_and_scales_of_a_smooth_image_agree_with_the_plain_prediction(tmp_path, tta, patch):
    grid = np.mgrid[:12, :14, :16].sum(0) * 31 / 39
    write_nifti(tmp_path / "in" / "a.nii.gz", grid.astype(np.float32))
    seen = []

    def network(image):
        seen.append(image.shape)
        return smooth(image)

    run = make_run(tmp_path / "run", patch, network)
    options: dict[str, Any] = {"progress": False, "save_probabilities": True}
    predict(run, tmp_path / "in", tmp_path / "plain", **options)
    plain = len(seen)
    predict(run, tmp_path / "in", tmp_path / "out", tta=tta, save_uncertainty=True, **options)
    assert len(seen) > 3 * plain
    with np.load(tmp_path / "plain/probabilities/a.npz") as a, np.load(tmp_path / "out/probabilities/a.npz") as b:
        np.testing.assert_allclose(b["probabilities"], a["probabilities"], atol=0.03)
    variance = nib.load(tmp_path / "out" / "uncertainty" / "a_variance.nii.gz").get_fdata()
    assert 0 < variance.max() < 0.002


def test_uncertainty_of_a_picture_is_a_grey_picture_and_an_array(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(random_volume(20, 30).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    run = make_run(tmp_path / "run", (8, 8), network=smooth)
    out = tmp_path / "out"
    predict(run, tmp_path / "in", out, save_uncertainty=True, progress=False)
    assert sorted(p.name for p in (out / "uncertainty").iterdir()) == ["a.npz", "a_entropy.png"]
    with np.load(out / "uncertainty" / "a.npz") as file:
        grey = np.array(Image.open(out / "uncertainty" / "a_entropy.png"))
        np.testing.assert_allclose(grey / 255, file["entropy"], atol=0.003)
    calls = (out / "a.png").stat().st_mtime_ns
    predict(run, tmp_path / "in", out, save_uncertainty=True, progress=False)
    assert (out / "a.png").stat().st_mtime_ns == calls, "a finished case is not repeated"
    predict(run, tmp_path / "in", out, save_uncertainty=True, save_probabilities=True, progress=False)
    assert (out / "a.png").stat().st_mtime_ns != calls, "what is asked for later is made"


def test_runs_that_differ_in_classes_or_channels_are_refused(tmp_path):
    from medseg_jax.types import UserError

    source = folder_of_cases(tmp_path / "in", 1)
    one = make_run(tmp_path / "one")
    with pytest.raises(UserError, match="classes") as error:
        predict([one, make_run(tmp_path / "two", classes=("low", "top"))], source, tmp_path / "out")
    assert "top = 2" in str(error.value)
    with pytest.raises(UserError, match="channels"):
        predict([one, make_run(tmp_path / "two", channels=("CT",))], source, tmp_path / "out")
    with pytest.raises(UserError, match="at least one run"):
        predict([], source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quarter_turns_are_refused_where_the_pixels_of_a_volume_are_not_square(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", random_volume(4, 5, 6), np.diag([1.0, 2, 1, 1]))
    run = make_run(tmp_path / "run", (4, 4, 4))
    with pytest.raises(CasesFailed, match="square pixels"):
        predict(run, tmp_path / "in", tmp_path / "out", tta=["rot90"], progress=False)


def test_the_choice_of_the_run_is_applied_unless_it_is_refused(tmp_path):
    array = np.zeros((6, 9, 9), np.int16)
    array[1:3, 1:4, 1:4], array[4, 7, 7] = 15, 15
    write_nifti(tmp_path / "in" / "a.nii.gz", array)
    run = make_run(tmp_path / "run")
    choice = {"smallest": 0.0, "largest": True, "fill": False}
    about = {"best": {"classes": {"low": {"choice": choice}, "high": {"choice": choice | {"largest": False}}}}}
    (tmp_path / "run" / "postprocessing.json").write_text(json.dumps(about))
    out = tmp_path / "out"
    (path,) = predict(run, tmp_path / "in", out, progress=False)
    cleaned = np.asarray(nib.load(path).dataobj)
    assert cleaned.sum() == 18
    assert json.loads((out / "predict.json").read_text())["made_by"]["postprocessing"] == {"low": choice}
    predict(run, tmp_path / "in", out, postprocessing="none", overwrite=True, progress=False)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected_label(array))
    from medseg_jax.types import UserError

    (tmp_path / "run" / "postprocessing.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        predict(run, tmp_path / "in", out, progress=False)


# -------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
sys.path.insert(0, sys.argv[1])
from fakes import make_run
from medseg_jax.inference.predict import predict
def many(x):
    return jnp.concatenate([x <= 10, (x > 10) & (x <= 20), x > 20] + [x < 0] * 27, -1) * jnp.float32(1)
for folder in map(Path, sys.argv[2:]):
    run = make_run(folder / "run", {patch}, jax.jit(many), classes=tuple(map(str, range(1, 30))), spacing={spacing})
    predict(run, folder / "in", folder / "out", progress=False, overlap=0.25)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(patch: tuple[int, ...], spacing: tuple[float, ...] | None, *folders: Path) -> list[int]:
    """Most bytes that a fresh process has needed after predicting each folder's images in turn, with 30 classes."""
    code = MEASURE.format(patch=patch, spacing=spacing)
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [1024 * int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("spacing", [None, (1.25, 1.25, 1.25)])
def test_probabilities_of_many_classes_never_exist_as_a_whole(tmp_path, spacing):
    small, large = random_volume(40, 40, 40), random_volume(64, 64, 400)
    write_nifti(tmp_path / "small" / "in" / "a.nii", small)
    write_nifti(tmp_path / "large" / "in" / "a.nii", large)
    floor, peak = peak_memory((16, 32, 32), spacing, tmp_path / "small", tmp_path / "large")
    assert peak - floor < 0.5 * large.size * 30 * 4, f"{(peak - floor) / 2**20:.0f} MiB"
    if spacing is None:
        label = np.asarray(nib.load(tmp_path / "large" / "out" / "a.nii").dataobj)
        np.testing.assert_array_equal(label, expected_label(large))


BOUND = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
sys.path.insert(0, sys.argv[1])
from medseg_jax.data import io
from medseg_jax.inference.memory import case_bound
from fakes import make_run
from medseg_jax.inference.predict import Settings, predict
def few(x):
    return jnp.concatenate([x <= 10, (x > 10) & (x <= 20), x > 20], -1) * jnp.float32(1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
for name in ("small", "large"):
    folder = Path(sys.argv[2]) / name
    zscore = ({{"scheme": "zscore", "nonzero": False}},)
    run = make_run(folder / "run", {patch}, jax.jit(few), spacing={spacing}, normalization=zscore)
    before = peak()
    predict(run, folder / "in", folder / "out", progress=False, overlap=0.25)
image, geometry = io.read_image(folder / "in" / "a.nii")
print(peak() - before, case_bound(image, geometry, [run], Settings(overlap=0.25)))
"""


def peak_and_bound(folder: Path, shape: tuple[int, ...], patch: tuple[int, ...], spacing) -> tuple[int, int]:
    """Bytes that a float32 volume took beyond a small one before it in the same process, and the promise."""
    for name, size in (("small", patch), ("large", shape)):
        slices = random_volume(*size[:2], 8).astype(np.float32)
        write_nifti(folder / name / "in" / "a.nii", np.tile(slices, (1, 1, -(-size[2] // 8)))[..., : size[2]])
    code = BOUND.format(patch=patch, spacing=spacing)
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, bound = map(int, done.stdout.split())
    return peak, bound


@pytest.mark.parametrize("spacing", [None, (1.25, 1.25, 1.25)])
def test_the_printed_bound_holds(tmp_path, spacing):
    peak, bound = peak_and_bound(tmp_path, (128, 128, 240), (16, 64, 64), spacing)
    assert peak <= bound, f"{peak / 2**20:.0f} of {bound / 2**20:.0f} MiB"
    assert bound < 2.5 * peak, f"{peak / 2**20:.0f} of {bound / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, (1.1, 1.1, 1.1)])
def test_the_printed_bound_is_tight_for_512_x_512_x_600_voxels(tmp_path, spacing):
    peak, bound = peak_and_bound(tmp_path, (512, 512, 600), (32, 128, 128), spacing)
    assert peak <= bound, f"{peak / 2**20:.0f} of {bound / 2**20:.0f} MiB"
    assert bound < 1.5 * peak, f"{peak / 2**20:.0f} of {bound / 2**20:.0f} MiB"


@pytest.mark.slow
def test_a_whole_body_scan_of_512_x_512_x_1000_voxels_stays_below_5_gib(tmp_path):
    slices = random_volume(512, 512, 8)
    write_nifti(tmp_path / "in" / "a.nii", np.tile(slices, (1, 1, 125)))
    (peak,) = peak_memory((32, 128, 128), None, tmp_path)
    assert peak < 5 * 2**30, f"{peak / 2**30:.2f} GiB"  # the probabilities alone would take 29 GiB
    label = np.asarray(nib.load(tmp_path / "out" / "a.nii").dataobj)
    np.testing.assert_array_equal(label[..., -8:], expected_label(slices))


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`medseg predict RUN` opens a run with a thresholding network."""
    from medseg_jax.runtime import run as module

    asked = []

    def open_run(path, checkpoint):
        asked.append((path, checkpoint))
        return make_run(tmp_path / "run")

    monkeypatch.setattr(module, "open_run", open_run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def test_a_notebook_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does, whose stderr is no terminal
    with Display(2, shown=True) as display:
        display.say("case_1")
        display.next_case()
    assert capsys.readouterr().err == "[1/2] case_1\n"


def test_command_line(tmp_path, opened, capsys):
    from medseg_jax.cli.predict import main

    source, out = folder_of_cases(tmp_path / "in"), tmp_path / "out dir ü"
    assert main([str(tmp_path / "run"), "-i", str(source), "-o", str(out), "--checkpoint", "last", "--json"]) == 0
    assert opened == [(tmp_path / "run", "last")]
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"written": [str(out / f"c{i}.nii.gz") for i in range(3)], "failed": {}}
    shutil.rmtree(out)
    (source / "c1.nii.gz").write_bytes(b"")
    assert main([str(tmp_path / "run"), "-i", str(source), "-o", str(out), "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["failed"]) == ["c1"]
    with pytest.raises(CasesFailed):
        main([str(tmp_path / "run"), "-i", str(source), "-o", str(out)])


def test_command_line_options_reach_predict(tmp_path, monkeypatch):
    from medseg_jax.cli.predict import main
    from medseg_jax.inference import predict as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "predict", lambda *args, **options: seen.update(options, args=args) or [])
    flags = ["--tta", "--overlap", "0.25", "--batch-size", "3", "--split", "test", "--probabilities", "--overwrite"]
    assert main(["RUN", "--input", "IN", "--output", "OUT", *flags]) == 0
    assert seen.pop("args") == ((Path("RUN"),), Path("IN"), Path("OUT"))
    assert seen == {
        "checkpoint": "best",
        "tta": ("flips",),
        "overlap": 0.25,
        "batch_size": 3,
        "split": "test",
        "save_probabilities": True,
        "save_uncertainty": False,
        "save_dicom_seg": False,
        "postprocessing": "chosen",
        "overwrite": True,
    }


@pytest.mark.parametrize(
    "argv", [["RUN"], ["RUN", "-i", "a", "-o", "b", "--tat"], ["RUN", "-i", "a", "-o", "b", "--split", "x"]]
)
def test_wrong_usage_ends_with_2(argv, capsys):
    from medseg_jax.cli.predict import main

    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    if "--tat" in argv:
        assert "--tta" in capsys.readouterr().err
