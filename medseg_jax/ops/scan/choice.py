"""Which backend `backend="auto"` stands for, and why."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """A backend and the reason for it, in words."""

    backend: str
    why: str


def chosen_backend(
    platform: str | None = None,
    *,
    states: int = 16,
    channels: int = 128,
    dtype: jax.typing.DTypeLike = jnp.float32,
    chunk: int | None = None,
) -> Choice:
    """What `selective_scan(..., backend="auto")` runs when it is lowered for a platform.

    Args:
        platform: "cpu", "tpu", "cuda" ("gpu" means the same) or "rocm"; the default is the one that JAX runs on.
        states: n, the states of one channel.
        channels: d, the channels of one group (on one device).
        dtype: the widest dtype among the inputs.
        chunk: as given to `selective_scan`.

    Returns:
        (backend, why). Which chip it is, is read from the abstract device of the mesh in use, else from the devices of
        this process. The GPU kernel needs a Hopper or Blackwell data-centre chip; where none is seen, nothing is
        assumed and "chunked" is taken: name backend="mosaic_gpu" to compile for a GPU that is elsewhere. The TPU kernel
        needs room in VMEM; where no TPU is seen, one of v5e or newer is assumed: to compile for a v4 that is elsewhere,
        give `selective_scan` chunk=8, or put a mesh with an abstract device "TPU v4" in use.
    """
    platform = {"gpu": "cuda"}.get(platform := platform or jax.default_backend(), platform)
    kernel = {"tpu": "pallas_tpu", "cuda": "mosaic_gpu"}.get(platform)
    if kernel is None:
        return Choice("chunked", f"there is no kernel for {platform}")
    if jnp.dtype(dtype) == jnp.float64:
        return Choice("chunked", f"the states of {kernel} are float32, an input is float64")
    if chunk is not None and chunk % 8:
        return Choice("chunked", f"{kernel} takes chunks of a multiple of 8, not {chunk}")
    if kernel == "pallas_tpu":
        (name, room), chunk = tpu(), chunk or 8
        need = tpu_vmem(states, channels, chunk)
        if need <= room:
            return Choice(kernel, name)
        size = f"{need >> 20} MiB for {states} states, {channels} channels and chunks of {chunk}"
        return Choice("chunked", f"{kernel} would need {size}, and may use {room >> 20} of {name}")
    n = gpu_states(states)
    if not n:
        return Choice("chunked", f"{kernel} takes up to 32 states, not {states}")
    if chunk is not None and chunk * n > 256:
        return Choice("chunked", f"{kernel} has shared memory for chunks of {256 // n}, not {chunk}")
    name, fits = _gpu()
    return Choice(kernel if fits else "chunked", name)


def gpu_states(states: int) -> int:
    """The states that the GPU kernel runs for so many (it sums those of 64 / n steps together), 0 if it cannot."""
    return next((n for n in (8, 16, 32) if n >= states), 0)


def tpu() -> tuple[str, int]:
    """The TPU that the program is for, and the bytes of its VMEM that a kernel may use."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    try:
        kind = (abstract or jax.local_devices(backend="tpu")[0]).device_kind
    except RuntimeError:
        kind = "a TPU (none is visible: v5e or newer)"
    old = re.search(r"\bv[234]\b", kind) is not None
    return kind, (16 if old else 60) * 2**20  # of 16; of 64 on v5p and 7x, more on v5e and v6e


def tpu_vmem(states: int, channels: int, chunk: int) -> int:
    """Bytes that the backward TPU kernel takes for 8 rows of float32: 2 to 7 % above what is reported for a v4."""
    groups = 2 if channels % 128 == 64 else 1  # in a block
    lanes = -(-groups * channels // 128)
    spread = 4 * (3 if groups == 2 else 1) * states  # B, C, and the sums of their gradients
    tiles = 10 * lanes + 4 * -(-groups * 2 * states // 128)  # what is copied in and out, twice
    once = (5 * states + 8) * lanes + 12 * states + 256  # A, the adjoint, gradients of parameters, spilled registers
    return 4096 * (chunk * (spread + states + 5 + tiles) + once)


def tpu_chunk(states: int, channels: int, length: int) -> int:
    """Steps of a grid cell of the TPU kernels: the most that fit, of 16 and more those that divide the length."""
    room = tpu()[1]
    fit = [c for c in (32, 24, 16, 8) if tpu_vmem(states, channels, c) <= room]
    if not fit:
        return 0  # not even 8 fit
    return next((c for c in fit if c > 8 and length % c == 0), min(fit[0], 8 * -(-length // 8)))


def _gpu() -> tuple[str, bool]:
    """The GPU that the program is for, and whether the kernel runs on it."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind = abstract.device_kind
        fits = re.search(r"\b(G?[HB][1-8]00|H20)\b", kind) is not None  # H100, GH200, B200, GB300 ...
        return (kind if fits else f"{kind} is older than Hopper, or no data-centre chip"), fits
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return "no GPU is visible, so its generation is not known", False
    for device in devices:
        capability = getattr(device, "compute_capability", "unknown")
        if str(capability).split(".")[0] not in ("9", "10"):
            return f"{device.device_kind} has compute capability {capability}, the kernel needs 9 or 10", False
    return devices[0].device_kind, True
