"""Pictures: palettes, bits, transparency, orientation, stacks, and files that are cut off or bombs."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files import refused
from medseg_jax.data import io
from medseg_jax.types import Geometry


def palette_file(path: Path, index, colours) -> None:
    image = Image.fromarray(np.asarray(index, np.uint8), "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([v for colour in colours for v in colour])
    image.save(path)


INDEX = np.array([[0, 1, 2], [2, 1, 0]])


@pytest.mark.parametrize("ending", [".png", ".gif", ".tif", ".bmp"])
def test_palette_colours(tmp_path, ending):
    """A painted label map: the index is the class; as an image it is what a person sees."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    palette_file(tmp_path / f"a{ending}", INDEX, colours)
    np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], INDEX)
    np.testing.assert_array_equal(io.read_image(tmp_path / f"a{ending}")[0], np.array(colours)[INDEX])


def test_palette_grey_and_inverted(tmp_path):
    palette_file(tmp_path / "grey.png", INDEX, [(0, 0, 0), (128, 128, 128), (255, 255, 255)])
    np.testing.assert_array_equal(io.read_label(tmp_path / "grey.png")[0], INDEX)
    assert io.read_image(tmp_path / "grey.png")[0].ravel().tolist() == [0, 128, 255, 255, 128, 0]
    palette_file(tmp_path / "inverted.gif", INDEX.clip(0, 1), [(255, 255, 255), (0, 0, 0)])
    np.testing.assert_array_equal(io.read_label(tmp_path / "inverted.gif")[0], (INDEX == 0) * 255)
    palette_file(tmp_path / "white.gif", INDEX * 0, [(255, 255, 255), (0, 0, 0)])  # the rule looks at no pixels
    assert set(io.read_label(tmp_path / "white.gif")[0].ravel()) == {255}


def test_one_bit(tmp_path):
    mask = INDEX > 0
    for ending in (".png", ".tif", ".bmp"):
        Image.fromarray(mask).save(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], mask)


def test_transparency(tmp_path):
    rgba = np.zeros((4, 5, 4), np.uint8)
    rgba[..., :3] = np.arange(20).reshape(4, 5, 1) * 10
    rgba[..., 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.png")[0], rgba[..., :3])
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.png")[0], rgba[..., 0])
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert io.read_image(tmp_path / "la.png")[0].shape == (4, 5, 1)
    rgba[..., :3], rgba[:2, :, 3] = 0, 0
    Image.fromarray(rgba).save(tmp_path / "drawn.png")
    refused(tmp_path / "drawn.png", "transparency", read=io.read_label)


def test_colour_masks_are_refused_by_name(tmp_path):
    rgb = np.zeros((4, 5, 3), np.uint8)
    rgb[1] = (255, 0, 0)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "colours such as (255, 0, 0)", "medseg data convert", read=io.read_label)


def test_exif_rotation(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for orientation, expected in ((6, np.rot90(pixels, -1)), (3, pixels[::-1, ::-1]), (1, pixels)):
        exif = Image.Exif()
        exif[274] = orientation
        for ending in (".png", ".tif"):
            Image.fromarray(pixels).save(tmp_path / f"a{ending}", exif=exif)
            np.testing.assert_array_equal(io.read_image(tmp_path / f"a{ending}")[0][..., 0], expected)
            np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], expected)


def png_16_bit_colour(path: Path) -> None:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))  # 2 x 2 pixels of 3 x 2 bytes
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_16_bit_colour(tmp_path):
    png_16_bit_colour(tmp_path / "a.png")
    refused(tmp_path / "a.png", "16-bit colour")
    tifffile = pytest.importorskip("tifffile")
    colour = np.arange(5 * 6 * 3, dtype=np.uint16).reshape(5, 6, 3) * 700
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif")[0], colour)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.int16, np.int8])
def test_unusual_tiffs(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    picture = np.arange(30).reshape(5, 6).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", picture)
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif")[0][..., 0], picture)
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.tif")[0], picture)


def test_tiff_stacks(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    volume = np.arange(7 * 5 * 6, dtype=np.uint8).reshape(7, 5, 6)
    io.write_label(tmp_path / "a.tif", volume, Geometry(volume.shape))
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.tif")[0], volume)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), volume)
    two = np.stack([volume, volume[::-1]], 1)  # z, c, y, x as ImageJ stores it
    tifffile.imwrite(tmp_path / "b.tif", two, imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(io.read_image(tmp_path / "b.tif")[0], np.moveaxis(two, 1, -1))
    pages = [Image.fromarray(volume[0]), Image.fromarray(volume[0, :3])]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "c.tif", "pages", "differ")


def test_tiff_without_tifffile(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6)))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    refused(tmp_path / "a.tif", "medseg-jax[io]")


def test_pnm_values_are_not_stretched(tmp_path):
    """Pillow stretches PGM to the full range: 0, 1, 2 of maxval 2 would become 0, 128, 255."""
    for maxval, kind in ((2, np.uint8), (200, np.uint8), (4095, np.uint16)):
        values = np.array([[0, 1, 2], [2, maxval, maxval - 1]], kind)
        body = values.astype(">u2" if maxval > 255 else "u1").tobytes()
        (tmp_path / "a.pgm").write_bytes(b"P5\n# note\n3 2\n%d\n" % maxval + body)
        image = io.read_image(tmp_path / "a.pgm")[0]
        np.testing.assert_array_equal(image[..., 0], values)
        assert image.dtype == kind
        (tmp_path / "b.pgm").write_text(f"P2 3 2 {maxval} " + " ".join(map(str, values.ravel())))
        np.testing.assert_array_equal(io.read_label(tmp_path / "b.pgm")[0], values)


def test_animation_and_foreign_formats(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), v, np.uint8)) for v in (0, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    refused(tmp_path / "a.gif", "animated", "2 frames")
    frames[0].save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    refused(tmp_path / "b.png", "cannot be read")
    frames[0].save(tmp_path / "c.jpg")
    (tmp_path / "c.jpg").rename(tmp_path / "c.png")  # a wrong name alone is no harm
    assert io.read_image(tmp_path / "c.png")[0].shape == (4, 5, 1)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((60, 60), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert io.read_image(tmp_path / "a.png")[0].shape == (60, 60, 1)  # Pillow's warning zone is no error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(tmp_path / "a.png", "too large", "3600 pixels")


def test_truncated_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    for ending in (".png", ".jpg", ".tif", ".bmp", ".ppm"):
        Image.fromarray(noise).save(tmp_path / f"a{ending}")
        raw = (tmp_path / f"a{ending}").read_bytes()
        (tmp_path / f"a{ending}").write_bytes(raw[: len(raw) // 2])
        refused(tmp_path / f"a{ending}", "try:")
