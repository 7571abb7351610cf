"""Kvasir-SEG: polyps, masks as JPEG."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="kvasir_seg",
    title="Kvasir-SEG: colonoscopy images with polyps (Med-2D SegNet)",
    licence="research and educational use",
    citation="Jha et al., Kvasir-SEG: A Segmented Polyp Dataset, MultiMedia Modeling 2020",
    origin="https://datasets.simula.no/kvasir-seg/",
    access="Free download of a zip file; SRC may be that zip file.",
    layout="""
Kvasir-SEG/
  images/cju0qkwl35piu0993l0dewei2.jpg
  masks/cju0qkwl35piu0993l0dewei2.jpg
""",
    needs=("images/*.jpg", "masks/*.jpg"),
    split="Every fifth image (sorted) validates: our rule. The set has no official split, and papers use several.",
    options=Options(classes="polyp", split="every-5"),
)
