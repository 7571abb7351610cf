"""Archives: what is in them reaches the data set, and nothing in them reaches anything else."""

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_jax.data import convert as package
from medseg_jax.data.convert import archives
from medseg_jax.types import UserError


def png(seed: int, mask: bool = False) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 2 if mask else 256, (16, 24), np.uint8) * (255 if mask else 1)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


CONTENT = {
    f"set/{folder}/{name}.png": png(i, folder == "masks")
    for i, name in enumerate("abcdef")
    for folder in ("images", "masks")
}


def make(path: Path, content: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def refused(path: Path, *words: str) -> str:
    """The message of the refusal; nothing at all is left of the attempt."""
    before = set(path.parent.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        package.convert(path, path.parent / "dst", quiet=True)
    assert set(path.parent.parent.rglob("*")) == before
    for word in words:
        assert word in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", archives.ARCHIVES)
def test_an_archive_is_converted_as_its_folder_is(tmp_path, ending):
    src = make(tmp_path / f"mine{ending}", CONTENT | {"__MACOSX/set/._a.png": b"junk"})
    for name, data in CONTENT.items():
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(data)
    packed = package.convert(src, tmp_path / "dst", quiet=True, name="same")
    plain = package.convert(tmp_path / "plain" / "set", tmp_path / "dst2", quiet=True, name="same")
    assert files(packed.root) == files(plain.root)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["dst", "dst2", src.name, "plain"])
    assert package.convert(src, tmp_path / "dst3", quiet=True).name == "set"


def test_a_decathlon_archive_with_files_of_macos(tmp_path):
    import json

    import nibabel as nib

    root = tmp_path / "Task99_Test"
    entries = []
    for i in range(3):
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            volume = np.random.default_rng(i).integers(0, 2, (6, 7, 8)).astype(np.uint8)
            nib.Nifti1Image(volume, np.eye(4)).to_filename(root / folder / f"t_{i}.nii.gz")
        entries.append({"image": f"./imagesTr/t_{i}.nii.gz", "label": f"./labelsTr/t_{i}.nii.gz"})
    described = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(described))
    content = {f"./{root.name}/{name}": data for name, data in files(root).items()}
    src = make(tmp_path / "t.tar", {"./._Task99_Test": b"junk", **content})
    assert package.convert(src, tmp_path / "dst", quiet=True).labels.names == ("organ",)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil.png", "leads out"),
        ("set/../../evil.png", "leads out"),
        ("set/..", "leads out"),
        ("/evil.png", "absolute"),
        ("C:/evil.png", "absolute"),
        ("set\\..\\evil.png", "another system"),
        ("set/a\nb.png", "no name"),
        ("n" * 201, "no name"),
        ("set/images/a.png", "comes twice"),
        ("set/./images//a.png", "comes twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_lead_elsewhere(tmp_path, ending, name, why):
    path = tmp_path / "in" / f"a{ending}"
    path.parent.mkdir()
    if ending != ".zip":
        make(path, CONTENT)
        with tarfile.open(path, "r:*") as archive:
            held = [(m.name, archive.extractfile(m).read()) for m in archive]
        with tarfile.open(path, "w:gz" if ending == ".tgz" else "w") as archive:
            for entry, data in [*held, (name, b"evil")]:
                info = tarfile.TarInfo(entry)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        make(path, CONTENT)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"evil")
    refused(path, f"entry {name!r}", why)


def test_a_name_cut_by_a_null_byte(tmp_path):
    path = make(tmp_path / "a.zip", {"set/aXb.png": b""})
    path.write_bytes(path.read_bytes().replace(b"aXb", b"a\0b"))
    refused(path, "no name")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("set/odd")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    refused(path, "entry 'set/odd'", "a link" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "a device")


