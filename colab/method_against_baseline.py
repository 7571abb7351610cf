# %% [markdown]
# # Is a method better than its baseline?
#
# Articles compare a new method with a baseline. Here you do it yourself, the way it should be done: the same network,
# the same data, the same number of steps, the same seeds; scores on cases that took no part in anything; and a test
# that says whether the difference could be chance.
#
# The question: a network is trained at two hospitals and used at a third one. Does **MixStyle** (it mixes the *style*
# of images, that is mean and spread of the network's features, between samples while training) help on the third one's
# scanner?
#
# Nothing here is rigged, so the answer may be no. That is an answer.

# %%
import os
from pathlib import Path

from IPython.display import Image, display

import medseg_jax as ms

steps = int(os.environ.get("MEDSEG_STEPS", 300))  # fewer: quicker and worse
size = int(os.environ.get("MEDSEG_SIZE", 64))  # pixels along a side
seeds = range(int(os.environ.get("MEDSEG_SEEDS", 3)))

if not Path("versus/data").exists():
    ms.make_phantoms("versus/data", cases=36, sites=3, size=size, seed=0)
data = ms.Dataset.open("versus/data")
print({split: len(data.subset(split)) for split in ("train", "val", "test")}, "| the test site is", data.domains[-1])

# %%
from medseg_jax.data.preview import preview

first = [next(case.id for case in data.cases if case.domain == site) for site in data.domains]
display(Image(preview(data, "versus/sites.png", cases=first)))

# %% [markdown]
# ## 1. Two configs that differ in one word
#
# A config is plain Python: a method is an object, and the network that it trains is another one. `Supervised` is the
# baseline: Dice and cross entropy, as in nnU-Net.

# %%
net = ms.UNet.isotropic(2, 16, 32, 64)
optim = ms.Optim(lr=3e-3, warmup=20)
mix = ms.Mix(balance="domain")  # as many images of each site in a batch, for both
methods = {"baseline": ms.Supervised(net), "mixstyle": ms.MixStyle(net)}


def config(name, seed):
    stage = ms.Stage(methods[name], steps=steps, optim=optim, mix=mix)
    return ms.Config(
        data="versus/data", stages=(stage,), seed=seed, cache="versus/cache", validate_every=max(steps // 3, 1)
    )


# %% [markdown]
# ## 2. Train both, with several seeds
#
# A seed decides where the weights start and in which order images come. One seed can be lucky. Three are the least
# that a table should stand on. These are six short trainings, about one minute each on two processor cores.

# %%
scores = {}
for name in methods:
    for seed in seeds:
        run = ms.train(config(name, seed), f"versus/{name}_{seed}", report=False)
        folder = f"versus/{name}_{seed}/unseen"
        ms.predict(run, data, folder, split="test", checkpoint="last", progress=False)
        scores[name, seed] = ms.evaluate(folder, data, folder)["mean"]
        print(f"{name}, seed {seed}: Dice on the unseen site {scores[name, seed]['dice']:.3f}\n")

# %% [markdown]
# The *last* weights are scored, not those that were best on the test site: choosing on the test cases is the commonest
# way to fool oneself.

# %%
for name in methods:
    dice = [scores[name, seed]["dice"] for seed in seeds]
    print(f"{name:10s} mean Dice {sum(dice) / len(dice):.3f}, seeds from {min(dice):.3f} to {max(dice):.3f}")

# %% [markdown]
# ## 3. Could it be chance?
#
# Each test case was segmented by both, so they are compared case by case. The interval says how large the difference
# may be, the p-value how often chance alone would give one as large. `A` is the baseline, `B` the method, both of the
# first seed.

# %%
a, b = (f"versus/{name}_0/unseen" for name in methods)
found = ms.compare(a, b, "versus/compare")
print(found["verdict"])
display(Image("versus/compare/compare.png"))

# %% [markdown]
# The two need not agree. With six patients the bootstrap interval is too narrow, and may leave out 0 where the test
# does not find a difference; the test tries every assignment of signs, is exact, and decides.
#
# The picture is that of one seed. Hold it against the seeds of section 2: a difference that is smaller than what
# another seed makes is no finding, whatever the p-value of one seed says. And a finding on synthetic pictures is a
# finding about synthetic pictures. The same lines run on [your own data](own_data.ipynb): tell the converter which
# image is of which site and which site is for the test (`domain_from=r"site([A-Z])"`, `test_domain="C"`), and put its
# folder in the place of `versus/data`.
#
# **Try another method** in the place of MixStyle, under a name of its own: `"dsu": ms.DSU(net)`,
# `ms.FourierMixing(net)`, `ms.MambaSea(net)`. Or give the baseline stronger augmentation, `augment=ms.Augment.strong()`
# in its `Stage`, which is often the hardest rival. On real scanners: [what was
# measured](../docs/benchmarks/domain-generalisation.md), and [how to](../docs/how-to/unseen-scanner.md).
