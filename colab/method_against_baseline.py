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

from IPython.display import Image, display

import medseg_jax as ms

steps = int(os.environ.get("MEDSEG_STEPS", 300))  # fewer: quicker and worse
size = int(os.environ.get("MEDSEG_SIZE", 64))  # pixels along a side
seeds = range(int(os.environ.get("MEDSEG_SEEDS", 3)))

data = ms.make_phantoms("versus/data", cases=36, sites=3, size=size, seed=0)
print({split: len(data.subset(split)) for split in ("train", "val", "test")}, "| the test site is", data.domains[-1])

# %%
from medseg_jax.data.preview import preview

first = [next(case.id for case in data.cases if case.domain == site) for site in data.domains]
display(Image(preview(data, "versus/sites.png", cases=first)))

# %% [markdown]
# ## 1. Two configs that differ in one word
#
# A config is plain Python: a method is an object, and the network that it trains is another one. `Supervised` is the
# baseline.

# %%
net = ms.UNet.isotropic(2, 16, 32, 64)
optim = ms.Optim(lr=3e-3, warmup=20)
mix = ms.Mix(balance="domain")  # as many images of each site in a batch, for both
methods = {"baseline": ms.Supervised(net), "mixstyle": ms.MixStyle(net)}


def config(name, seed):
    stage = ms.Stage(methods[name], steps=steps, optim=optim, mix=mix)
    return ms.Config(data="versus/data", stages=(stage,), seed=seed, cache="versus/cache")


# %% [markdown]
# ## 2. Train both, with several seeds
#
# A seed decides where the weights start and in which order images come. One seed can be lucky. Three are the least
# that a table should stand on.

# %%
scores = {}
for name in methods:
    for seed in seeds:
        run = ms.train(config(name, seed), f"versus/{name}_{seed}", report=False)
        folder = f"versus/{name}_{seed}/unseen"
        ms.predict(run, data, folder, split="test", checkpoint="last")
        scores[name, seed] = ms.evaluate(folder, data, folder)["mean"]
        print(f"{name}, seed {seed}: Dice {scores[name, seed]['dice']:.3f}")

# %% [markdown]
# The *last* weights are scored, not those that were best on the test site: choosing on the test cases is the commonest
# way to fool oneself.

# %%
import numpy as np

for name in methods:
    dice = np.array([scores[name, seed]["dice"] for seed in seeds])
    print(f"{name:10s} Dice on the unseen site {dice.mean():.3f}, spread between seeds {dice.std():.3f}")

# %% [markdown]
# ## 3. Could it be chance?
#
# Each test case was segmented by both, so they are compared case by case. The interval says how large the difference
# may be, the p-value how often chance alone would give one as large. `A` is the baseline, `B` the method, both of the
# first seed.

# %%
found = ms.compare("versus/baseline_0/unseen", "versus/mixstyle_0/unseen", "versus/compare")
print(found["verdict"])
display(Image("versus/compare/compare.png"))

# %% [markdown]
# A difference that is smaller than the spread between seeds is no finding, whatever the p-value of one seed says. And
# a finding on synthetic pictures is a finding about synthetic pictures: the same lines run on [your own
# data](own_data.ipynb), with `data=` set to its folder, and sites named in `dataset.json`.
#
# **Try another method** in the same two lines: `ms.DSU(net)`, `ms.FourierMixing(net)`, `ms.MambaSea(net)`; or give the
# baseline stronger augmentation, `ms.Stage(..., augment=ms.Augment.strong())`, often the hardest rival.
