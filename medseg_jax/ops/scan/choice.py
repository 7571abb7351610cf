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
    dtype: jax.typing.DTypeLike = jnp.float32,
    chunk: int | None = None,
) -> Choice:
    """What `selective_scan(..., backend="auto")` runs when it is lowered for a platform.

    Args:
        platform: "cpu", "tpu", "cuda" ("gpu" means the same) or "rocm"; the default is the one that JAX runs on.
        states: n, the states of one channel.
        dtype: the widest dtype among the inputs.
        chunk: as given to `selective_scan`.

    Returns:
        (backend, why). The GPU kernel needs a Hopper or Blackwell data-centre chip. Which GPU it is, is read from the
        abstract device of the mesh in use, else from the GPUs of this process; where there is neither, nothing is
        assumed and "chunked" is taken: name backend="mosaic_gpu" to compile for a GPU that is elsewhere.
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
        return Choice(kernel, "a TPU")
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
