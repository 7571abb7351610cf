"""WT-BCP on left atria (LA 2018) with 4 labelled scans (the papers' 5 %), with the papers' numbers.

    medseg data convert --source la2018 LA data/la       # with UA-MT's train.list and test.list in LA/
    medseg data plan data/la --budget gpu                # then set patch_size to (80, 112, 112) in data/la/plan.json
    medseg train configs/wt_bcp_la.py --out runs/wt_bcp_la

From the released scripts: XNet-Plus of width 24 (40,757,622 parameters), patches of 112 x 112 x 80, 4 labelled ones a
step, mixed into 2, in stage 1 and 4 + 4 in stage 2, 4,000 and 15,000 steps, SGD with momentum 0.9 and weight decay
1e-4, a constant rate of 0.01 in stage 1, teacher 0.99, w = 0.5, alpha = 0.2, beta = 0.5, largest component with 26
neighbours. Otherwise as in wt_bcp_acdc.py, and:

* In stage 2 the rate falls smoothly from 0.01. The script divides it by 10 every 250 steps, so that it has all but
  stopped after 750 (BCP's: every 2,500).
* Each axis of the plane is mirrored with probability 1/2, and nothing is turned. The script always takes a quarter turn
  in the plane (or two, three, none) and a mirroring.

Validation is on every fifth scan of train.list (the papers' first labelled scan is one of them, so the first four of
the others are labelled here) and never on test. The papers' protocol chooses the model on the 20 test scans. To repeat
it, convert with `--split train=train.list,val=test.list`; the four labelled scans are then the papers'. Say so beside
the number.

Expected: nothing that could be read (the paper's tables were not at hand). Not run here: it needs an accelerator.
"""

from dataclasses import replace

from medseg_jax import WTBCP, Augment, Config, Mix, Optim, Stage, WTCopyPaste, XNet

net = XNet(remat=True)
optim = Optim("sgd", lr=0.01, weight_decay=1e-4, momentum=0.9, warmup=0)
constant = replace(optim, schedule="constant")
augment = replace(Augment.none(), p_mirror=0.5, mirror_axes=(1, 2))
config = Config(
    data="data/la",
    plan="data/la/plan.json",
    labelled=4,
    stages=(
        Stage(WTCopyPaste(net=net), 4_000, constant, Mix(4, foreground=0), augment, name="pretrain"),
        Stage(WTBCP(net=net, ramp=15_000), 15_000, optim, Mix(4, 4, foreground=0), augment, "selftrain", start="best"),
    ),
    validate_every=500,
    log_every=50,
)
