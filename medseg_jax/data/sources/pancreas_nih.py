"""Pancreas in CT (NIH), as CoraNet preprocessed it for the semi-supervised papers."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """One list of training scans out of the labelled and the unlabelled ones: all of them have labels."""
    for volume in files(folder, "*.h5", "Pancreas_h5/*.h5"):
        link(volume, work / volume.name)
    for role, parts in (("train", ("train_lab", "train_unlab", "train")), ("test", ("test",))):
        lists = files(folder, *(f"{part}.{ending}" for part in parts for ending in ("txt", "list")))
        names = [line.strip().removesuffix(".h5") for path in lists for line in path.read_text().splitlines()]
        if any(names):
            (work / f"{role}.list").write_text("\n".join(filter(None, names)) + "\n")
    return work


SOURCE = Source(
    name="pancreas_nih",
    title="Pancreas-NIH: pancreas in abdominal CT, preprocessed by CoraNet (WT-BCP, BCP)",
    licence="CC BY 3.0 (TCIA, Pancreas-CT)",
    citation="Roth et al., Data From Pancreas-CT, The Cancer Imaging Archive, 2016; preprocessing: Shi et al., Inconsistency-"
    "aware Uncertainty Estimation for Semi-supervised Medical Image Segmentation (CoraNet), IEEE TMI 41, 2022",
    origin="https://github.com/koncle/CoraNet",
    access="Follow the README of CoraNet or of BCP; put train_lab.txt, train_unlab.txt and test.txt into the folder.",
    layout="""
pancreas/
  0001.h5  0002.h5  ...    (keys image, label; x, y, z; or in Pancreas_h5/)
  train_lab.txt  train_unlab.txt  test.txt
""",
    needs=("*.h5|Pancreas_h5/*.h5",),
    split="By the lists; they name nobody for validation, so every fifth training scan validates (our rule): the papers choose "
    "their model on the test scans, we do not. Few labels: the papers' 20 % are the scans 0001 to 0012, of which 0001, 0006 and "
    "0011 validate by our rule, so that they cannot be named as labelled. --split train=train.list,val=test.list repeats the "
    "papers' protocol: the test scans validate. The spacing of the copies is not stored and taken as 1 mm (our choice).",
    options=Options(layout="arrays", classes="pancreas", spacing="1,1,1", axes="xyz"),
    arrange=arrange,
)
