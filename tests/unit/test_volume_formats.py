"""NRRD and MetaImage: the same volume in every format lies in the same place; headers survive; paths stay inside."""

import gzip
import warnings
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.data import io
from medseg_jax.types import Geometry, UserError

SHAPE = (4, 5, 6)
VOXELS = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
AFFINE = np.array([[0, 0, -3.5, 10], [0.7, 0, 0, -20], [0, 1.2, 0, 5], [0, 0, 0, 1.0]])


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        io.read_image(path)
    text = str(caught.value)
    assert path.name in text
    for word in words:
        assert word in text


def nrrd(path, fields, data, *, skip="\n"):
    """A NRRD file from the lines of its header."""
    path.write_bytes(("NRRD0004\n" + "\n".join(fields) + "\n" + skip).encode() + data)


def lps(affine=AFFINE):
    return np.diag([-1, -1, 1, 1]) @ affine


def vector(values):
    return "(" + ",".join(f"{v:.10g}" for v in values) + ")"


def nrrd_fields(matrix, space="left-posterior-superior", **more):
    lines = {
        "type": "short",
        "dimension": "3",
        "sizes": "4 5 6",
        "space": space,
        "space directions": " ".join(vector(matrix[:3, i]) for i in range(3)),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": vector(matrix[:3, 3]),
    }
    return [f"{k}: {v}" for k, v in (lines | more).items() if v is not None]


RAW = VOXELS.tobytes(order="F")


def mha_header(matrix=None, **more):
    matrix = lps() if matrix is None else matrix
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(f"{v:.10g}" for v in (matrix[:3, :3] / spacing).T.ravel()),
        "Offset": " ".join(f"{v:.10g}" for v in matrix[:3, 3]),
        "ElementSpacing": " ".join(f"{v:.10g}" for v in spacing),
        "DimSize": "4 5 6",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    lines |= more
    lines["ElementDataFile"] = lines.pop("ElementDataFile")  # the data begin after this line
    return "".join(f"{k} = {v}\n" for k, v in lines.items() if v is not None).encode()


# ----------------------------------------------------------------------------------------------------- the same volume


@pytest.fixture
def where(tmp_path):
    """What nibabel's NIfTI of the volume says."""
    nib.save(nib.Nifti1Image(VOXELS, AFFINE), tmp_path / "a.nii.gz")
    image, geometry = io.read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    return geometry.affine


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("scanner-xyz", (-1, -1, 1)),
    ],
)
def test_every_space_of_nrrd_is_where_nifti_is(tmp_path, where, space, signs):
    nrrd(tmp_path / "a.nrrd", nrrd_fields(np.diag([*signs, 1]) @ AFFINE, space), RAW)
    image, geometry = io.read_image(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    np.testing.assert_allclose(geometry.affine, where, atol=1e-5)
    assert geometry.unit == "mm"


def test_metaimage_is_where_nifti_is(tmp_path, where):
    (tmp_path / "a.mha").write_bytes(mha_header() + RAW)
    image, geometry = io.read_image(tmp_path / "a.mha")
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    np.testing.assert_allclose(geometry.affine, where, atol=1e-5)


@pytest.mark.parametrize("kind", ["gzip", "ascii", "big", "byte skip", "line skip", "nhdr", "last bytes"])
def test_encodings_of_nrrd(tmp_path, where, kind):
    path = tmp_path / ("a.nhdr" if kind in ("nhdr", "last bytes") else "a.nrrd")
    fields, data = nrrd_fields(lps()), RAW
    if kind == "gzip":
        fields, data = nrrd_fields(lps(), encoding="gzip"), gzip.compress(RAW)
    if kind == "ascii":
        fields, data = nrrd_fields(lps(), encoding="ascii", endian=None), " ".join(map(str, VOXELS.ravel("F"))).encode()
    if kind == "big":
        fields, data = nrrd_fields(lps(), endian="big"), VOXELS.astype(">i2").tobytes(order="F")
    if kind == "byte skip":
        fields, data = nrrd_fields(lps(), **{"byte skip": "7"}), b"7 bytes" + RAW
    if kind == "line skip":
        fields, data = nrrd_fields(lps(), **{"line skip": "2"}), b"one\ntwo\n" + RAW
    if path.suffix == ".nhdr":
        skip = {"byte skip": "-1"} if kind == "last bytes" else {}
        (tmp_path / "voxels.raw").write_bytes(b"anything" * bool(skip) + RAW)
        fields, data = nrrd_fields(lps(), **skip, **{"data file": "voxels.raw"}), b""
    nrrd(path, fields, data)
    image, geometry = io.read_image(path)
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    np.testing.assert_allclose(geometry.affine, where, atol=1e-5)


@pytest.mark.parametrize("kind", ["compressed", "big", "mhd", "header size"])
def test_encodings_of_metaimage(tmp_path, where, kind):
    path = tmp_path / ("a.mhd" if kind in ("mhd", "header size") else "a.mha")
    header, data = mha_header(), RAW
    if kind == "compressed":
        header, data = mha_header(CompressedData="True"), zlib.compress(RAW)
    if kind == "big":
        header, data = mha_header(BinaryDataByteOrderMSB="True"), VOXELS.astype(">i2").tobytes(order="F")
    if path.suffix == ".mhd":
        (tmp_path / "voxels.raw").write_bytes(b"anything" * (kind == "header size") + RAW)
        more = {"HeaderSize": "-1"} if kind == "header size" else {}
        header, data = mha_header(**more, ElementDataFile=None) + b"ElementDataFile = voxels.raw\n", b""
    path.write_bytes(header + data)
    image, geometry = io.read_image(path)
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    np.testing.assert_allclose(geometry.affine, where, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    ending=st.sampled_from([".nrrd", ".mha"]),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["uint8", "int16", "int32", "float32"]),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 3),
    flip=st.booleans(),
)
def test_any_place_comes_back(tmp_path_factory, ending, channels, dtype, angles, spacing, flip):
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix() * spacing * ([-1, 1, 1] if flip else [1, 1, 1])
    affine[:3, 3] = np.array(angles) * 50
    image = np.random.default_rng(0).integers(0, 100, (3, 4, 5, channels)).astype(dtype)
    path = tmp_path_factory.mktemp("place") / f"a{ending}"
    io.write_image(path, image, Geometry((3, 4, 5), affine))
    back, geometry = io.read_image(path)
    np.testing.assert_array_equal(back, image)
    assert back.dtype == image.dtype
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-9)


