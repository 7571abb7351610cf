"""Augmentation on the device, inside the jitted training step: key in, batch in, batch out.

Every sample takes the same path, in nnU-Net's order, each step with its own probability:

    resample (rotation, scale, shear, translation, elastic, in one go)  ->  mirror                  image and label
    colour  ->  noise  ->  blur and low resolution  ->  brightness  ->  contrast  ->  gamma          image
    holes (coarse dropout; not nnU-Net's)                                                            image

* The image is interpolated linearly, the label taken from the nearest voxel at the same coordinates; what lies outside
  the sample is 0, the background. Samples come in larger than the patch (`Augment.sample_size`), which keeps most of
  that border out; the patch is the sample's centre.
* Rotation, scale and shear act in millimetres. Where one axis is more than three times as coarse as another (by spacing
  or by the patch's voxels), the geometry stays in the plane across it, as in nnU-Net.
* Row i of the batch depends on the key and on i alone, so the result is the same on any number of devices, and turning
  one step on does not change what the others draw.
* Images leave as float32, whatever comes in, and finite if they came so.

Source: nnU-Net v2's default pipeline (Isensee et al. 2021, supplement 4) for steps, order and ranges.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from medseg_jax.ops.intensity import Image, color_matrix, contrast, gamma, punch, smooth
from medseg_jax.ops.warp import elastic_field, resample, rotation_matrix
from medseg_jax.types import Batch, UserError

ANISOTROPY = 3.0  # nnU-Net's ratio from which an axis is left out of the geometry.
MARGIN = 0.1  # Share of the patch side that a sample holds more on each side, where the geometry may move.

type Label = Int[Array, "*s"]


@dataclass(frozen=True)
class Augment:
    """Which augmentations, how often and how strongly. The defaults are nnU-Net's.

    `p_x` is the probability that a sample undergoes x; 0 leaves x out of the compiled program. A range (low, high) is
    uniform, except for the factors scale, brightness, contrast, saturation and gamma: those lie below 1 half the time.

    Attributes:
        rotation: largest angle in degrees about each axis, 0 to 180. None: 30 in 3-D; in a plane 180, or 15 if the
            patch is more than 1.5 times as long as it is wide.
        scale: factor on the region that is seen; 1.4 shows structures 1.4 times smaller.
        scale_per_axis: an own factor for each axis instead of one.
        shear: degrees, for each pair of axes.
        translation: share of the patch side.
        elastic: largest displacement of a control point, in units of the distance between control points. Up to 0.4
            the cubic B-spline never folds (Choi & Lee 2000).
        elastic_cells: distances between control points along each patch side; the fewer, the smoother.
        p_mirror: for each axis.
        mirror_axes: axes of the patch that may be mirrored, or None for all. () where left and right matter.
        p_channel: share of the channels of a selected sample that blur and low resolution reach.
        noise: standard deviation of the Gaussian noise, in units of the normalised image.
        blur: standard deviation of the Gaussian, in voxels.
        low_resolution: share of the voxels along each axis that is kept before interpolating back.
        brightness: factor for each channel.
        shift: additive brightness for each channel, in units of the normalised image.
        contrast: factor about the channel's mean, clipped to the channel's range.
        gamma: exponent for each channel on its range [0, 1], mean and standard deviation restored. `p_gamma_inverted`
            is the probability of the same on the negative image.
        hue: degrees about the grey axis; three-channel images only, as `saturation`, the factor on the distance from
            grey. One probability, `p_color`, for both.
        holes: fewest and most boxes that are set to 0, the label staying as it is (coarse dropout).
        hole_size: side of a box along each axis, as a share of the patch side.
    """

    p_rotation: float = 0.2
    rotation: float | None = None
    p_scale: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)
    scale_per_axis: bool = False
    p_shear: float = 0.0
    shear: tuple[float, float] = (-10.0, 10.0)
    p_translation: float = 0.0
    translation: tuple[float, float] = (-0.1, 0.1)
    p_elastic: float = 0.0
    elastic: tuple[float, float] = (0.0, 0.25)
    elastic_cells: int = 4
    p_mirror: float = 0.5
    mirror_axes: tuple[int, ...] | None = None
    p_color: float = 0.0
    hue: float = 10.0
    saturation: tuple[float, float] = (0.7, 1.4)
    p_noise: float = 0.1
    noise: tuple[float, float] = (0.0, 0.1)
    p_channel: float = 0.5
    p_blur: float = 0.2
    blur: tuple[float, float] = (0.5, 1.0)
    p_low_resolution: float = 0.25
    low_resolution: tuple[float, float] = (0.5, 1.0)
    p_brightness: float = 0.15
    brightness: tuple[float, float] = (0.75, 1.25)
    p_shift: float = 0.0
    shift: tuple[float, float] = (-0.2, 0.2)
    p_contrast: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)
    p_gamma_inverted: float = 0.1
    p_gamma: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    p_holes: float = 0.0
    holes: tuple[int, int] = (5, 12)
    hole_size: tuple[float, float] = (0.08, 0.19)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.startswith("p_") and not 0 <= value <= 1:
                raise UserError(f"Augment.{f.name} is no probability", found=value, expected="0 to 1")
            if isinstance(value, tuple) and f.name != "mirror_axes" and (len(value) != 2 or value[0] > value[1]):
                raise UserError(f"Augment.{f.name} is no range", found=value, expected="(low, high)")
        for name in ("scale", "saturation", "brightness", "contrast", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= 1 <= high:
                raise UserError(f"Augment.{name} must hold 1", found=(low, high), expected="0 < low <= 1 <= high")
        if self.holes[0] < 0 or self.holes[1] < 1:
            raise UserError("Augment.holes must be numbers of boxes", found=self.holes, expected="(few, most >= 1)")
        low, high = self.low_resolution
        if not 0 < low <= high <= 1:
            raise UserError("Augment.low_resolution is no share", found=(low, high), expected="0 < low <= high <= 1")

    @classmethod
    def none(cls) -> "Augment":
        """The centre crop and nothing else."""
        steps = {f.name: 0.0 for f in fields(cls) if f.name.startswith("p_")}
        return cls(**steps)  # pyright: ignore[reportArgumentType]

    @classmethod
    def light(cls) -> "Augment":
        """Mirroring and intensity, no geometry: needs no larger sample and keeps every label voxel as it is."""
        return cls(p_rotation=0.0, p_scale=0.0)

    @classmethod
    def strong(cls, **fields: Any) -> "Augment":
        """Intensities changed often and widely, so that unseen scanners look familiar; geometry as by default.

        After BigAug (Zhang et al., IEEE TMI 39, 2020): every step with probability one half. The ranges are ours, for
        images of mean 0 and deviation 1. For colour pictures add `p_color=0.5`.
        """
        wide = {
            "p_noise": 0.5,
            "noise": (0.0, 0.3),
            "p_blur": 0.5,
            "blur": (0.25, 1.5),
            "p_channel": 1.0,
            "p_low_resolution": 0.5,
            "p_brightness": 0.5,
            "brightness": (0.6, 1.5),
            "p_shift": 0.5,
            "shift": (-0.5, 0.5),
            "p_contrast": 0.5,
            "contrast": (0.5, 2.0),
            "p_gamma": 0.5,
            "gamma": (0.5, 2.0),
            "p_gamma_inverted": 0.25,
            "hue": 30.0,
            "saturation": (0.5, 1.7),
        }
        return cls(**wide | fields)

    @property
    def moves(self) -> bool:
        """Whether any step resamples."""
        return any((self.p_rotation, self.p_scale, self.p_shear, self.p_translation, self.p_elastic))

    def sample_size(self, patch_size: Sequence[int], spacing: Sequence[float] | None = None) -> tuple[int, ...]:
        """How large a sample `augment` wants for a patch: a tenth of the side more on each side of the axes that move.

        That covers the usual rotations and scales of a structure in the middle at 1.4 (2-D) or 1.7 (3-D) times the
        voxels; the corners of strong rotations still show some background.
        """
        if not self.moves:
            return tuple(patch_size)
        plane = moving_axes(patch_size, spacing)
        return tuple(n + 2 * math.ceil(MARGIN * n) if i in plane else n for i, n in enumerate(patch_size))


def moving_axes(patch_size: Sequence[int], spacing: Sequence[float] | None = None) -> tuple[int, ...]:
    """Axes of the patch that take part in the geometry: all, or the two across the one strongly anisotropic axis."""
    axes = tuple(range(len(patch_size)))
    if len(axes) == 2:
        return axes
    if spacing is not None and max(spacing) > ANISOTROPY * min(spacing):
        through = int(np.argmax(spacing))
    elif max(patch_size) > ANISOTROPY * min(patch_size):
        through = int(np.argmin(patch_size))
    else:
        return axes
    return tuple(i for i in axes if i != through)


def augment(
    key: Array, batch: Batch, config: Augment, patch_size: Sequence[int], spacing: Sequence[float] | None = None
) -> dict[str, Array]:
    """Augment a batch and cut it to the patch.

    Args:
        key: one key for the step.
        batch: "image" [b, *s, c] with or without "label" [b, *s] (integers), and "unlabelled" [bu, *s, c]; either may
            be missing, everything else passes through. *s is at least the patch; see `Augment.sample_size`. "voxel"
            [b, *s] (integers) goes where the label goes.
        config: see `Augment`; static.
        patch_size: *p, two or three sides; static.
        spacing: mm along the patch's axes, None for isotropic; static. Of a longer tuple the last entries count, so
            that a 2-D network takes the three of its plan.

    Returns:
        The batch with image and unlabelled [b, *p, c] float32, label [b, *p] of its own type.

    Raises:
        ValueError: shapes, spacing or label type do not fit.
        UserError: a colour step on images without three channels.
    """
    patch_size = tuple(patch_size)
    spacing = (1.0,) * len(patch_size) if spacing is None else tuple(spacing)[-len(patch_size) :]
    out = dict(batch)
    for stream, (image, label) in enumerate((("image", "label"), ("unlabelled", ""))):
        if image in batch:
            stream_key = jax.random.fold_in(key, stream)
            moving = [name for name in (label, "voxel") if name in out] if label else []
            maps = jnp.stack([out[name] for name in moving], -1) if moving else None  # [b, *s, m]
            out[image], maps = _augment(stream_key, out[image], maps, config, patch_size, spacing)
            if maps is not None:
                out |= {name: maps[..., i].astype(out[name].dtype) for i, name in enumerate(moving)}
            out |= {name: _split_in_space(out[name], patch_size) for name in (image, *moving)}
    return out


def _split_in_space(x: Array, patch_size: tuple[int, ...]) -> Array:
    """x [b, *p, ...], each device keeping its slab of the longest side where the mesh has several for each sample.

    The compiler then splits the network likewise and exchanges halos before convolutions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = dict(mesh.shape).get("spatial", 1)
    if parts == 1:
        return x
    longest = int(np.argmax(patch_size))
    if patch_size[longest] % parts:
        raise UserError(
            "The devices of a sample cannot share its longest side equally",
            found=f"patch {patch_size}, spatial={parts}",
            expected=f"a divisor of {patch_size[longest]}",
        )
    places = jax.P(_row_axes(mesh), *(None,) * longest, "spatial")
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, places))


