"""WT-BCP on ACDC with 7 labelled patients (the papers' 10 %), full width, with the papers' numbers.

    medseg data convert --source acdc_ssl ACDC data/acdc
    medseg data plan data/acdc --dim 2 --budget gpu        # then set patch_size to (256, 256) in data/acdc/plan.json
    medseg train configs/wt_bcp_acdc.py --out runs/wt_bcp_acdc
    medseg train configs/wt_bcp_acdc.py --out runs/wt_bcp_acdc3 --labelled patient038 patient050 patient099

From the released scripts: XNet-Plus (112,984,332 parameters), 8 labelled slices a step, mixed into 4, in stage 1 and
8 + 8 in stage 2, 10,000 and 30,000 steps, stage 2 from the best weights of stage 1, SGD with momentum 0.9 and weight
decay 1e-4 at a constant 0.01, teacher 0.99, w = 0.5, alpha = 0.1, beta = 0.9. Otherwise:

* Each axis is mirrored with probability 1/2, and with 1/4 the slice is turned by up to 20 degrees, the image by linear
  interpolation. The script takes a quarter turn (or two, three, none) and a mirroring with probability 1/2, and of the
  others turns every second one by up to 20 degrees, image and label by nearest neighbours.
* Slices keep their pixel size instead of being squeezed to 256 x 256 (the plan's spacing), images are z-scored.
* Momentum is Nesterov's, biases and norms are not decayed, gradients are clipped at norm 12.
* The losses are those of methods/wt_bcp.py as described, not as released (`as_released=True`).
* Stage 2 begins with an optimiser of its own; the ACDC script goes on with that of stage 1.
* Validation is every 500 steps instead of 100, on the 10 patients of val.list, never on test; the papers' ACDC protocol
  is the same (best on validation).

`plan` is named since the data set's own plan is left aside where labels are hidden. It owes these labels nothing: MR is
z-scored image by image.

Compiled, not timed, for one TPU v5e chip with 17.2 GB (December 2026, the steps that `medseg preflight` compiles; 256 x
256, 1 channel). Stage 1 (8 slices) takes 9.4 GB, does 6.1 TFLOP and moves 63 GB a step, hence takes at least 0.08 s.
Stage 2 (8 + 8 slices) fits as well, if barely: 16.7 GB, of which 14.9 are temporaries; 15.5 TFLOP, 145 GB, at least
0.18 s. Both are bound by HBM. The compiler took 20 and 36 minutes, on two CPU cores that were busy with other work.

Expected: the released folder names a best validation Dice of 0.8955. Not run here: it needs an accelerator. Observed at
a size for two CPU cores: configs/few_labels and docs/how-to/few-labels.md.
"""

from dataclasses import replace

from medseg_jax import WTBCP, Augment, Config, Mix, Optim, Stage, WTCopyPaste, XNet

net = XNet()
optim = Optim("sgd", lr=0.01, weight_decay=1e-4, momentum=0.9, schedule="constant", warmup=0)
augment = replace(Augment.none(), p_mirror=0.5, p_rotation=0.25, rotation=20.0)
config = Config(
    data="data/acdc",
    plan="data/acdc/plan.json",
    labelled=("patient021", "patient038", "patient049", "patient050", "patient058", "patient099", "patient100"),
    stages=(
        Stage(WTCopyPaste(net=net), 10_000, optim, Mix(8, foreground=0), augment, name="pretrain"),
        Stage(WTBCP(net=net, ramp=30_000), 30_000, optim, Mix(8, 8, foreground=0), augment, "selftrain", start="best"),
    ),
    validate_every=500,
    log_every=50,
)