# --------------------------------------------------------------------------------------------------- headers and others


def test_a_label_keeps_the_fields_of_its_nrrd(tmp_path):
    more = {"content": "a head", "labels": '"x" "y" "z"', "space units": '"mm" "mm" "mm"'}
    nrrd(tmp_path / "a.nrrd", [*nrrd_fields(lps(), **more), "scanner:=of iron", "# a remark"], RAW)
    image, geometry = io.read_image(tmp_path / "a.nrrd")
    io.write_label(tmp_path / "l.nrrd", image[..., 0] % 3, geometry)
    head = (tmp_path / "l.nrrd").read_bytes().partition(b"\n\n")[0].decode().splitlines()
    for line in ("content: a head", 'labels: "x" "y" "z"', "scanner:=of iron", "space: left-posterior-superior"):
        assert line in head
    assert "type: uint8" in head or "type: uchar" in head or "type: unsigned char" in head
    _, again = io.read_label(tmp_path / "l.nrrd")
    np.testing.assert_array_equal(again.affine, geometry.affine)


def test_a_label_keeps_the_fields_of_its_metaimage(tmp_path):
    (tmp_path / "a.mha").write_bytes(mha_header(AnatomicalOrientation="RAI", Modality="MET_MOD_CT") + RAW)
    image, geometry = io.read_image(tmp_path / "a.mha")
    io.write_label(tmp_path / "l.mha", image[..., 0] % 3, geometry)
    head = (tmp_path / "l.mha").read_bytes().partition(b"LOCAL\n")[0].decode()
    for line in ("AnatomicalOrientation = RAI", "Modality = MET_MOD_CT", "ElementType = MET_UCHAR"):
        assert line in head
    _, again = io.read_label(tmp_path / "l.mha")
    np.testing.assert_array_equal(again.affine, geometry.affine)