def _row_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Axes of a mesh that split rows."""
    return tuple(name for name in mesh.axis_names if name != "spatial")


def number_voxels(shape: Sequence[int]) -> Int[Array, "b *s"]:
    """1, 2, 3 ... in every sample of a batch [b, *s]: as "voxel", it tells after `augment` where each came from."""
    numbers = jnp.arange(1, math.prod(shape[1:]) + 1, dtype=jnp.int32)
    return jnp.broadcast_to(numbers.reshape(shape[1:]), shape)


def _augment(key, images, labels, config, patch_size, spacing):
    """One image array [b, *s, c] with its label maps [b, *s, m] or None."""
    _check(images, labels, config, patch_size, spacing)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
    draw = partial(_draw, config=config, channels=images.shape[-1], patch_size=patch_size, spacing=spacing)
    row = partial(_apply, config=config, patch_size=patch_size, spacing=spacing)

    def one_by_one(*rows):
        return jax.lax.map(lambda r: row(*r), rows)

    # Under `map` a step costs nothing for rows that it spares; under `vmap` every row pays for every step, ten times as
    # much on a CPU (4 x 40 x 56 x 40 voxels on 2 cores: 7 ms against 75). Accelerators want the rows side by side.
    def all_rows(*rows):
        return jax.lax.platform_dependent(*rows, cpu=one_by_one, default=jax.vmap(row))

    # Each device augments its own rows: left to itself, the compiler gathers the whole batch on every device, and then
    # trains on all of it there.
    mesh = jax.sharding.get_abstract_mesh()
    axes = _row_axes(mesh)
    if mesh.size > 1 and images.shape[0] % math.prod(mesh.shape[name] for name in axes) == 0:
        rows = jax.P(axes)
        all_rows = jax.shard_map(all_rows, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return all_rows(jax.vmap(draw)(keys), images, labels)


def _check(images, labels, config, patch_size, spacing):
    size = images.shape[1:-1]
    if len(patch_size) not in (2, 3) or len(size) != len(patch_size) or len(spacing) != len(patch_size):
        raise ValueError(f"image {images.shape}, patch {patch_size} and spacing {spacing} differ in dimensions")
    if any(n < p for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"samples of {size} are smaller than the patch {patch_size}")
    if labels is not None and (labels.shape[:-1] != images.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(f"labels {labels.shape[:-1]} {labels.dtype} must be integers of shape {images.shape[:-1]}")
    if config.p_color and images.shape[-1] != 3:
        raise UserError("Colour augmentation needs three channels", found=images.shape[-1], remedy="p_color=0")


# ---------------------------------------------------------------------------------------------------------------------
# Chance: all random numbers of a sample but its noise


def _draw(key: Array, *, config: Augment, channels: int, patch_size: tuple[int, ...], spacing: tuple[float, ...]):
    """What happens to one sample, as a dict of small arrays. Each number hangs on the key and its own name only."""
    c, dim = channels, len(patch_size)
    axes = moving_axes(patch_size, spacing)

    def stream(name):
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    def uniform(name, bounds, shape=()):
        return jax.random.uniform(stream(name), shape, jnp.float32, *bounds)

    def chance(p, shape=()):
        """Whether the step whose probability is the field named `p` is taken."""
        return uniform(p, (0, 1), shape) < getattr(config, p)

    def factor(name, bounds, shape=()):
        """Below 1 half the time and above it otherwise, so that (0.7, 1.4) shrinks as often as it enlarges."""
        u = uniform(name, (-1, 1), shape)
        return 1 + u * jnp.where(u < 0, 1 - bounds[0], bounds[1] - 1)

    draw = {}
    if config.moves:
        draw |= _draw_geometry(uniform, chance, factor, config, axes, patch_size, spacing)
    if config.p_mirror:
        allowed = np.isin(np.arange(dim), range(dim) if config.mirror_axes is None else config.mirror_axes)
        draw["mirror"] = chance("p_mirror", (dim,)) & allowed
    if config.p_color:
        draw["color"] = chance("p_color")
        draw["mixing"] = color_matrix(
            uniform("hue", (-config.hue, config.hue)), factor("saturation", config.saturation)
        )
    if config.p_noise:
        draw["noise"] = chance("p_noise")
        draw["noise_key"], draw["noise_deviation"] = stream("noise"), uniform("noise_deviation", config.noise)
    if config.p_blur or config.p_low_resolution:
        blurred = chance("p_blur") & (uniform("blurred", (0, 1), (c,)) < config.p_channel)
        coarse = chance("p_low_resolution") & (uniform("coarse", (0, 1), (c,)) < config.p_channel)
        draw["smooth"] = blurred.any() | coarse.any()
        draw["blur"] = jnp.where(blurred[:, None], uniform("blur", config.blur, (c, dim)), 0)
        draw["keep"] = jnp.where(coarse, uniform("low_resolution", config.low_resolution, (c,)), 1)
    if config.p_brightness or config.p_shift:
        draw["brightness"] = jnp.where(chance("p_brightness"), factor("brightness", config.brightness, (c,)), 1)
        draw["shift"] = jnp.where(chance("p_shift"), uniform("shift", config.shift, (c,)), 0)
    for name, bounds in (("contrast", config.contrast), ("gamma_inverted", config.gamma), ("gamma", config.gamma)):
        if getattr(config, f"p_{name}"):
            draw[name], draw[f"{name}_factor"] = chance(f"p_{name}"), factor(name, bounds, (c,))
    if config.p_holes:
        few, most = config.holes
        draw["holes"] = chance("p_holes")
        draw["hole_count"] = jax.random.randint(stream("hole_count"), (), few, most + 1)
        draw["hole_side"] = uniform("hole_side", config.hole_size, (most, dim))
        draw["hole_place"] = uniform("hole_place", (0, 1), (most, dim))
    return draw


def _draw_geometry(uniform, chance, factor, config, axes, patch_size, spacing):
    """Where the patch's voxels come from along the n moving axes: matrix [n, n], offset [n], points [n, *grid]."""
    n = len(axes)
    size, mm = np.array(patch_size)[list(axes)], np.array(spacing)[list(axes)]
    extent = size * mm
    taken = {p: chance(p) for p in ("p_rotation", "p_scale", "p_shear", "p_translation", "p_elastic")}
    limit = config.rotation
    if limit is None:
        limit = 30.0 if n == 3 else 180.0 if extent.max() <= 1.5 * extent.min() else 15.0
    angles = jnp.where(taken["p_rotation"], uniform("rotation", (-limit, limit), (1 if n == 2 else 3,)), 0)
    scale = factor("scale", config.scale, (n if config.scale_per_axis else 1,))
    shear = jnp.tan(jnp.deg2rad(uniform("shear", config.shear, (n, n)))) * np.triu(np.ones((n, n)), 1)
    matrix = rotation_matrix(angles) * jnp.where(taken["p_scale"], scale, 1)
    matrix = jnp.matmul(matrix, jnp.eye(n) + jnp.where(taken["p_shear"], shear, 0), precision="highest")
    draw = {"move": jnp.stack(list(taken.values())).any(), "matrix": matrix * mm / mm[:, None]}
    draw["offset"] = jnp.where(taken["p_translation"], uniform("translation", config.translation, (n,)) * size, 0)
    if config.p_elastic:
        largest = jnp.where(taken["p_elastic"], uniform("elastic", config.elastic), 0)
        points = uniform("points", (-1, 1), (n, *(config.elastic_cells + 3,) * n)) * largest
        draw["points"] = points * ((size - 1) / config.elastic_cells).reshape(n, *(1,) * n)
    return draw


