"""GlaS: glands in colon histology, masks that number them."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """In the release, train_1.bmp and train_1_anno.bmp, testA_1.bmp ... lie in one folder."""
    for mask in files(folder, "**/*_anno.bmp"):
        name, split = mask.name.replace("_anno", ""), "test" if mask.name.startswith("test") else "train"
        link(mask.with_name(name), work / split / "images" / name)
        link(mask, work / split / "masks" / name)
    return work if (work / "train").exists() else folder


SOURCE = Source(
    name="glas",
    title="GlaS: colon glands in histology (Med-2D SegNet)",
    licence="research use",
    citation="Sirinukunwattana et al., Gland Segmentation in Colon Histology Images: The GlaS Challenge Contest, Medical Image "
    "Analysis 35, 2017",
    origin="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/",
    access="Free download of a zip file from the contest's page; SRC may be that zip file.",
    layout="""
Warwick QU Dataset/
  train_1.bmp  train_1_anno.bmp  testA_1.bmp  testA_1_anno.bmp  testB_1.bmp ...
or Train_Folder/images/1.png, Train_Folder/masks/1.png
""",
    needs=("**/*_anno.bmp|**/images/*.png",),
    split="The contest's: 85 images train, tests A and B (60 and 20) are the test set; every fifth training image validates "
    "(our rule). The 165 images are of 16 slides only: every fifth tears slides apart and validation looks better than it is. "
    "Grade.csv of the release says whose each is; lists made from it (--split train=a.list,val=b.list) keep them together.",
    options=Options(instances=True, classes="gland"),
    arrange=arrange,
)
