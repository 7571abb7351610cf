"""IDRiD: lesions of diabetic retinopathy, one palette file per lesion and none where it is absent."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link

CLASSES = ("MA", "HE", "EX", "SE", "OD")


def arrange(folder: Path, work: Path) -> Path:
    """By the ends of the names, since copies call the folders differently; the first folder that holds a mask counts."""
    for image in files(folder, "**/IDRiD_??.jpg"):
        split = "test" if any("testing" in part.lower() for part in image.relative_to(folder).parts) else "train"
        link(image, work / split / "images" / image.name)
        for name in CLASSES:
            masks = files(folder, f"**/{image.stem}_{name}.png", f"**/{image.stem}_{name}.tif")
            for mask in masks[:1]:
                link(mask, work / split / "masks" / name / mask.name)
    return work


SOURCE = Source(
    name="idrid",
    title="IDRiD: microaneurysms, haemorrhages, hard and soft exudates, optic disc in fundus images (DR lesions)",
    licence="CC BY 4.0",
    citation="Porwal et al., Indian Diabetic Retinopathy Image Dataset (IDRiD), Data 3, 2018",
    origin="https://idrid.grand-challenge.org, IEEE DataPort, doi 10.21227/H25W98",
    access="Download 'A. Segmentation' from IEEE DataPort (free account); SRC may be the zip file.",
    layout="""
A. Segmentation/
  1. Original Images/a. Training Set/IDRiD_01.jpg    1. Original Images/b. Testing Set/IDRiD_55.jpg
  2. All Segmentation Groundtruths/a. Training Set/1. Microaneurysms/IDRiD_01_MA.tif ...
or images/IDRiD_01.jpg, masks/MA/IDRiD_01_MA.png ...
""",
    needs=("**/IDRiD_??.jpg", "**/IDRiD_??_MA.*"),
    split="The official test images (55 to 81) are the test set; the last five of the training images validate (our rule: "
    "IDRiD has no validation set). A lesion without a file is absent.",
    # 76, 255 or index 1 is a lesion, depending on the file: everything above 0.
    options=Options(classes=",".join(CLASSES), multilabel=True, threshold=0, split="last-5"),
    arrange=arrange,
)
