"""BCP and WT-BCP against the public PyTorch code (golden/wt_bcp): masks, mixes, LF/HF, losses, EMA, clean-up."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from fakes import make_plan
from medseg_jax import WTBCP, Labels, WTCopyPaste, XNet
from medseg_jax.methods import teacher
from medseg_jax.methods.bcp import box_size, in_box, mix, mixed_loss, paste_mask, region_loss
from medseg_jax.methods.objective import Task
from medseg_jax.methods.wt_bcp import FUSION, consistency, low_high, low_high_as_released

HEADS = ("main", "low", "high")


@pytest.fixture(scope="module")
def recipe(golden):
    return golden_files.load(golden)


@pytest.fixture(scope="module")
def reference(golden, recipe):
    """(name of a file) -> its arrays, its meta, and its inputs with channels last."""

    def read(name):
        arrays, meta = golden_files.read(golden / "wt_bcp" / f"{name}.npz")
        return arrays, meta, {k: given(recipe, i, meta["salt"]) for k, i in meta["recipe_inputs"].items()}

    return read


def given(recipe, entry, salt):
    x = golden_files.draw(recipe, entry, salt)
    then = entry.get("then", "")
    if found := re.fullmatch(r"integer label = minimum\(floor\((\d+) \* value\), (\d+)\)", then):
        return np.minimum(np.floor(int(found[1]) * x), int(found[2])).astype(np.int32)
    if then == "logits = 2 * value":
        x = 2 * x
    elif then:
        assert then.startswith("float64: value * product over spatial axes")
        x = x.astype(np.float64)
        for axis, n in enumerate(x.shape[2:]):
            ramp = 0.5 + 0.5 * np.abs(np.cos(np.arange(n) * (2 + axis) / n))
            x = x * ramp.reshape([-1 if a == axis + 2 else 1 for a in range(x.ndim)])
    return np.moveaxis(x, 1, -1).astype(np.float32)


def close(found, arrays, meta, key):
    """`found` has channels last; scalars and label maps have none."""
    expected, entry = arrays[key], meta["outputs"][key]
    found = np.moveaxis(np.asarray(found), -1, 1) if len(entry["shape"]) > 3 else np.asarray(found)
    if "stored" in entry:
        found = found[golden_files.kept(entry["stored"])]
    atol = 0 if entry["tolerance"].get("exact") else entry["tolerance"]["atol"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=key)


# ---------------------------------------------------------------- masks and mixes


def test_boxes_have_the_published_sides_and_range(reference):
    arrays, _, _ = reference("copy_paste")
    boxes = {name: rows for name, rows in arrays.items() if name.startswith("box_")}
    assert boxes
    for name, rows in boxes.items():
        dim = (rows.shape[1] - 2) // 2
        numbers = tuple(map(int, re.findall(r"\d+", name)))
        shape = numbers if len(numbers) == dim else numbers * dim
        size = box_size(shape, 2 / 3)
        for row in rows:
            first = row[1 : 1 + dim]
            assert size == tuple(row[1 + dim : 1 + 2 * dim])
            assert int((in_box(shape, jnp.asarray(first), size)).sum()) == row[-1] == math.prod(size)
            legacy = np.random.RandomState(int(row[0]))  # the released scripts' generator and range
            np.testing.assert_array_equal(first, [legacy.randint(0, n - s) for n, s in zip(shape, size, strict=True)])


def test_random_boxes_stay_in_the_released_range():
    shape, ratio = (18, 9), 2 / 3
    found = set()
    for seed in range(200):
        empty = np.argwhere(~np.asarray(paste_mask(jax.random.key(seed), shape, ratio)))
        low, high = empty.min(0), empty.max(0)
        assert tuple(high - low + 1) == box_size(shape, ratio)
        found.add(tuple(int(v) for v in low))
    assert found == {(i, j) for i in range(6) for j in range(3)}


def masks(arrays, dim):
    box, shape = arrays[f"mask{dim}d_box"], arrays[f"mixed_image{dim}d"].shape[2:]
    return ~in_box(shape, jnp.asarray(box[:dim]), tuple(int(n) for n in box[dim:]))


def test_mixed_images_and_labels(reference):
    arrays, meta, x = reference("copy_paste")
    mask = masks(arrays, 2)
    close(mix(x["img_a"], x["img_b"], mask), arrays, meta, "mixed_image2d")
    close(jnp.where(mask, x["lab_a"], x["lab_b"]), arrays, meta, "mixed_label2d")
    close(mix(x["vol_a"], x["vol_b"], masks(arrays, 3)), arrays, meta, "mixed_image3d")


# ---------------------------------------------------------------- losses


def truth(label, classes):
    return jax.nn.one_hot(label, classes), None


def released(cls, dim, **options):
    """The objective as released, bound to a task of so many axes."""
    plan = make_plan((16,) * dim, classes=("a",))
    return cls(net=XNet(width=2), as_released=True, **options).bind(Task(plan, Labels.simple("a"), 1))


MIXES = {  # axes, weights outside and inside
    "mix2d_default": (2, (1, 0.5)),
    "mix2d_unlab": (2, (0.5, 1)),
    "mix2d_pretrain": (2, (1, 1)),
    "mix3d_default": (3, (1, 0.5)),
    "mix3d_unlab": (3, (0.5, 1)),
    "mix3d_unlab_u15": (3, (1.5, 1)),
}


@pytest.mark.parametrize("name", MIXES)
def test_mix_losses_and_their_gradients(reference, name):
    arrays, meta, x = reference("copy_paste")
    dim, weights = MIXES[name]
    logits, mask = x[f"logits{dim}d_l_main"], masks(arrays, dim)
    labels = ("lab_a", "lab_b") if dim == 2 else ("vlab_a", "vlab_b")
    outside, inside = (truth(x[label], logits.shape[-1]) for label in labels)

    def loss(z):
        return mixed_loss(((z,),), outside, inside, mask, weights).sum()

    value, gradient = jax.value_and_grad(loss)(logits)
    keys = [name] if dim == 3 else [f"{name}_dice", f"{name}_ce"]
    atol = max(meta["outputs"][key]["tolerance"]["atol"] for key in keys)
    np.testing.assert_allclose(value, np.mean([arrays[key] for key in keys]), rtol=0, atol=atol)
    close(gradient, arrays, meta, f"d_{name}")


@pytest.mark.parametrize("dim", [2, 3])
def test_totals_of_self_training_as_released(reference, dim):
    arrays, meta, x = reference("copy_paste")
    objective, mask = released(WTBCP, dim), masks(arrays, dim)
    logits = {d: tuple(x[f"logits{dim}d_{d}_{h}"] for h in HEADS) for d in "ul"}
    labels = ("lab_a", "lab_b") if dim == 2 else ("vlab_a", "vlab_b")
    outside, inside = (truth(x[label], logits["u"][0].shape[-1]) for label in labels)
    w = objective.unlabelled_weight

    def total(logits):
        u = mixed_loss(tuple((z,) for z in logits["u"]), outside, inside, mask, (w, 1))
        return objective.over_heads(u + mixed_loss(tuple((z,) for z in logits["l"]), outside, inside, mask, (1, w)))

    value, gradients = jax.value_and_grad(total)(logits)
    close(value, arrays, meta, f"self{dim}d_total")
    for direction in "ul":
        for head, gradient in zip(HEADS, gradients[direction], strict=True):
            close(gradient, arrays, meta, f"d_self{dim}d_{direction}_{head}")


def test_totals_of_pre_training(reference):
    arrays, meta, x = reference("copy_paste")
    heads, mask = tuple((x[f"logits2d_l_{h}"],) for h in HEADS), masks(arrays, 2)
    outside, inside = (truth(x[label], heads[0][0].shape[-1]) for label in ("lab_a", "lab_b"))
    each = mixed_loss(heads, outside, inside, mask, (1, 1))
    close(released(WTCopyPaste, 2).over_heads(each), arrays, meta, "pretrain2d_total")

    heads = tuple((x[f"logits3d_l_{h}"],) for h in HEADS)
    mixed = jnp.where(masks(arrays, 3), x["vlab_a"], x["vlab_b"])
    each = region_loss(heads, truth(mixed, heads[0][0].shape[-1]), None, True)
    close(each.mean(), arrays, meta, "pretrain3d_total_fixed")
    close(released(WTCopyPaste, 3).over_heads(each), arrays, meta, "pretrain3d_total_as_released")


@pytest.mark.parametrize("case", ["2d_all", "2d_top_absent", "2d_background_only", "3d"])
def test_consistency_with_the_released_number_of_classes(reference, case):
    arrays, meta, x = reference("copy_paste")
    dim = int(case[0])
    shift = np.asarray(meta["consistency_shift"][case[3:]] if dim == 2 else 0, np.float32)
    logits = tuple(x[f"logits{dim}d_u_{h}"] + shift for h in HEADS)
    loss = partial(consistency, up_to_largest=True)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*logits)
    close(value, arrays, meta, f"consistency{case}")
    for head, gradient in zip(HEADS, gradients, strict=True):
        close(gradient, arrays, meta, f"d_consistency{case}_{head}")


# ---------------------------------------------------------------- LF and HF


def test_low_and_high_frequencies(reference):
    arrays, meta, x = reference("wavelet_inputs")
    found = {
        "train": low_high_as_released(x["image2d"], *FUSION[2]),
        "valid": low_high_as_released(x["image2d"], 0, 0),
        "small": low_high(x["image3d_small"], *FUSION[3]),
        "la": low_high(x["image3d_la"], *FUSION[3]),
    }
    for name, pair in found.items():
        for which, image in zip(("low", "high"), pair, strict=True):
            close(image, arrays, meta, f"{name}_{which}")


# ---------------------------------------------------------------- teacher


@pytest.mark.parametrize("which", ["all_state", "parameters_only"])
def test_teacher_after_three_updates(reference, recipe, which):
    arrays, meta, _ = reference("copy_paste")
    names = meta["weights"]["ema"]["names_and_shapes"]
    tensors = recipe.weights({k: tuple(v) for k, v in names.items()}, meta["salt"])
    averaged = [k.split(".", 1)[1] for k in names if k.startswith("teacher.") and "num_batches" not in k]
    if which == "parameters_only":
        averaged = [k for k in averaged if "running" not in k]
    old, student = ({k: jnp.asarray(tensors[f"{who}.{k}"]) for k in averaged} for who in ("teacher", "student"))
    (decay,) = map(float, re.findall(r"decay ([\d.]+)", meta["ema"]))
    for _ in range(3):
        old = teacher.average(old, student, decay)
    for name, value in old.items():
        expected, entry = arrays[f"ema_{which}/{name}"], meta["outputs"][f"ema_{which}/{name}"]
        np.testing.assert_allclose(value, expected, rtol=0, atol=entry["tolerance"]["atol"], err_msg=name)


def test_pseudo_labels_keep_the_largest_component(reference):
    arrays, _, _ = reference("largest_component")
    logits = 5 * jax.nn.one_hot(arrays["labels2d"], arrays["labels2d"].max() + 1)
    found = teacher.pseudo_target(logits, True, 8)
    np.testing.assert_array_equal(found.argmax(-1), arrays["largest2d"])
    for neighbours in (6, 18, 26):
        found = teacher.pseudo_target(5 * jax.nn.one_hot(arrays["foreground3d"], 2), True, neighbours)
        np.testing.assert_array_equal(found.argmax(-1), arrays[f"largest3d_{neighbours}"], err_msg=str(neighbours))
