# %% [markdown]
# # A first model in five minutes
#
# You will train a network that outlines an organ, a lesion and a vessel, look at what it does on images from a scanner
# that it has never seen, and read its scores. The images are synthetic, so there is nothing to download and nobody's
# privacy to mind.
#
# **Never used JAX?** You need not know it here. JAX is the library underneath: it translates the training step into a
# program for your processor, GPU or TPU the first time the step is run. That takes seconds to minutes, then every step
# is fast. In Colab, *Runtime → Change runtime type* gives you a GPU or a TPU; not one line below changes.

# %% [markdown]
# ## 1. Images
#
# Twenty-four pictures from three "sites". Each site sees the same anatomy through another machine: other contrast,
# blur, noise, colour. The third site is set aside for the test.

# %%
import os
from pathlib import Path

from IPython.display import Image, display

import medseg_jax as ms

steps = int(os.environ.get("MEDSEG_STEPS", 300))  # fewer: quicker and worse
size = int(os.environ.get("MEDSEG_SIZE", 64))  # pixels along a side

if not Path("quick/data").exists():
    ms.make_phantoms("quick/data", cases=24, sites=3, size=size, seed=0)
data = ms.Dataset.open("quick/data")
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
# answers from the data, with a reason beside each answer. It is a file that you may edit. By default it is meant for
# a few processor cores; `ms.make_plan(data, budget="gpu")` gives a network of nnU-Net's width and its number of steps.

# %%
plan = ms.make_plan(data)
plan.save("quick/plan.json")
for name in ("patch_size", "batch_size", "features", "steps"):
    print(f"{name} {getattr(plan, name)}: {plan.reasons[name]}")

# %% [markdown]
# ## 3. Train
#
# A *config* says what is trained on what. Everything that is not said has a default. Pictures as simple as these need
# far fewer steps than the plan has.
#
# The line with `ms.train` may be run again at any time: if the run is finished, it is only scored again; if it was
# stopped, it goes on where it was, to the very same numbers. With other settings it refuses to go on: give it another
# folder, or add `fresh=True` to throw the old run away. At its end it predicts the validation cases with the last
# weights and with the best ones, and finds out for each class whether post-processing helps, such as keeping the
# largest component.

# %%
config = ms.Config(data="quick/data", plan="quick/plan.json", stages=(ms.Stage(steps=steps),), cache="quick/cache")
run = ms.train(config, "quick/run")

# %%
display(Image(str(run / "progress.png")))

# %% [markdown]
# The left-hand curve is what the training minimises; the other ones are the **Dice** on validation cases, on which the
# network was not trained: 0 is no overlap with the true outline, 1 is complete agreement.

# %% [markdown]
# ## 4. The scanner nobody has seen
#
# The same network predicts the validation cases, which are of the sites it knows, and the test cases.

# %%
for split, sites in (("val", "known sites"), ("test", "unseen site")):
    ms.predict(run, data, f"quick/predictions_{split}", split=split, progress=False)
    scores = ms.evaluate(f"quick/predictions_{split}", data, f"quick/scores_{split}")
    low, high = scores["ci95"]["dice"]
    print(f"{sites}: Dice {scores['mean']['dice']:.3f}  (95 %: {low:.3f} to {high:.3f}, {scores['cases']} cases)")

# %% [markdown]
# The second row is usually lower: the scanner is another one. Expect a drop in the next hospital, too; that is why test
# images must come from somewhere else. The first row even flatters a little, for the best weights and the
# post-processing were chosen on those very cases.
#
# Of the test cases, the worst one is the one to look at:

# %%
from dataclasses import replace

worst = data.case(scores["worst"][0])
label = next(Path("quick/predictions_test").glob(f"{worst.id}.*"))
shown = replace(data, cases=(replace(worst, id="the truth"), replace(worst, id="the network", label=label)))
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
