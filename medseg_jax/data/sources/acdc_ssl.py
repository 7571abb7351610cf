"""ACDC as SSL4MIS preprocessed it: volumes in h5 files, and lists of names."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """Takes the volumes, not the slices cut from them, and the lists, which may lie beside the folder."""
    for volume in files(folder, "*_frame*.h5", "*_frame*.npz", "data/*_frame*.h5"):
        link(volume, work / volume.name)
    for role in ("train", "val", "test"):
        found = [path for base in (folder, folder.parent) for path in files(base, f"{role}.list", f"lists/{role}.list")]
        if found:
            link(found[0], work / f"{role}.list")
    return work


SOURCE = Source(
    name="acdc_ssl",
    title="ACDC preprocessed by SSL4MIS: volumes in h5, with the lists of the semi-supervised papers (WT-BCP)",
    licence="CC BY-NC-SA 4.0 (ACDC)",
    citation="Bernard et al., IEEE TMI 37, 2018; preprocessing: Luo et al., SSL4MIS, 2020",
    origin="https://github.com/HiLab-git/SSL4MIS",
    access="Follow the link in the README of SSL4MIS, folder data/ACDC.",
    layout="""
ACDC/
  data/patient001_frame01.h5    (keys image, label; data/slices/ is not used)
  train.list  val.list  test.list
or the volumes (.h5, .npz) in the folder itself, and the lists in it, beside it, or in lists/ there
""",
    needs=("*_frame*.h5|*_frame*.npz|data/*_frame*.h5",),
    split="By the lists: 70 patients train, 10 validate, 20 are tested. Both phases of a patient stay together; files whose "
    "frame number is not the lists' go where their patient is. Few labels: the first 3 patients of train.list, or 7.",
    options=Options(layout="arrays", classes="RV=1,MYO=2,LV=3"),
    arrange=arrange,
)
