# %% [markdown]
# # A first model in five minutes
#
# You will train a network that outlines an organ, a lesion and a vessel, look at what it does on images from a scanner
# that it has never seen, and read its scores. The images are synthetic, so there is nothing to download and nobody's
# privacy to mind.
#
# **Never used JAX?** You need not know it here. JAX is the library underneath: it translates the training step into a
# program for your processor, GPU or TPU the first time the step is run. That takes some seconds, then every step is
# fast. In Colab, *Runtime → Change runtime type* gives you a GPU or a TPU; not one line below changes.

# %% [markdown]
# ## 1. Images
#
# Twenty-four pictures from three "sites". Each site sees the same anatomy through another machine: other contrast,
# blur, noise, colour. The third site is set aside for the test.

# %%
import os

from IPython.display import Image, display

import medseg_jax as ms

steps = int(os.environ.get("MEDSEG_STEPS", 300))  # fewer: quicker and worse
size = int(os.environ.get("MEDSEG_SIZE", 64))  # pixels along a side

data = ms.make_phantoms("quick/data", cases=24, sites=3, size=size, seed=0)
print(len(data.cases), "cases, sites", data.domains, "classes", data.labels.names)

# %%
from medseg_jax.data.preview import preview

display(Image(preview(data, "quick/preview.png", n=6)))

# %% [markdown]
# **Look at every data set like this before you train on it.** If outlines do not sit on the structures, no network
# will mend it. The computer looks, too, and lists every problem of every case at once:

# %%
problems = ms.check_dataset(data)
print(problems or "nothing wrong")

# %% [markdown]
# ## 2. A plan
#
# How are images resampled and normalised, how large are the pieces that the network sees, how deep is it? The plan
# answers from the data, with a reason beside each answer. It is a file that you may edit.

# %%
plan = ms.make_plan(data)
plan.save("quick/plan.json")
print("patch", plan.patch_size, "| batch", plan.batch_size, "| channels of the network", plan.features)

# %% [markdown]
# ## 3. Train
#
# A *config* says what is trained on what. Everything that is not said has a default. The line with `ms.train` may be
# run again at any time: if the run is finished, nothing happens; if it was stopped, it goes on where it was, to the
# very same numbers.

# %%
config = ms.Config(data="quick/data", plan="quick/plan.json", stages=(ms.Stage(steps=steps),), cache="quick/cache")
run = ms.train(config, "quick/run")

# %%
display(Image(str(run / "progress.png")))

# %% [markdown]
# The left-hand curve is what the training minimises; the other one is the **Dice** on validation cases, which took no
# part in it: 0 is no overlap with the expert's outline, 1 is complete agreement.

# %% [markdown]
# ## 4. The scanner nobody has seen

# %%
predictions = ms.predict(run, "quick/data", "quick/predictions", split="test")
scores = ms.evaluate("quick/predictions", "quick/data", "quick/scores")
known = ms.evaluate(run / "validation" / "best", "quick/data", "quick/scores_known")
for name, found in (("known sites (validation)", known), ("unseen site (test)", scores)):
    low, high = found["ci95"]["dice"]
    print(f"{name:26s} Dice {found['mean']['dice']:.3f}  ({low:.3f} to {high:.3f}, {found['cases']} cases)")

# %% [markdown]
# The second row is usually lower: the scanner is another one. That drop is what you have to expect in the next
# hospital, and why test images must come from somewhere else. The worst case is the one to look at:

# %%
from dataclasses import replace
from pathlib import Path

worst = data.case(scores["worst"][0])
label = next(Path("quick/predictions").glob(f"{worst.id}.*"))
shown = replace(data, cases=(replace(worst, id="the expert"), replace(worst, id="the network", label=label)))
display(Image(preview(shown, "quick/worst.png")))

# %% [markdown]
# ## 5. Everything on one page
#
# `quick/run/report.html` holds scores with intervals, curves, and all cases, the worst first. In Colab: open the
# folder symbol on the left and download it.
#
# **Next:** [your own data](own_data.ipynb), or [a method against its baseline](method_against_baseline.ipynb). All of
# this works on the command line as well: `medseg train`, `medseg predict`, `medseg evaluate`.

# %%
print("report:", run / "report.html")
