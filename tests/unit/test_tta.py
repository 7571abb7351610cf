"""Test-time augmentation: every view once, exact inverses, equivariance, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.inference import tta
from medseg_jax.inference.sliding_window import predict_volume
from medseg_jax.types import UserError

COUNTS = [
    ((), 2, 1),
    (("flips",), 2, 4),
    (("flips",), 3, 8),
    (("rot90",), 2, 4),
    (("rot90",), 3, 4),
    (("flips", "rot90"), 2, 8),
    (("flips", "rot90"), 3, 16),
    (("scale",), 3, 1),
]


def whole_image(*shape: int) -> np.ndarray:
    """Integers, so that means over 4, 8 or 16 views are exact."""
    return np.random.default_rng(sum(shape)).integers(-99, 99, shape).astype(np.float32)


def blur(image):
    """A network that sees its neighbours lopsidedly: not equivariant to anything."""
    image = jnp.asarray(image)
    axes = range(1, image.ndim - 1)
    return sum(jnp.roll(image, shift, axis) * (0.1 + 0.05 * axis + 0.1 * shift) for axis in axes for shift in (0, 1))


@pytest.mark.parametrize(("augmentations", "dim", "count"), COUNTS)
def test_every_view_is_another_one_and_is_undone_exactly(augmentations, dim, count):
    image = whole_image(2, *(5, 5, 5)[:dim], 1)
    seen = []

    def identity(x):
        seen.append(np.ascontiguousarray(x))
        return x

    views = tta.views(augmentations, dim)
    np.testing.assert_array_equal(tta.average(identity, views)(image), image)
    assert len(views) == count == len({x.tobytes() for x in seen}) == len(seen)
    np.testing.assert_array_equal(seen[0], image)


@pytest.mark.parametrize("dim", [2, 3])
def test_rot90_is_the_four_quarter_turns_of_the_plane(dim):
    image = whole_image(1, *(4, 5, 5)[-dim:], 2)
    turned = {np.rot90(image, k, (-3, -2)).tobytes() for k in range(4)}
    assert {np.ascontiguousarray(view.apply(image)).tobytes() for view in tta.views(("rot90",), dim)} == turned


@pytest.mark.parametrize("augmentations", [("flips",), ("rot90",), ("flips", "rot90")])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_mean_is_equivariant_to_its_symmetries(augmentations, dim):
    image = whole_image(1, *(4, 6, 6)[-dim:], 1)
    views = tta.views(augmentations, dim)
    mean = tta.average(blur, views)
    for view in views[1:]:
        np.testing.assert_allclose(mean(view.apply(image)), view.apply(np.asarray(mean(image))), atol=1e-4)
        assert np.abs(blur(view.apply(image)) - view.apply(np.asarray(blur(image)))).max() > 1, "blur must be lopsided"


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)),
    augmentations=st.sampled_from([("flips",), ("rot90",), ("flips", "rot90")]),
    dim=st.integers(2, 3),
)
def test_an_equivariant_network_predicts_the_same_with_and_without(shape, augmentations, dim):
    def blob(image):
        image = jnp.asarray(image)
        axes = range(1, image.ndim - 1)
        near = sum(jnp.roll(image, s, a) for a in axes for s in (-1, 1))
        return jnp.concatenate([image + near, image * near], -1)

    image, patch = whole_image(*shape, 1), (4, 4, 4)[:dim]
    average = tta.average(blob, tta.views(augmentations, dim))
    np.testing.assert_array_equal(predict_volume(average, image, patch, 2), predict_volume(blob, image, patch, 2))


def test_quarter_turns_need_square_patches_and_pixels():
    tta.check(("rot90",), (4, 8, 8), (3.0, 1.0, 1.01))
    tta.check(("flips",), (4, 8, 6), (3.0, 1.0, 2.0))
    tta.check(("rot90",), (8, 8), (None, None, None))
    with pytest.raises(UserError, match="square in its plane") as error:
        tta.check(("flips", "rot90"), (4, 8, 6), (None, 1.0, 1.0))
    assert error.value.remedy == "--tta flips leaves them out"
    with pytest.raises(UserError, match="square pixels") as error:
        tta.check(("rot90",), (8, 8), (5.0, 1.0, 1.2))
    assert "1 x 1.2" in error.value.found
    with pytest.raises(UserError, match="Unknown test-time augmentation"):
        tta.check(("flip",), (8, 8), (1.0, 1.0, 1.0))
