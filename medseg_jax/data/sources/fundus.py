"""Optic disc and cup of four sites, as the DoFE release cropped them."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="fundus",
    title="Optic disc and cup of four sites, 800 x 800 crops of the DoFE release (Mamba-Sea)",
    licence="research use; each site has its own terms",
    citation="Wang et al., DoFE: Domain-oriented Feature Embedding for Generalizable Fundus Image Segmentation on Unseen "
    "Datasets, IEEE TMI 39, 2020; images: Drishti-GS, RIM-ONE-r3, REFUGE",
    origin="https://github.com/emma-sjwang/Dofe",
    access="Follow the link in the README of DoFE.",
    layout="""
Fundus/
  Domain1/train/image/gdrishtiGS_001.png    (Drishti-GS; 2: RIM-ONE-r3, 3 and 4: REFUGE)
  Domain1/train/mask/gdrishtiGS_001.png     (0 cup, 128 rim, 255 background)
  Domain1/test/...
  Domain2/ Domain3/ Domain4/
""",
    needs=("Domain*/*/image/*.png", "Domain*/*/mask/*.png"),
    split="The release's train and test folders; every fifth training image of each domain validates (our rule). The disc is "
    "rim and cup together. Leave a domain out: --test-domain Domain1 (all of it is then tested).",
    options=Options(classes="background=255,rim=128,cup=0"),
    scores={"disc": ("rim", "cup"), "cup": ("cup",)},
)
