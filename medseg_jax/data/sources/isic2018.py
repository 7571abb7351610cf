"""ISIC 2018, task 1: outlines of skin lesions."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="isic2018",
    title="ISIC 2018 task 1: skin lesions in dermoscopy (Med-2D SegNet)",
    licence="CC BY-NC 4.0",
    citation="Codella et al., Skin Lesion Analysis Toward Melanoma Detection 2018, arXiv 1902.03368; Tschandl et al., The "
    "HAM10000 Dataset, Scientific Data 5, 2018",
    origin="https://challenge.isic-archive.com/data/#2018",
    access="Free download of one zip file per folder; unpack them into one folder.",
    layout="""
isic2018/
  ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg
  ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png
  ISIC2018_Task1-2_Validation_Input/    ISIC2018_Task1_Validation_GroundTruth/    (and Test, optional)
or train/images/ISIC_0000000.jpg, train/masks/ISIC_0000000_segmentation.png, val/...
""",
    needs=("*/*.jpg|*/images/*.jpg", "*/*_segmentation.png|*/masks/*_segmentation.png"),
    split="The official training, validation and test folders; without a validation folder every fifth training image "
    "validates.",
    options=Options(classes="lesion", images="*.jpg", masks="*_segmentation.png"),
)
