"""Optic discs of two sites in crops of 256 pixels, with the experts' soft maps of Drishti-GS."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="optic_disc",
    title="Optic disc of Drishti-GS and IDRiD, crops of 256 x 256 (Mamba-Sea in small)",
    licence="Drishti-GS: research use; IDRiD: CC BY 4.0",
    citation="Sivaswamy et al., Drishti-GS, ISBI 2014; Porwal et al., Indian Diabetic Retinopathy Image Dataset, Data 3, 2018",
    origin="https://cvit.iiit.ac.in/projects/mip/drishti-gs/mip-dataset2/Home.php, https://idrid.grand-challenge.org",
    access="Get both and cut out the region around the disc, or name masks of your own crops as below.",
    layout="""
optic_disc/
  drishti_gs/images/drishtiGS_002.png  drishti_gs/masks_od/drishtiGS_002.png    (0 to 255: how many experts agree)
  idrid/images/IDRiD_01.png            idrid/masks_od/IDRiD_01.png
""",
    needs=("**/drishti_gs/masks_od/*", "**/idrid/masks_od/*"),
    split="Every fifth image of each domain validates (our rule). Leave one out: --test-domain idrid.",
    options=Options(classes="disc=od"),
)
