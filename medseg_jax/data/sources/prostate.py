"""Prostate in T2 MR of six sites, as the SAML release collected them."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="prostate",
    title="Prostate in T2 MR of six sites, SAML release (Mamba-Sea)",
    licence="research use; each site has its own terms (NCI-ISBI 2013, I2CVB, PROMISE12)",
    citation="Liu et al., Shape-aware Meta-learning for Generalizing Prostate MRI Segmentation to Unseen Domains, MICCAI 2020",
    origin="https://liuquande.github.io/SAML/",
    access="Follow the link on that page.",
    layout="""
Prostate/
  RUNMC/Case00.nii.gz  RUNMC/Case00_segmentation.nii.gz
  BMC/  I2CVB/  UCL/  BIDMC/  HK/
""",
    needs=("*/Case*_segmentation.nii*",),
    split="Every fifth case of each site validates (our rule; the release has no split). Zones are joined to one class. Leave "
    "a site out: --test-domain UCL.",
    options=Options(layout="pairs", classes="prostate"),
)
