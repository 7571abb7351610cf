"""Left atrium in gadolinium MR, as UA-MT preprocessed it."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="la2018",
    title="LA 2018: left atrium in gadolinium-enhanced MR, cropped and normalised by UA-MT (WT-BCP)",
    licence="research use",
    citation="Xiong et al., A Global Benchmark of Algorithms for Segmenting the Left Atrium from Late Gadolinium-Enhanced "
    "Cardiac MRI, Medical Image Analysis 67, 2021; preprocessing: Yu et al., UA-MT, MICCAI 2019",
    origin="https://github.com/yulequan/UA-MT",
    access="Follow the README of UA-MT; the original scans need a registration at the challenge's page. Put its train.list "
    "and test.list into the folder.",
    layout="""
la2018/
  train.list  test.list
  06SR5RBREL16DQ6M8LWS/mri_norm2.h5    (keys image, label; x, y, z at 0.625 mm)
""",
    needs=("*/mri_norm2.h5",),
    split="By UA-MT's lists: 80 scans train, 20 are tested. They name nobody for validation, so every fifth training scan "
    "validates (our rule): the papers choose their model on the test scans, we do not. "
    "--split train=train.list,val=test.list repeats their protocol: the test scans validate.",
    options=Options(layout="arrays", classes="atrium", spacing="0.625,0.625,0.625", axes="xyz"),
)