# ---------------------------------------------------------------------------------------------------------------------
# One sample


def _apply(draw, image, label, *, config: Augment, patch_size: tuple[int, ...], spacing: tuple[float, ...]):
    """One sample [*s, c], [*s, m] with what was drawn for it -> [*p, c] float32, [*p, m]."""
    axes = moving_axes(patch_size, spacing)
    image = image.astype(jnp.float32)

    def still(image, label):
        return _crop(image, patch_size), None if label is None else _crop(label, patch_size)

    def moved(image, label):
        displacement = elastic_field(draw["points"], [patch_size[i] for i in axes]) if config.p_elastic else None
        return _resample(image, label, draw["matrix"], draw["offset"], displacement, axes, patch_size)

    image, label = jax.lax.cond(draw["move"], moved, still, image, label) if config.moves else still(image, label)
    if config.p_mirror:
        image = _mirror(image, draw["mirror"])
        label = None if label is None else _mirror(label, draw["mirror"])
    return _intensity(draw, image, config, axes), label


def _intensity(draw, image: Image, config: Augment, axes: tuple[int, ...]) -> Image:
    def step(name, change):
        return jax.lax.cond(draw[name], change, lambda image: image, image)

    if config.p_color:
        image = step("color", lambda x: jnp.matmul(x, draw["mixing"].T, precision="highest"))
    if config.p_noise:
        image = step("noise", lambda x: x + draw["noise_deviation"] * jax.random.normal(draw["noise_key"], x.shape))
    if config.p_blur or config.p_low_resolution:
        image = step("smooth", lambda x: smooth(x, draw["blur"], draw["keep"], axes))
    if config.p_brightness or config.p_shift:
        image = image * draw["brightness"] + draw["shift"]
    if config.p_contrast:
        image = step("contrast", lambda x: contrast(x, draw["contrast_factor"]))
    if config.p_gamma_inverted:
        image = step("gamma_inverted", lambda x: -gamma(-x, draw["gamma_inverted_factor"]))
    if config.p_gamma:
        image = step("gamma", lambda x: gamma(x, draw["gamma_factor"]))
    if config.p_holes:
        image = step("holes", lambda x: punch(x, draw["hole_place"], draw["hole_side"], draw["hole_count"]))
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


