"""batchgeneratorsv2 with nnU-Net v2's default 3-D transforms, in two worker processes of one thread each."""

import multiprocessing

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from serve import serve, timed

WORKERS = 2
state = {}


def pipeline(patch):
    """nnU-Net's default for an isotropic patch."""
    gamma = {"gamma": BGContrast((0.7, 1.5)), "synchronize_channels": False, "p_per_channel": 1, "p_retain_stats": 1}
    limit = np.deg2rad(30)
    steps = [
        (0.1, GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True)),
        (0.2, GaussianBlurTransform((0.5, 1.0), False, False, p_per_channel=0.5, benchmark=True)),
        (0.15, MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), False, p_per_channel=1)),
        (0.15, ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, synchronize_channels=False)),
        (0.25, SimulateLowResolutionTransform((0.5, 1), False, True, None, None, p_per_channel=0.5)),
        (0.1, GammaTransform(p_invert_image=1, **gamma)),
        (0.3, GammaTransform(p_invert_image=0, **gamma)),
    ]
    spatial = SpatialTransform(
        patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=0.2,
        rotation=(-limit, limit),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        mode_seg="nearest",
    )
    chance = [RandomTransform(step, apply_probability=p) for p, step in steps]
    return ComposeTransforms([spatial, *chance, MirrorTransform((0, 1, 2))])


def work(task):
    """Augments `count` samples in a worker."""
    sample, patch, count, seed = task
    torch.set_num_threads(1)
    np.random.seed(seed)  # noqa: NPY002 (batchgeneratorsv2 draws from it)
    torch.manual_seed(seed)
    if state.get("patch") != (sample, patch):
        random = np.random.default_rng(0)
        state["patch"] = sample, patch
        state["data"] = (
            torch.from_numpy(random.normal(size=(1, *sample)).astype(np.float32)),
            torch.from_numpy(random.integers(0, 3, (1, *sample)).astype(np.int16)),
        )
        state["pipeline"] = pipeline(patch)
    image, label = state["data"]

    def run():
        for _ in range(count):
            state["pipeline"](image=image.clone(), segmentation=label.clone())

    return timed(run)[1]


pool = multiprocessing.get_context("fork").Pool(WORKERS)


def augment(sample, patch, count, seed):
    """Augments `count` samples of size `sample` to `patch`; returns the seconds."""
    tasks = [(tuple(sample), tuple(patch), count // WORKERS, seed * WORKERS + i) for i in range(WORKERS)]
    cpu = []
    wall, _ = timed(lambda: cpu.extend(pool.map(work, tasks, chunksize=1)))
    return {"seconds": (wall, sum(cpu))}


serve({"augment": augment}, ("batchgeneratorsv2", "torch", "numpy"))