@pytest.mark.parametrize(
    ("mode", "why"), [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a device")]
)
def test_links_and_devices_in_zip(tmp_path, mode, why):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("set/odd")
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(path, "entry 'set/odd'", why)


def test_a_file_that_is_also_a_folder(tmp_path):
    refused(make(tmp_path / "a.zip", {"set/a": b"x", "set/a/b": b"y"}), "below a file")


def test_a_password(tmp_path):
    path = make(tmp_path / "a.zip", {"set/a.png": b"x"})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    refused(path, "protected by a password")


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
def test_bombs(tmp_path, ending):
    refused(make(tmp_path / f"a{ending}", {"set/zeros.nii": bytes(40 << 20)}), "set/zeros.nii", "250 times")


def test_what_a_bomb_declares_counts_before_it_is_unpacked(tmp_path):
    """The header of a tar promises a terabyte; nothing of it is read."""
    info = tarfile.TarInfo("set/huge.nii")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(2048))
    refused(tmp_path / "a.tar", "set/huge.nii", "1099511627776 bytes")


def test_a_header_that_fills_the_memory(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(info.tobuf() + bytes(4096))
    refused(tmp_path / "a.tgz", "header of")


def test_a_zip_that_understates_its_entries(tmp_path):
    """The directory says 10 bytes, the stream holds a thousand."""
    path = make(tmp_path / "a.zip", {"set/a.png": bytes(range(250)) * 4})
    raw = path.read_bytes()
    size = (1000).to_bytes(4, "little")
    at = raw.index(size, raw.index(b"PK\x01\x02") + 24)
    path.write_bytes(raw[:at] + (10).to_bytes(4, "little") + raw[at + 4 :])
    refused(path, "cannot be unpacked")


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_ENTRIES", 5)
    refused(make(tmp_path / "a.zip", CONTENT), "6 entries")


def test_a_full_disk(tmp_path, monkeypatch):
    usage = archives.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    refused(make(tmp_path / "a.zip", CONTENT), "at most 500 bytes", "larger disk")


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_damaged(tmp_path, ending):
    path = make(tmp_path / f"a{ending}", CONTENT)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path)
    path.write_bytes(b"no archive at all")
    refused(path, "cannot be unpacked")


def test_other_archives_are_named(tmp_path):
    (tmp_path / "a.7z").write_bytes(b"7z")
    refused(tmp_path / "a.7z", "unpack it first", ".tar.gz")


def test_an_existing_target_is_refused_before_unpacking(tmp_path, monkeypatch):
    src = make(tmp_path / "a.zip", CONTENT)
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious.txt").write_text("mine")
    monkeypatch.setattr(archives, "unpack", lambda *_: pytest.fail("unpacked"))
    refused(src, "The target exists")


def test_what_a_killed_run_left_is_replaced_but_nothing_else(tmp_path):
    src, left = make(tmp_path / "a.zip", CONTENT), tmp_path / "dst.unpacked"
    left.mkdir()
    (left / "mine").touch()
    refused(src, "A folder is in the way")
    (left / ".medseg-convert").touch()
    package.convert(src, tmp_path / "dst", quiet=True)
    assert not left.exists()


# ------------------------------------------------------------------------------------------------------------ any name

names = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", "...", "a..", "..a", "é", " ", "C:", "~", "\\", "\t"]), max_size=5
).map("/".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(names.filter(bool), min_size=1, max_size=4, unique=True), st.sampled_from([".zip", ".tar"]))
def test_whatever_the_names_nothing_is_written_outside(tmp_path_factory, entries, ending):
    """Either everything arrives, under the names the archive says, or it is refused and nothing is there at all."""
    top = tmp_path_factory.mktemp("any")
    content = {name: name.encode() for name in entries if not name.endswith("/")}
    path, folder = make(top / f"a{ending}", content), top / "deep" / "er"
    folder.mkdir(parents=True)
    try:
        archives.unpack(path, folder)
    except UserError:
        assert not list(folder.iterdir())
    else:
        clean = {"/".join(p for p in name.split("/") if p not in ("", ".")): data for name, data in content.items()}
        assert files(folder) == clean
    outside = {p for p in top.rglob("*") if folder not in p.parents}
    assert outside == {path, folder.parent, folder}