def _crop(array: Array, size: Sequence[int]) -> Array:
    """[*s, ...] -> its middle [*p, ...]."""
    starts = [(n - p) // 2 for n, p in zip(array.shape, size, strict=False)]
    return array[tuple(slice(start, start + p) for start, p in zip(starts, size, strict=True))]


def _mirror(array: Array, chosen: Bool[Array, " n"]) -> Array:
    for axis in range(chosen.size):
        array = jnp.where(chosen[axis], jnp.flip(array, axis), array)
    return array


def _resample(image, label, matrix, offset, displacement, axes, patch_size):
    """`resample` over the moving axes; the third axis, where it stays, is cropped and rides along as channels."""
    through = next((i for i in range(len(patch_size)) if i not in axes), None)
    if through is None:
        image, label = resample(image, label, matrix, offset, displacement, patch_size)
    else:
        size, depth = tuple(patch_size[i] for i in axes), patch_size[through]

        def fold(array):  # [*s, c] -> [h, w, depth * c]
            start = (array.shape[through] - depth) // 2
            array = jnp.moveaxis(jax.lax.slice_in_dim(array, start, start + depth, axis=through), through, 2)
            return array.reshape(*array.shape[:2], -1)

        def unfold(array):  # [*size, depth * c] -> [*p, c]
            return jnp.moveaxis(array.reshape(*size, depth, -1), 2, through)

        image, label = resample(fold(image), None if label is None else fold(label), matrix, offset, displacement, size)
        image, label = unfold(image), None if label is None else unfold(label)
    return image, label
