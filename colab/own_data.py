# %% [markdown]
# # Your own images
#
# From a folder of images and masks, in whatever order they lie there, to a trained model and predictions that fit your
# files. Run it once as it is: it makes a small folder that looks like what people have on their disks. Then put your
# own in its place.
#
# Read: NIfTI, DICOM series, NRRD, MetaImage, PNG, JPEG, TIFF, NumPy, HDF5; two folders, one folder a case, one file a
# class, zip archives, and the folders of nnU-Net and the Medical Segmentation Decathlon. 2-D and 3-D.

# %%
import os
from pathlib import Path

from IPython.display import Image, display

import medseg_jax as ms

steps = int(os.environ.get("MEDSEG_STEPS", 300))  # fewer: quicker and worse
size = int(os.environ.get("MEDSEG_SIZE", 64))  # of the pictures that are made here

# %% [markdown]
# ## 1. The folder
#
# **In Colab**, to use your own: copy them to Google Drive, run the two lines below without their `#`, and set `folder`
# to the place. Mind that patient data may have no business on a machine that is not yours.

# %%
# from google.colab import drive
# drive.mount("drive")
folder = Path("own/raw")

# %%
from PIL import Image as Picture

if not folder.exists():
    made = ms.make_phantoms("own/source", cases=20, sites=2, size=size, seed=1)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(made.cases):
        picture, label, _ = made.load(case)
        name = f"patient{number // 2:02d}_{number % 2}.png"  # two pictures a patient
        Picture.fromarray(picture.squeeze().astype("uint8")).save(folder / "images" / name)
        Picture.fromarray(label.squeeze().astype("uint8")).save(folder / "masks" / name)
print(*sorted(str(path) for path in folder.rglob("*.png"))[:4], "...", sep="\n")

# %% [markdown]
# ## 2. Convert
#
# The converter says what it took for what, and stops where two readings are possible rather than guess. Two things it
# cannot know:
#
# * what the numbers in the masks mean (`classes`);
# * which files are of the same patient (`patient_from`, a pattern for the part of the name that says it). **This
#   matters most:** if pictures of one patient land in training *and* validation, your scores will be too good, and
#   wrong.
#
# Your files are left as they are; the result is a new folder in one format, which nnU-Net opens, too.

# %%
if not Path("own/data").exists():
    ms.convert(folder, "own/data", classes="organ=1,lesion=2,vessel=3", patient_from=r"(patient\d+)")
data = ms.Dataset.open("own/data")
print({split: len(data.subset(split)) for split in ("train", "val", "test")}, "classes", data.labels.names)

# %% [markdown]
# ## 3. Look, and let it look

# %%
from medseg_jax.data.preview import preview

display(Image(preview(data, "own/preview.png", n=6)))

# %%
for problem in ms.check_dataset(data):
    print(problem.severity, problem.case, problem.text)

# %% [markdown]
# Errors have to be mended before training; warnings are yours to judge. An empty mask may be right.
#
# ## 4. Train
#
# With nothing said, this is a U-Net whose size follows from your data, trained as nnU-Net does. For real data give it
# thousands of steps, and a GPU. Stopped or disconnected? Run the cell again: it goes on from its last checkpoint.

# %%
config = ms.Config(data="own/data", stages=(ms.Stage(steps=steps),), cache="own/cache")
run = ms.train(config, "own/run")
display(Image(str(run / "progress.png")))

# %% [markdown]
# ## 5. Predict new images
#
# Here the training pictures stand in for new ones, to show how it is called. Each prediction has the size, orientation
# and header of its image, so every viewer shows it in place. Scores count only on images that were **not** trained on:
# those of the validation cases are in the report.

# %%
written = ms.predict(run, folder / "images", "own/predictions")
print(len(written), "predictions, the first:", written[0])

# %%
import json

summary = json.loads((run / "validation" / "best" / "summary.json").read_text())
for name, values in summary["classes"].items():
    print(f"{name:8s} Dice {values['dice']:.3f}")
print("report:", run / "report.html")

# %% [markdown]
# ## What next
#
# * **Is it good enough?** Score it on images of another hospital before you believe it.
# * **Few labels, wrong labels, an unseen scanner?** There is a method and a how-to page for each.
# * **Give it away:** `ms.export(run, "exported", to="safetensors")` writes it with a model card.
#
# This is research software, not a medical device.
