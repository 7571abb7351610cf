# %% [markdown]
# # Your own images
#
# From a folder of images and masks, in whatever order they lie there, to a trained model and predictions that fit your
# files. Run it once as it is: it makes a small folder that looks like what people have on their disks. Then change the
# settings in section 1 to your own folder and run it again.
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
# All that you change for your own images stands here. Two things the files do not say:
#
# * what the numbers in the masks mean (`classes`; for masks that are black and white a name is enough, `"polyp"`; the
#   folders of nnU-Net and the Medical Segmentation Decathlon say it themselves, so leave it out);
# * which files are of the same patient (`patient_from`, a regular expression for the part of the path that says it;
#   without it usual names are understood, and any other image counts as a patient of its own). **This matters most:**
#   if pictures of one patient land in training *and* validation, your scores will be too good, and wrong.
#
# **In Colab**, copy your images to Google Drive, run the two lines below without their `#`, and put `work` on the Drive
# as well: the notebook's own folder is lost when Colab takes its machine back. Mind that patient data may have no
# business on a machine that is not yours.

# %%
# from google.colab import drive
# drive.mount("drive")
folder = Path("own/example")  # yours: Path("drive/MyDrive/my_images")
options = {"classes": "organ=1,lesion=2,vessel=3", "patient_from": r"(patient\d+)"}
new_images = folder / "images"  # to be segmented at the end
work = Path("own/work") / folder.name  # all results; yours: another folder for each set of images

# %%
from PIL import Image as Picture

if folder == Path("own/example") and not folder.exists():
    made = ms.make_phantoms("own/source", cases=20, sites=2, size=size, seed=1)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(made.cases):
        picture, label, _ = made.load(case)
        name = f"patient{number // 2:02d}_{number % 2}.png"  # two pictures a patient
        Picture.fromarray(picture.squeeze().astype("uint8")).save(folder / "images" / name)
        Picture.fromarray(label.squeeze().astype("uint8")).save(folder / "masks" / name)
files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
print(len(files), "files in", folder)
print(*files[:4], "...", sep="\n")

# %% [markdown]
# ## 2. Convert
#
# The converter says what it took for what. Where two readings are possible it does not guess: it stops and lists the
# options to choose from, written as on the command line. Put yours into `options` above: `--instances` is
# `"instances": True`, `--patient-from X` is `"patient_from": "X"`.
#
# Your files are left as they are; the result is a new folder in one format, which nnU-Net opens, too.

# %%
data = ms.convert(folder, work / "data", overwrite=True, **options)
print({split: len(data.subset(split)) for split in ("train", "val", "test")}, "classes", data.labels.names)

# %% [markdown]
# ## 3. Look, and let it look

# %%
from medseg_jax.data.preview import preview

display(Image(preview(data, work / "preview.png", n=6)))

# %%
problems = ms.check_dataset(data)
for problem in problems:
    print(problem.severity, problem.case, problem.text)
print(len(problems), "problems")

# %% [markdown]
# Errors have to be mended before training; warnings are yours to judge. An empty mask may be right.
#
# ## 4. Train
#
# As in nnU-Net, a plan follows from your data, and a U-Net is trained with Dice and cross entropy at several scales and
# a learning rate that decays polynomially; the optimiser is AdamW. Two things are made small so that this runs
# everywhere: the plan's `budget`, and the steps. For real data and a GPU write `budget="gpu"` and `steps=None`, which
# takes the plan's number.
#
# Stopped or disconnected? Run the notebook again: the training goes on from its last checkpoint. With other settings it
# refuses to go on; `ms.train(config, work / "run", fresh=True)` throws the old run away.

# %%
plan = ms.make_plan(data, budget="cpu")
plan.save(work / "plan.json")
for name in ("spacing", "patch_size", "batch_size", "features", "steps"):
    print(f"{name} {getattr(plan, name)}: {plan.reasons[name]}")

# %%
stage = ms.Stage(steps=steps)
config = ms.Config(data=str(work / "data"), plan=str(work / "plan.json"), stages=(stage,), cache=str(work / "cache"))
run = ms.train(config, work / "run")
display(Image(run / "progress.png"))

# %% [markdown]
# The scores of the validation cases, on which the network was not trained. They are those of the *last* weights, before
# post-processing: the best ones were chosen on these cases, which flatters them. The report has all of them.

# %%
import json

summary = json.loads((run / "validation" / "last" / "summary.json").read_text())
for name, values in summary["classes"].items():
    print(f"Dice {values['dice']:.3f} {name}")
print("report:", run / "report.html")

# %% [markdown]
# The worst of these cases. Of a volume, each side shows its slice with most of the structures, which need not be the
# same one; the report shows the same slice of both.

# %%
from dataclasses import replace

worst = data.case(summary["worst"][0])
label = next((run / "validation" / "last").glob(f"{worst.id}.*"))
shown = replace(data, cases=(replace(worst, id="your mask"), replace(worst, id="the network", label=label)))
display(Image(preview(shown, work / "worst.png")))

# %% [markdown]
# ## 5. Predict new images
#
# Here the training pictures stand in for new ones, to show how it is called; they are no measure of how good it is.
# Each prediction has the size, orientation and header of its image, so every viewer shows it in place. Its pixels are
# the numbers of the classes, 1, 2 ... (1, 2, 4 ... and their sums where classes may overlap): a viewer for photographs
# shows it all but black.

# %%
written = ms.predict(run, new_images, work / "predictions")
print(len(written), "predictions, the first:", written[0])

# %% [markdown]
# ## What next
#
# * **Is it good enough?** Score it on images of another hospital before you believe it.
# * **Is it better than another one?** [Compare it](method_against_baseline.ipynb).
# * **[Few labels](../docs/how-to/few-labels.md), [wrong labels](../docs/how-to/wrong-labels.md), [an unseen
#   scanner](../docs/how-to/unseen-scanner.md)?** There is a method for each.
# * **Cross-validation, ensembles, test-time augmentation:** [predict better](../docs/how-to/predict-better.md).
# * **Give it away:** `ms.export(run, work / "exported", to="safetensors")` writes it with a model card.
#
# This is research software, not a medical device.
