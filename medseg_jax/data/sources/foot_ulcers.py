"""Foot ulcers: FUSeg and Medetec, 0/255 in one and 0/1 in the other."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="foot_ulcers",
    title="Foot ulcers of FUSeg 2021 and Medetec as two domains",
    licence="research use; no licence file was found in the repository, so do not pass copies on",
    citation="Wang et al., FUSeg: The Foot Ulcer Segmentation Challenge, arXiv 2201.00414; Wang et al., Fully Automatic Wound "
    "Segmentation with Deep Convolutional Neural Networks, Scientific Reports 10, 2020",
    origin="https://github.com/uwm-bigdata/wound-segmentation, folder data",
    access="Clone or download the repository; SRC is a folder with the two below.",
    layout="""
data/
  Foot Ulcer Segmentation Challenge/train/images/0011.png  .../train/labels/0011.png  .../validation/  .../test/images/
  Medetec_foot_ulcer_224/train/images/  .../train/labels/  .../test/
or fuseg/train/images, fuseg/train/masks, medetec_224/train/images ...
""",
    needs=("*/train/images/*.png", "*/train/labels/*.png|*/train/masks/*.png"),
    split="The official folders; FUSeg's test images have no masks. Without a validation folder every fifth photograph of "
    "each domain validates (our rule), and photographs of one ulcer (X, X_1, X_2) stay together.",
    options=Options(classes="wound", unlabelled=True),
)
