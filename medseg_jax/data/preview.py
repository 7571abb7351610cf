"""Pictures of cases with the outlines of their labels: what `medseg data preview` and the report draw.

Outlines rather than fills, so that the edge in the image and the edge of the label can be compared. Volumes are shown
as a radiologist sees them: the axial slice with most foreground, front up, the patient's right on the left, each pixel
as wide as its spacing.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from scipy.ndimage import binary_erosion

from medseg_jax.data import geometry as space
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import Case, Labels

# Okabe and Ito's colours, which colour-blind people tell apart, bright ones first as images are dark.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178))
IGNORE_COLOR = (160, 160, 160)


def class_colors(number: int) -> np.ndarray:
    """[number, 3] uint8: a colour for each class, the same everywhere."""
    return np.array([COLORS[i % len(COLORS)] for i in range(number)], np.uint8).reshape(-1, 3)


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Boolean mask [h, w] -> its inner border [h, w]; the edge of the image closes it."""
    mask = np.asarray(mask, bool)
    return mask & np.logical_not(binary_erosion(mask, iterations=width))


def overlay(image: np.ndarray, masks: np.ndarray, colors: Sequence | np.ndarray, width: int = 1) -> np.ndarray:
    """Draws the outline of each mask on an image; where two meet, the later one lies on top.

    Args:
        image: [h, w] or [h, w, 3]; uint8 is shown as it is, anything else is stretched by `window`.
        masks: [n, h, w] boolean.
        colors: [n, 3] of 0 to 255.
        width: of the lines, in pixels.

    Returns:
        [h, w, 3] uint8.
    """
    image = image if image.dtype == np.uint8 else window(image)
    picture = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image.copy()  # [h, w, 3]
    for mask, color in zip(masks, colors, strict=True):
        picture[outline(mask, width)] = color
    return picture


def window(image: np.ndarray) -> np.ndarray:
    """Any intensities -> uint8, from the 0.5 to the 99.5 percentile; voxels that are not finite are black."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    scaled = (np.nan_to_num(image.astype(np.float32), nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def view(
    image: np.ndarray, label: np.ndarray | None, labels: Labels, volume: bool, slice_index: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """The slice of a canonical case that is worth showing, turned as it is shown.

    Args:
        image: [d, h, w, c], axes pointing S, A, R; three channels are shown in colour, else the first one.
        label: [d, h, w] or None.
        labels: its classes.
        volume: False for a picture, which is shown as it is.
        slice_index: the slice; by default that with most foreground, or the middle one.

    Returns:
        image [h, w] or [h, w, 3], masks [classes, h, w] (with the ignored voxels last if there is an ignore label),
        and the index.
    """
    index = slice_index
    if index is None:
        index = busiest_slice(label, labels) if label is not None else image.shape[0] // 2
    flat = image[index] if image.shape[-1] == 3 else image[index, ..., 0]
    count = len(labels.names) + (labels.ignore is not None)
    masks = np.zeros((count, *flat.shape[:2]), bool)
    if label is not None:
        masks[: len(labels.names)] = labels.masks(label[index])
        if labels.ignore is not None:
            masks[-1] = label[index] == labels.ignore
    return (flat[::-1, ::-1], masks[:, ::-1, ::-1], index) if volume else (flat, masks, index)


def busiest_slice(label: np.ndarray, labels: Labels) -> int:
    """Index along d of the slice of label [d, h, w] with most foreground; the middle one if there is none."""
    foreground = (label > 0) & (label != labels.ignore) if labels.ignore is not None else label > 0
    counts = foreground.sum((1, 2))
    return int(counts.argmax()) if counts.any() else len(label) // 2


def scale(image: np.ndarray, masks: np.ndarray, spacing: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Brings image [h, w(, 3)] and masks [n, h, w] to `size` pixels along the longer side, pixels made square.

    A mask keeps every structure when it shrinks, however small: it is set wherever a pixel holds some of it.
    """
    extent = np.array(image.shape[:2]) * spacing
    height, width = np.maximum(1, (extent / extent.max() * size).round()).astype(int)
    picture = image if image.dtype == np.uint8 else window(image)
    shrinks = height < image.shape[0] or width < image.shape[1]
    filter = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    resized = [Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), filter) for mask in masks]
    small = np.array(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BILINEAR))
    return small, np.array([np.asarray(mask) > 0 for mask in resized], bool).reshape(-1, height, width)


def preview(
    dataset: Dataset, out_png: str | Path, cases: Sequence[str] | None = None, n: int = 6, size: int = 360
) -> Path:
    """Writes a contact sheet: cases with outlines, a legend of the classes, and of each case id, split and domain.

    Args:
        dataset: an opened data set.
        out_png: file to write.
        cases: ids to show; by default `n` cases spread evenly over those with labels.
        n: how many.
        size: pixels of the longer side of each picture.
    """
    labelled = [case for case in dataset.cases if case.label is not None] or list(dataset.cases)
    spread = [labelled[i] for i in np.linspace(0, len(labelled) - 1, min(n, len(labelled))).round().astype(int)]
    chosen = [dataset.case(id) for id in cases] if cases else spread
    columns = min(len(chosen), 3 if len(chosen) <= 6 else 4)
    rows = -(-len(chosen) // columns)
    pictures = [case_picture(dataset, case, size) for case in chosen]
    height = max(picture.shape[0] / picture.shape[1] for picture, _ in pictures) * size / 100  # of a row, in inches
    figsize = (columns * size / 100, rows * (min(height, size / 100) + 0.45) + 0.4)
    figure = Figure(figsize, dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for number, (picture, title) in enumerate(pictures):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    names = [*dataset.labels.names, *(["ignored"] if dataset.labels.ignore is not None else [])]
    colors = [*class_colors(len(dataset.labels.names)), IGNORE_COLOR]
    handles = [Patch(color=np.divide(c, 255), label=name) for name, c in zip(names, colors, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6), fontsize=8, frameon=False)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format="png")
    return out_png


def case_picture(dataset: Dataset, case: Case, size: int) -> tuple[np.ndarray, str]:
    """Picture [h, w, 3] uint8 of a case with its outlines, and its title."""
    image, label, geometry = dataset.load(case)
    volume = len(geometry.shape) == 3
    label = space.to_canonical(label, geometry, channels=False) if label is not None else None
    image = space.to_canonical(image, geometry, channels=True)  # [d, h, w, c]
    spacing = space.spacing_canonical(geometry)[1:]
    flat, masks, index = view(image, label, dataset.labels, volume)
    flat, masks = scale(flat, masks, spacing, size)
    colors = [*class_colors(len(dataset.labels.names)), *([IGNORE_COLOR] if dataset.labels.ignore is not None else [])]
    place = f"slice {index + 1} of {image.shape[0]}" if volume else f"{image.shape[1]} x {image.shape[2]}"
    notes = [case.split, case.domain, "" if label is not None else "no label", place]
    return overlay(flat, masks, colors, width=2 if size > 300 else 1), f"{case.id}\n{', '.join(filter(None, notes))}"
