"""Cases of CLAHE and L*a*b* that can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg_jax.ops.clahe import clahe, lab_to_rgb, rgb_to_lab
from medseg_jax.types import UserError


def test_without_a_limit_one_tile_is_plain_equalisation():
    image = np.repeat(np.arange(4, dtype=np.uint8) * 10, 4).reshape(4, 4)
    expected = np.rint(np.repeat([4, 8, 12, 16], 4).reshape(4, 4) * 255 / 16)
    np.testing.assert_array_equal(clahe(image, clip=0, grid=(1, 1)), expected)


def test_a_constant_image_stays_constant_where_sides_do_not_divide():
    assert len(np.unique(clahe(np.full((37, 64), 90, np.uint8), grid=(8, 5)))) == 1


@given(arrays(np.uint8, (16, 24)), st.floats(0.5, 40))
def test_a_single_tile_keeps_the_order_of_grey_levels(image, clip):
    out = clahe(image, clip, (1, 1))
    order = np.argsort(image.ravel(), kind="stable")
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()


def test_wrong_images_are_refused():
    for image, grid in ((np.zeros((8, 8)), (2, 2)), (np.zeros((8, 8, 3), np.uint8), (2, 2))):
        with pytest.raises(UserError, match="one 8-bit channel"):
            clahe(image, grid=grid)
    with pytest.raises(UserError, match="too small"):
        clahe(np.zeros((8, 8), np.uint8))


def test_known_colours():
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0]], np.uint8)
    np.testing.assert_allclose(rgb_to_lab(colours), [[0, 0, 0], [100, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)


@given(arrays(np.uint8, (5, 3)))
def test_lab_and_back_is_exact(rgb):
    np.testing.assert_array_equal(lab_to_rgb(rgb_to_lab(rgb)), rgb)
