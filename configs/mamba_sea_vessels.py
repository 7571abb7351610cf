"""Mamba-Sea in small, from scratch: retinal vessels of a site that nobody has seen (DRIVE, CHASE_DB1, STARE, HRF).

    medseg data convert --source retinal_vessels vessels data/vessels
    medseg train configs/mamba_sea_vessels.py --hold-out all --out runs/mamba_sea_vessels

Images are brought to 256 x 256, patches are 96 x 96, so that two CPU cores train a site in minutes; the plan is fixed,
and no image of any site had a part in it. The skips are those of a U-Net: with the published ones, thin vessels are not
learned in minutes. Scores stand in docs/benchmarks/domain-generalisation.md.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet(features=(32, 64, 128), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1, skips="unet")
stage = Stage(MambaSea(net), optim=Optim(lr=2e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)
