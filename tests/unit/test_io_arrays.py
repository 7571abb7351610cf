"""Arrays in npy, npz and HDF5 files: which one, which axes, and what hides in an archive."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from files import refused
from medseg_jax.data import io
from medseg_jax.types import UserError


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Evil(), None], object)
    np.save("a.npy", evil, allow_pickle=True)
    np.savez("a.npz", image=evil)
    Path("b.npy").write_bytes(pickle.dumps(Evil()))
    for name in ("a.npy", "a.npz", "b.npy"):
        refused(tmp_path / name)
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("image", data=["text", "more"], dtype=h5py.string_dtype())
    refused(tmp_path / "a.h5", "not plain numbers")
    assert not Path("executed").exists()


@pytest.mark.parametrize("ending", [".npz", ".h5"])
def test_which_array(tmp_path, ending):
    path = tmp_path / f"a{ending}"

    def save(**arrays):
        if ending == ".npz":
            np.savez(path, **arrays)
        else:
            with h5py.File(path, "w") as file:
                for name, value in arrays.items():
                    file[name] = value

    one, two = np.zeros((7, 8), np.float32), np.ones((7, 8), np.uint8)
    save(image=one, label=two, native_shape=np.array([1, 2]), scribble=two * 3)
    assert io.read_image(path)[0].max() == 0
    assert io.read_label(path)[0].max() == 1
    assert io.read_label(path, key="scribble")[0].max() == 3
    refused(path, "scribbles", "image [7, 8]", read=lambda p: io.read_label(p, key="scribbles"))
    save(data=two)
    assert io.read_image(path)[0].max() == io.read_label(path)[0].max() == 1
    save(label=two)
    refused(path, "No array 'image'")
    save(first=one, second=two)
    refused(path, "first [7, 8], second [7, 8]", "name the arrays")
    save(image=np.zeros((5, 6, 7)), spacing=np.array([3.0, 1, 2]))
    _, geometry = io.read_image(path)
    assert (geometry.unit, geometry.spacing) == ("mm", (3, 1, 2))
    save(image=np.zeros((5, 6, 7)), spacing=np.array([3.0, 1]))
    refused(path, "spacing does not fit", "3 numbers")
    save(image=np.zeros((8, 9)), spacing=np.array([3.0, 1, 2]))
    refused(path, "spacing does not fit", "2 numbers")
    save(image=np.zeros((5, 6, 7)), affine=np.zeros((4, 4)))
    refused(path, "affine makes no sense")


def test_axes_of_bare_arrays(tmp_path):
    def shape(*axes, read=io.read_image):
        np.save(tmp_path / "a.npy", np.zeros(axes, np.uint8))
        return read(tmp_path / "a.npy")[0].shape

    assert shape(8, 9) == (8, 9, 1)
    assert shape(8, 9, 3) == (8, 9, 3)
    assert shape(8, 9, 10) == (8, 9, 10, 1)
    assert shape(3, 9, 10) == (3, 9, 10, 1)
    assert shape(8, 9, 10, 2) == (8, 9, 10, 2)
    assert shape(8, 9, 3, read=io.read_label) == (8, 9, 3)
    assert shape(8, 9, 1, read=io.read_label) == (8, 9)
    for axes in ((5,), (2, 8, 9, 10), (2, 2, 2, 2, 2), (0, 5)):
        with pytest.raises(UserError):
            shape(*axes)


def test_bare_volumes_are_canonical(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 6, 7)))
    _, geometry = io.read_image(tmp_path / "a.npy")
    assert nib.aff2axcodes(geometry.affine) == ("S", "A", "R")
    assert geometry.unit == "px"


def test_npz_that_declares_more_than_it_holds(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000, 100), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", body)
    refused(tmp_path / "a.npz", "(100000, 100000, 100)")
    (tmp_path / "a.npy").write_bytes(body)
    refused(tmp_path / "a.npy")


def test_hdf5_links_and_bombs(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = np.ones((7, 8))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/image")
    refused(tmp_path / "link.h5", "No array 'image'")
    (tmp_path / "raw").write_bytes(bytes(56))
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("image", (7, 8), "u1", external=[(str(tmp_path / "raw"), 0, 56)])
    refused(tmp_path / "external.h5", "no links")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("image", (10**5, 10**5, 10), "f4", chunks=True, compression="gzip")
    refused(tmp_path / "bomb.h5", "nothing larger than the file")
