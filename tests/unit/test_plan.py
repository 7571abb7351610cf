"""The rules of the plan on made-up fingerprints, and plan.json as people edit it."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.data.dataset import Dataset
from medseg_jax.data.fingerprint import Fingerprint, fingerprint, nonzero_box
from medseg_jax.data.io import write_image, write_label
from medseg_jax.data.plan import Plan
from medseg_jax.data.planning import BUDGETS, make_plan, picture_resolution, plan_from, target_spacing, topology
from medseg_jax.types import Geometry, UserError


def facts(
    shapes, spacings=(1, 1, 1), *, pictures=False, kept=1.0, eight_bit=False, thickness=None, channels=1, low=-50.0
):
    shapes = np.array(shapes)
    n = len(shapes)
    statistics = ({"mean": 100.0, "std": 20.0, "low": low, "high": 180.0},) * channels
    return Fingerprint(
        pictures=pictures,
        shapes=shapes,
        spacings=np.broadcast_to(np.array(spacings, np.float64), (n, 3)),
        kept=np.full(n, kept),
        foreground=statistics,
        overall=statistics,
        frequency={"a": 0.1},
        thickness=np.full((n, 1), np.nan) if thickness is None else np.array(thickness, np.float64).reshape(n, 1),
        eight_bit=eight_bit,
    )


def pictures(sizes, thickness=200.0, channels=3, **options):
    shapes = [(1, h, w) for h, w in sizes]
    thickness = np.broadcast_to(thickness, len(shapes))
    return facts(shapes, pictures=True, eight_bit=True, channels=channels, thickness=thickness, **options)


HIPPOCAMPUS = [(35, 51, 35)] * 96
RGB = ("R", "G", "B")


# ---------------------------------------------------------------------------------------------------------- the network


def test_hippocampus_gets_the_known_network():
    plan = plan_from(facts(HIPPOCAMPUS), ("MRI",), ("anterior", "posterior"))
    assert plan.patch_size == (40, 56, 40)
    assert plan.features == (8, 16, 32, 64)
    assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan.kernel_sizes == ((3, 3, 3),) * 4
    assert plan.batch_size == 4
    assert plan.spacing == (1, 1, 1)
    assert 500 <= plan.steps <= BUDGETS["cpu"].steps


def test_the_parameters_in_the_reason_are_those_of_the_network():
    """3x3x3 convolutions, 3 numbers a channel for bias and norm, up-sampling with kernel 2, one head."""
    plan = plan_from(facts(HIPPOCAMPUS), ("MRI",), ("anterior", "posterior"))
    f, taps = plan.features, 27
    total = 0
    for i, width in enumerate(f):
        total += ((f[i - 1] if i else 1) + width) * taps * width + 6 * width
        if i + 1 < len(f):
            total += f[i + 1] * 8 * width + 3 * width * taps * width + 9 * width
    total += 9 * 3
    assert f"{total / 1e6:.2f} M" in plan.reasons["features"]
    assert 0.3e6 < total < 0.4e6


def test_thick_slices_are_neither_pooled_nor_convolved_until_the_plane_catches_up():
    patch, strides, kernels = topology((16, 160, 160), (8.0, 1.0, 1.0))
    assert strides[1:4] == ((1, 2, 2),) * 3
    assert kernels[:3] == ((1, 3, 3),) * 3
    assert strides[4][0] == 2
    assert kernels[-1] == (3, 3, 3)
    assert patch == (16, 160, 160)


@given(
    st.integers(2, 3).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(1, 300), min_size=n, max_size=n), st.lists(st.floats(0.2, 10), min_size=n, max_size=n)
        )
    )
)
def test_topology_divides_the_patch_and_keeps_the_bottleneck(case):
    size, spacing = case
    patch, strides, kernels = topology(size, spacing)
    assert len(strides) == len(kernels) >= 2
    for axis, wanted in enumerate(size):
        divisor = math.prod(stage[axis] for stage in strides)
        assert patch[axis] % divisor == 0
        assert wanted <= patch[axis] < wanted + divisor
        assert patch[axis] / divisor >= 4 or divisor <= 2
    assert all(k in (1, 3) for stage in kernels for k in stage)
    for finer, coarser in itertools.pairwise(kernels):
        assert all(a <= b for a, b in zip(finer, coarser, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 700), st.integers(1, 700)),
    st.tuples(st.floats(0.3, 9), st.floats(0.3, 3), st.floats(0.3, 3)),
    st.sampled_from(sorted(BUDGETS)),
    st.sampled_from([2, 3]),
)
def test_every_volume_gets_a_plan_within_its_budget(shape, spacing, budget, dim):
    plan = plan_from(facts([shape] * 3, spacing), ("MRI",), ("a",), dim=dim, budget=budget)
    limits = BUDGETS[budget]
    assert all(p % d == 0 for p, d in zip(plan.patch_size, plan.divisor, strict=True))
    assert 2 <= plan.batch_size <= limits.batch[dim][1]
    feature_maps = plan.features[0] * math.prod(plan.patch_size) * plan.batch_size
    assert feature_maps <= limits.activations or max(plan.patch_size) <= 16
    assert Plan.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_a_large_volume_is_coarsened_on_a_cpu_only():
    body = facts([(300, 512, 512)] * 4, (1.0, 0.8, 0.8))
    cpu = plan_from(body, ("MRI",), ("a",), budget="cpu")
    gpu = plan_from(body, ("MRI",), ("a",), budget="gpu")
    assert gpu.spacing == (1.0, 0.8, 0.8)
    assert min(cpu.spacing) > 1.5
    assert "Coarsened" in cpu.reasons["spacing"]
    assert math.prod(gpu.patch_size) > 4 * math.prod(cpu.patch_size)
    assert gpu.features[-1] == 320


def test_slices_of_volumes_keep_their_distance():
    plan = plan_from(facts([(12, 256, 216)] * 5, (9.0, 1.4, 1.4)), ("MRI",), ("a",), dim=2)
    assert plan.spacing == (None, 1.4, 1.4)
    assert len(plan.patch_size) == 2
    sagittal = plan_from(facts([(256, 216, 12)] * 5, (1.4, 1.4, 9.0)), ("MRI",), ("a",), dim=2)
    assert "sagittal" in sagittal.reasons["dim"]


# -------------------------------------------------------------------------------------------------------------- spacing


def test_target_spacing_is_the_median_but_finer_along_a_coarse_axis():
    spacings = np.array([[z, 0.7, 0.7] for z in (2.0, 5.0, 5.0, 5.0, 6.0)])
    thick, reason = target_spacing(spacings, np.array([[30, 400, 400]] * 5))
    assert thick == (pytest.approx(3.2), 0.7, 0.7)  # 10th percentile of 2 5 5 5 6
    assert "Anisotropic" in reason
    many_slices, _ = target_spacing(spacings, np.array([[200, 400, 400]] * 5))
    assert many_slices == (5.0, 0.7, 0.7)


def test_coarse_axis_never_becomes_finer_than_the_others():
    spacings = np.array([[0.1, 1.0, 1.0]] * 3 + [[8.0, 1.0, 1.0]] * 7)  # 10th percentile 0.1
    assert target_spacing(spacings, np.array([[20, 300, 300]] * 10))[0] == (1.0, 1.0, 1.0)


def test_pictures_of_one_size_are_shrunk_by_one_factor():
    plan = plan_from(pictures([(256, 256)] * 50), RGB, ("lesion",))
    assert plan.spacing == (1, 2, 2)
    assert plan.working_size is None
    assert plan.patch_size == (128, 128)
    assert plan.batch_size == 8
    assert plan.features[0] == 16
    assert plan.features[-1] == 128


def test_thin_structures_stop_the_shrinking():
    spacing, size, reason = picture_resolution(pictures([(584, 565)] * 20, thickness=3.5), 128**2)
    assert spacing is None
    assert size is None
    assert "3.5 px" in reason
    spacing, _, _ = picture_resolution(pictures([(2848, 4288)] * 20, thickness=12.0), 128**2)
    assert spacing == (1, 3, 3)


def test_pictures_of_many_sizes_become_one_size_where_structures_scale_with_them():
    sizes = [(288, 384), (576, 768), (1152, 1536)] * 4
    scaling = [h / 5 for h, _ in sizes]
    plan = plan_from(pictures(sizes, scaling), RGB, ("polyp",))
    assert plan.spacing is None
    assert plan.working_size == plan.patch_size == (112, 144)
    microscopy = plan_from(pictures(sizes, 9.0), RGB, ("nucleus",))
    assert microscopy.working_size is None
    assert microscopy.spacing == (1, 2.25, 2.25)


# -------------------------------------------------------------------------------------------------------- normalisation


def test_normalisation_follows_the_channel():
    ct, pet = plan_from(facts(HIPPOCAMPUS, channels=2), ("CT", "PET"), ("a",)).normalization
    assert ct == {"scheme": "ct", "low": -50.0, "high": 180.0, "mean": 100.0, "std": 20.0}
    assert pet == {"scheme": "zscore", "nonzero": False}
    assert plan_from(facts(HIPPOCAMPUS, kept=0.4), ("T1",), ("a",)).normalization[0]["nonzero"]
    colour = plan_from(pictures([(64, 64)] * 3), RGB, ("a",)).normalization
    assert [entry["scheme"] for entry in colour] == ["fixed"] * 3
    grey = plan_from(pictures([(64, 64)] * 3, channels=1), ("X-ray",), ("a",)).normalization
    assert grey[0]["scheme"] == "zscore"
    unnamed = plan_from(facts(HIPPOCAMPUS, low=-1000.0), ("scan",), ("a",))
    assert "Hounsfield" in unnamed.reasons["normalization"]


def test_names_of_nnunet_order_a_normalisation():
    names = ("noNorm", "rescale_to_0_1", "rgb_to_0_1", "zscore", "R")
    plan = plan_from(pictures([(64, 64)] * 3, channels=5), names, ("a",))
    assert [entry["scheme"] for entry in plan.normalization] == ["none", "minmax", "fixed", "zscore", "fixed"]
    assert plan.normalization[2] == {"scheme": "fixed", "mean": 0, "std": 255}
    assert "rescale_to_0_1: nnU-Net's name" in plan.reasons["normalization"]
    assert Plan.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


# ------------------------------------------------------------------------------------------------------------ plan.json


def small(**changes) -> Plan:
    return dataclasses.replace(plan_from(facts([(20, 24, 16)] * 4), ("MRI",), ("a", "b")), **changes)


def test_round_trip(tmp_path):
    for plan in (
        small(),
        plan_from(pictures([(288, 384), (576, 768)] * 4, [50, 100] * 4), RGB, ("polyp",)),
        plan_from(facts([(12, 256, 216)] * 5, (9.0, 1.4, 1.4)), ("CT",), ("a",), dim=2),
    ):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        optional = {"reasons", "working_size", "in_channels", "neighbours", "crop_field", "clahe"}
        required = {f.name for f in dataclasses.fields(Plan)} - optional
        assert required <= set(plan.reasons) | {"working_size"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": [20, 24, 17]}, "divisible"),
        ({"patch_size": [24, 24]}, "3 positive"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": "4"}, "positive"),
        ({"batch_size": 2.5}, "positive"),
        ({"steps": True}, "positive"),
        ({"dim": 4}, "2 or 3"),
        ({"spacing": [1, 0, 1]}, "three positive"),
        ({"spacing": [1, 1]}, "three positive"),
        ({"features": [16]}, "as many as features"),
        ({"features": []}, "one a stage"),
        ({"kernel_sizes": [[2, 3, 3]] * 3}, "odd"),
        ({"strides": [[1, 1], [2, 2], [2, 2]]}, "3 positive"),
        ({"classes": []}, "at least one"),
        ({"classes": ["a", "a"]}, "different"),
        ({"classes": "ab"}, "different"),
        ({"working_size": [64, 64]}, "dim 2"),
        ({"normalization": []}, "one entry"),
        ({"normalization": [{"scheme": "zcore", "nonzero": False}]}, "zscore"),
        ({"normalization": [{"scheme": "ct", "low": 0, "high": 1, "mean": 0}]}, "std"),
        ({"normalization": [{"scheme": "fixed", "mean": 0, "std": 0}]}, "std"),
        ({"normalization": [{"scheme": "zscore", "nonzero": 1}]}, "nonzero"),
        ({"in_channels": 2}, "2 channels"),
        ({"crop_nonzero": 1}, "true or false"),
    ],
)
def test_bad_values_are_named_with_their_file(tmp_path, changes, words):
    plan = small()
    assert len(plan.features) == 3
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(dataclasses.asdict(plan) | changes))
    with pytest.raises(UserError) as error:
        Plan.load(path)
    assert error.value.file == path
    assert words in str(error.value)


def test_bad_keys_and_files(tmp_path):
    path = tmp_path / "plan.json"
    content = dataclasses.asdict(small())
    path.write_text(json.dumps(content | {"patchsize": [1]}))
    with pytest.raises(UserError, match="patchsize") as error:
        Plan.load(path)
    assert "patch_size" in (error.value.remedy or "")
    del content["strides"], content["dim"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="dim, strides"):
        Plan.load(path)
    for text in ("{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError):
            Plan.load(path)
    with pytest.raises(UserError, match="Cannot read"):
        Plan.load(tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------------------- fingerprint


def volume_set(root, cases=5, spacing=(1.5, 1.0, 2.0)):
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for i in range(cases):
        image = np.zeros((20, 16, 12, 1), np.float32)
        label = np.zeros((20, 16, 12), np.uint8)
        image[4:16, 2:14] = rng.uniform(50, 60, (12, 12, 12, 1))
        image[8:12, 6:10, 3:9] = 200 + i
        label[8:12, 6:10, 3:9] = 1
        geometry = Geometry((20, 16, 12), np.diag([*spacing, 1.0]))
        write_image(root / "imagesTr" / f"c{i}_0000.nii.gz", image, geometry)
        write_label(root / "labelsTr" / f"c{i}.nii.gz", label, geometry)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return Dataset.open(root)


def test_fingerprint_of_volumes(tmp_path):
    dataset = volume_set(tmp_path / "set")
    seen = fingerprint(dataset)
    assert not seen.pictures
    assert seen.shapes.tolist() == [[12, 12, 12]] * 4  # c0 validates; cropped, canonical
    np.testing.assert_allclose(seen.spacings, [[2.0, 1.0, 1.5]] * 4, rtol=1e-6)
    assert seen.kept == pytest.approx(12 * 12 / (20 * 16))
    assert 201 <= seen.foreground[0]["low"] <= seen.foreground[0]["high"] <= 204
    assert seen.overall[0]["mean"] < 100
    assert seen.frequency == {"a": pytest.approx(4 * 4 * 6 / 12**3)}
    plan = make_plan(dataset)
    assert plan.crop_nonzero
    assert plan.spacing == (2.0, 1.0, 1.5)
    assert plan.normalization[0]["scheme"] == "ct"
    assert plan == make_plan(dataset)


def test_validation_and_test_cases_are_not_looked_at(tmp_path):
    dataset = volume_set(tmp_path / "set")
    for case in dataset.subset("val"):
        case.images[0].write_bytes(b"no image")
    make_plan(dataset)


def test_make_plan_refuses(tmp_path):
    dataset = volume_set(tmp_path / "set")
    with pytest.raises(UserError, match="budget"):
        make_plan(dataset, budget="cup")
    with pytest.raises(UserError, match="2-D or 3-D"):
        make_plan(dataset, dim=4)
    empty = dataclasses.replace(dataset, cases=dataset.subset("val"))
    with pytest.raises(UserError, match="no training cases"):
        make_plan(empty)


def test_thickness_of_a_vessel_and_of_a_blob(tmp_path):
    from medseg_jax.data.fingerprint import _thickness

    vessel = np.zeros((100, 200), bool)
    vessel[50:54, 10:190] = True
    assert _thickness(vessel) == pytest.approx(4 * 4 / math.pi, rel=0.05)
    y, x = np.mgrid[:100, :100]
    assert _thickness((y - 50) ** 2 + (x - 50) ** 2 < 30**2) == pytest.approx(30, rel=0.05)


def test_box_of_nothing_is_everything():
    image = np.zeros((3, 4, 5, 2), np.float32)
    assert nonzero_box(image) == ((0, 3), (0, 4), (0, 5))
    image[1, 2, 3, 1] = -1
    assert nonzero_box(image) == ((1, 2), (2, 3), (3, 4))