@pytest.mark.parametrize("axis", [0, 3])
def test_channels_of_nrrd_wherever_they_stand(tmp_path, axis):
    image = np.stack([VOXELS, 2 * VOXELS], -1)
    stored = np.moveaxis(image, -1, axis)
    directions = [vector(lps()[:3, i]) for i in range(3)]
    directions.insert(axis, "none")
    kinds = ["domain"] * 3
    kinds.insert(axis, "vector")
    more = {
        "dimension": "4",
        "sizes": " ".join(map(str, stored.shape)),
        "space directions": " ".join(directions),
        "kinds": " ".join(kinds),
    }
    nrrd(tmp_path / "a.nrrd", nrrd_fields(lps(), **more), stored.tobytes(order="F"))
    back, geometry = io.read_image(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(back, image)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-5)
    io.write_label(tmp_path / "l.nrrd", VOXELS % 2, geometry)  # the label has no channels
    label, again = io.read_label(tmp_path / "l.nrrd")
    np.testing.assert_array_equal(label, VOXELS % 2)
    np.testing.assert_array_equal(again.affine, geometry.affine)


def test_pynrrd_agrees(tmp_path):
    import nrrd as pynrrd

    io.write_image(tmp_path / "ours.nrrd", VOXELS[..., None], Geometry(SHAPE, AFFINE))
    data, header = pynrrd.read(str(tmp_path / "ours.nrrd"))
    np.testing.assert_array_equal(data, VOXELS)
    np.testing.assert_allclose(header["space directions"].T, lps()[:3, :3], atol=1e-9)
    np.testing.assert_allclose(header["space origin"], lps()[:3, 3], atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its writer asks for the time in an old way
        pynrrd.write(str(tmp_path / "theirs.nrrd"), data, header)
    image, geometry = io.read_image(tmp_path / "theirs.nrrd")
    np.testing.assert_array_equal(image[..., 0], VOXELS)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "name", ["../voxels.raw", "/voxels.raw", "a/../../voxels.raw", "..\\voxels.raw", "C:\\voxels.raw"]
)
def test_voxels_outside_the_folder_are_refused(tmp_path, name):
    (tmp_path / "voxels.raw").write_bytes(RAW)
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    nrrd(folder / "a.nhdr", nrrd_fields(lps(), **{"data file": name}), b"")
    (folder / "a.mhd").write_bytes(mha_header(ElementDataFile=None) + f"ElementDataFile = {name}\n".encode())
    for file in ("a.nhdr", "a.mhd"):
        refused(folder / file, "outside its folder")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"sizes": "4 5 600000"}, "cut short"),
        ({"sizes": "4 5 0"}, "impossible dimensions"),
        ({"sizes": "4 5"}, "contradicts"),
        ({"type": "block"}, "Unusual kind"),
        ({"encoding": "bzip2"}, "Unusual kind"),
        ({"space": "martian"}, "Unknown space"),
        ({"space directions": "(1,0,0) (2,0,0) (0,0,1)"}, "singular"),
        ({"space directions": "(1,0,0) (0,nan,0) (0,0,1)"}, "singular"),
        ({"data file": "absent.raw"}, "not there"),
        ({"data file": "LIST"}, "several files"),
        ({"byte skip": "99999999"}, "cut short"),
    ],
)
def test_bad_nrrd(tmp_path, more, word):
    nrrd(tmp_path / "a.nrrd", nrrd_fields(lps(), **more), RAW)
    refused(tmp_path / "a.nrrd", word)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"DimSize": "4 5 600000"}, "cut short"),
        ({"DimSize": "4 5 0"}, "impossible dimensions"),
        ({"NDims": "2"}, "contradicts"),
        ({"ElementType": "MET_STRING"}, "Unusual kind"),
        ({"BinaryData": "False"}, "Unusual kind"),
        ({"ElementSpacing": "1 -1 1"}, "Impossible voxel size"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "singular"),
        ({"TransformMatrix": "1 0 0"}, "has not 9 numbers"),
        ({"ElementDataFile": "LIST"}, "several files"),
        ({"CompressedData": "True"}, "cannot be read"),
        ({"DimSize": None}, "lacks a field"),
    ],
)
def test_bad_metaimage(tmp_path, more, word):
    (tmp_path / "a.mha").write_bytes(mha_header(**more) + RAW)
    refused(tmp_path / "a.mha", word)


@pytest.mark.parametrize(("ending", "whole"), [(".nhdr", ".nrrd"), (".mhd", ".mha")])
def test_detached_headers_are_read_but_not_written(tmp_path, ending, whole):
    with pytest.raises(UserError, match="one file") as caught:
        io.write_label(tmp_path / f"a{ending}", VOXELS % 2, Geometry(SHAPE, AFFINE))
    assert whole in str(caught.value)
