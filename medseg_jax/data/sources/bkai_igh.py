"""BKAI-IGH NeoPolyp: colours of the masks tell neoplastic polyps from others."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """In the release, a folder called train holds the images; the test images have no masks."""
    for path in files(folder, "train/**/*.jpeg", "images/*.jpeg"):
        link(path, work / "images" / path.name)
    for path in files(folder, "train_gt/**/*.jpeg", "masks/*.jpeg"):
        link(path, work / "masks" / path.name)
    return work


SOURCE = Source(
    name="bkai_igh",
    title="BKAI-IGH NeoPolyp: polyps, neoplastic and not",
    licence="research use",
    citation="Nguyen An et al., BlazeNeo: Blazing Fast Polyp Segmentation and Neoplasm Detection, IEEE Access 10, 2022; "
    "Phan et al., NeoUNet, ISVC 2021",
    origin="https://www.kaggle.com/c/bkai-igh-neopolyp",
    access="Join the competition at Kaggle, and download from its page.",
    layout="""
bkai-igh-neopolyp/
  train/train/0081835cf877e004e8bfb905b78a9139.jpeg           or images/*.jpeg
  train_gt/train_gt/0081835cf877e004e8bfb905b78a9139.jpeg     or masks/*.jpeg
""",
    needs=("train/**/*.jpeg|images/*.jpeg", "train_gt/**/*.jpeg|masks/*.jpeg"),
    split="Every fifth image (sorted) validates: our rule, since the masks of the test images are withheld.",
    options=Options(classes="neoplastic=red,non_neoplastic=green", split="every-5"),
    arrange=arrange,
)
