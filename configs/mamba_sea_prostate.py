"""Mamba-Sea: the prostate in T2 MR of six sites (SAML release), the paper's settings.

    medseg data convert --source prostate Prostate data/prostate
    medseg train configs/mamba_sea_prostate.py --hold-out all --out runs/mamba_sea_prostate \\
        --pretrained vmamba_small_e238_ema.pth

For an accelerator: three adjacent slices of 384 x 384, batch 6, 20,000 steps for each
held-out site, two networks of 27.4 M parameters.
Not run: no score was obtained. The abstract says mean Dice above 90 % on Prostate; the released code chose the
weights on the target, which `--oracle` does too, labelled as such.

All volumes of the target site are scored, as whole volumes.

Departures: weight decay spares vectors (norms, most biases, D); images are resized with a low-pass filter and
cubic interpolation rather than by nearest neighbour; turns by 90 degrees are drawn as mirroring and angles up to 20
degrees alone; volumes are shuffled and one of their slices is drawn, the first and the last (whose missing neighbour
is repeated) included.
"""

from medseg_jax import Augment, Config, MambaSea, Mix, Optim, Stage, VMUNet

weak = Augment(**{**vars(Augment.none()), "p_mirror": 0.5, "p_rotation": 0.25, "rotation": 20.0})
optim = Optim(lr=3e-4, weight_decay=0.01, warmup=0, clip_norm=1e9)
stage = Stage(MambaSea(VMUNet()), optim=optim, mix=Mix(balance="domain", foreground=0.0), augment=weak)
config = Config(data="data/prostate", stages=(stage,), plan="configs/plans/mamba_sea_prostate.json", seed=1339)
