"""Polyps of several centres as domains: each folder of images and masks is one."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="polyps",
    title="Polyps of several centres as domains: Kvasir-SEG, CVC-ClinicDB, BKAI-IGH, ETIS-Larib (Mamba-Sea)",
    licence="research use",
    citation="see kvasir_seg, cvc_clinicdb, bkai_igh, etis_larib",
    origin="see kvasir_seg, cvc_clinicdb, bkai_igh, etis_larib",
    access="Get the sets one by one, and put each into a folder as below.",
    layout="""
polyp/
  kvasir_seg/images/*.jpg         kvasir_seg/masks/*.jpg
  cvc_clinicdb/images/*.png       cvc_clinicdb/masks/*.png
  bkai_igh_neopolyp/images/       bkai_igh_neopolyp/masks/    (colours are joined to one class)
  etis_larib/images/              etis_larib/masks/
""",
    needs=("*/images/*", "*/masks/*"),
    split="In each domain every fifth image validates; where neighbours are alike (frames of a video), the last fifth. Our "
    "rule. Leave a centre out: --test-domain etis_larib.",
    options=Options(classes="polyp"),
)
