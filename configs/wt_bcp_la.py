"""WT-BCP on left atria (LA 2018) with 4 labelled scans (the papers' 5 %), with the papers' numbers.

    medseg data convert --source la2018 LA data/la       # with UA-MT's train.list and test.list in LA/
    medseg data plan data/la --budget gpu                # then set patch_size to (80, 112, 112) in data/la/plan.json
    medseg train configs/wt_bcp_la.py --out runs/wt_bcp_la

From the released scripts: XNet-Plus of width 24 (40,757,622 parameters), patches of 112 x 112 x 80, batches of 4 + 4,
4,000 and 15,000 steps, SGD with momentum 0.9 and weight decay 1e-4, teacher 0.99, w = 0.5, alpha = 0.2, beta = 0.5,
largest component with 26 neighbours. The rate falls smoothly from 0.01 (the script divides it by 10 every 250 steps and
has all but stopped after 750; BCP's has 2,500). Otherwise as in wt_bcp_acdc.py.

Validation is on every fifth scan of train.list (the papers' first labelled scan is one of them, so the first four of
the others are labelled here) and never on test. The papers' protocol chooses the model on the 20 test
scans: to repeat it, set the split of these cases to "val" in a copy of dataset.json, and say so beside the number.

Expected: nothing that could be read (the paper's tables were not at hand). Not run here: it needs an accelerator.
"""

from dataclasses import replace

from medseg_jax import WTBCP, Augment, Config, Mix, Optim, Stage, WTCopyPaste, XNet

net = XNet(remat=True)
optim = Optim("sgd", lr=0.01, weight_decay=1e-4, momentum=0.9, warmup=0)
augment = replace(Augment.none(), p_mirror=0.5)
config = Config(
    data="data/la",
    labelled=4,
    stages=(
        Stage(WTCopyPaste(net=net), 4_000, optim, Mix(8, foreground=0), augment, name="pretrain"),
        Stage(WTBCP(net=net, ramp=15_000), 15_000, optim, Mix(4, 4, foreground=0), augment, "selftrain", start="best"),
    ),
    validate_every=500,
    log_every=50,
)
