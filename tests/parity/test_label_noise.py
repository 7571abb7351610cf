"""Label noise against the published generators (golden/kms_noise/label_noise_*.npz)."""

import numpy as np
from scipy import ndimage

import golden_files
from medseg_jax.data import label_noise


def unpack(bits, shape):
    return np.unpackbits(bits)[: int(np.prod(shape))].reshape(shape).astype(bool)


def test_jsrt_style(golden):
    arrays, meta = golden_files.read(golden / "kms_noise" / "label_noise_jsrt.npz")
    masks = {name: unpack(arrays[f"mask/{name}"], facts["shape"]) for name, facts in meta["masks"].items()}
    checked = 0
    for key, expected in arrays.items():
        kind, *rest = key.split("/")
        if kind == "selected":
            count, alpha = rest[0].split("_")
            ids = [f"{i:04d}" for i in range(int(count))]
            assert sorted(map(int, label_noise.select(ids, float(alpha)))) == expected.tolist()
        elif kind == "rotate":
            np.testing.assert_allclose(label_noise.rotate(masks[rest[0]], float(rest[1])), expected, atol=1e-5)
        elif kind in ("dilate", "erode", "affine"):
            mask, beta = masks[rest[0]], float(rest[1])
            if kind == "affine":
                direction = (int(rest[3].split(",")[0]), int(rest[3].split(",")[1]))
                made = label_noise.affine(mask, beta, float(rest[2]), direction, compat=True)
            else:
                made = getattr(label_noise, kind)(mask, beta)
            allowed = 0.005 * mask.sum() if kind == "affine" else 0
            assert (made != unpack(expected, mask.shape)).sum() <= allowed, key
        else:
            continue
        checked += 1
    assert checked > 100


def test_whu_style(golden):
    arrays, meta = golden_files.read(golden / "kms_noise" / "label_noise_whu.npz")
    masks = {name: unpack(arrays[f"mask/{name}"], facts["shape"]) for name, facts in meta["masks"].items()}
    for key, expected in arrays.items():
        kind, *rest = key.split("/")
        if kind in ("erode", "dilate"):
            kernel, times = rest[1].removeprefix("k").split("_it")
            made = label_noise.morphology(masks[rest[0]], kind, int(kernel), int(times))
            np.testing.assert_array_equal(made, unpack(expected, made.shape), err_msg=key)
        if kind == "labels":
            np.testing.assert_array_equal(ndimage.label(masks[rest[0]], label_noise.EIGHT)[0], expected)
        if kind == "crop_resize":
            made = label_noise.crop_resize(arrays[f"labels/{rest[0]}"] == int(rest[1]))
            assert (made != expected).sum() <= 0.01 * made.size


def test_whu_statistics(golden):
    arrays, meta = golden_files.read(golden / "kms_noise" / "label_noise_whu.npz")
    count, *shape = meta["pool_shape"]
    pool = [unpack(bits, shape) for bits in arrays["pool"]]
    assert len(pool) == count
    rng = np.random.default_rng(0)
    for level, facts in meta["stats"].items():
        rows = []
        for _ in range(3):
            for i, mask in enumerate(pool):
                donors = [other for j, other in enumerate(pool) if j != i]
                wrong, dropped, added = label_noise._whu_plane(mask, donors, facts["R"], facts["A"], facts["P"], rng)
                objects, size = ndimage.label(mask, label_noise.EIGHT)[1], mask.sum()
                rows.append((dropped / objects, (wrong & ~mask).sum() / size, (mask & ~wrong).sum() / size, added))
        ours, theirs = np.array(rows), arrays[f"stats/{level}"]
        error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
        assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * error + 1e-9).all(), level
