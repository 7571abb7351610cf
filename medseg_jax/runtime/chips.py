"""Chips that a program can be compiled for without having them: what they are, and how their topologies are called.

    v5e-1 ... v5e-256, v6e-8        so many chips, in the shape that Google Cloud gives them (v5e-16 = 4x4)
    v5p-64                          as Google Cloud counts: TensorCores, two a chip, so 32 chips (2x4x4)
    v5e-4x4, v5p-2x4x4              the shape itself, in chips
    h100x1 ... h100x8               GPUs of one node
    cpu, cpux4                      this machine, as one device or as four virtual ones

TPUs are compiled for by the `libtpu` wheel; an H100 by jax's CUDA plug-in, from the description of one (`H100`).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from medseg_jax.types import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip; None is what no source was found for.

    Attributes:
        title: its name in words.
        memory: bytes of main memory.
        usable: share of it that a program may use by default.
        flops: matrix FLOP/s by the type of the operands, as JAX computes it by default; "f32 highest" in six passes.
        vector_flops: FLOP/s of elementwise operations.
        bandwidth: bytes/s of main memory.
        link: bytes/s in one direction, of one link (TPU) or of all of them (GPU).
        ring: sides of a TPU slice that close to a ring are multiples of this.
        source: where the figures come from.
    """

    title: str
    memory: float
    usable: float
    flops: dict[str, float]
    vector_flops: float | None
    bandwidth: float
    link: float
    ring: int
    source: str


def _tpu(
    title: str, memory: float, bf16: float, vector: float | None, bandwidth: float, link: float, ring: int, page: str
):
    # A TPU multiplies float32 in one pass of bfloat16, unless it is told otherwise.
    flops = {"bf16": bf16, "f32": bf16, "f32 highest": bf16 / 6}
    source = f"Google Cloud documentation, docs.cloud.google.com/tpu/docs/{page}"
    return Chip(title, memory, 1.0, flops, vector, bandwidth, link, ring, source)


CHIPS = {
    # Vector FLOP/s: 4 units of 8 x 128 lanes for each TensorCore, at the clock that the matrix FLOP/s imply.
    "v5e": _tpu("TPU v5e", 16 * GIB, 197e12, 4 * 1024 * 1.5e9, 819e9, 50e9, 16, "v5e"),
    "v5p": _tpu("TPU v5p", 95 * GIB, 459e12, 2 * 4 * 1024 * 1.75e9, 2765e9, 100e9, 4, "v5p"),
    "v6e": _tpu("TPU v6e", 32 * GIB, 918e12, None, 1638e9, 100e9, 16, "v6e"),
    "h100": Chip(
        "NVIDIA H100 SXM 80 GB",
        84978434048,
        0.75,
        {"bf16": 989e12, "f16": 989e12, "f32": 495e12, "f32 highest": 67e12},
        67e12,
        3352e9,
        450e9,
        1,
        "NVIDIA H100 data sheet, dense figures; float32 products as TF32, as JAX does by default",
    ),
}

SHAPES = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
}
"""Shapes of slices by the number of chips, for TPUs that form a plane or a cube."""

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3" """
"""The target config that XLA compiles for, in its text form."""


@dataclass(frozen=True)
class Topology:
    """Some chips and how they are connected.

    Attributes:
        name: as the user gave it.
        kind: "v5e", "v5p", "v6e", "h100" or "cpu".
        shape: chips along each axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @property
    def platform(self) -> str:
        """ "tpu", "cuda" or "cpu"."""
        return {"h100": "cuda", "cpu": "cpu"}.get(self.kind, "tpu")

    @property
    def chip(self) -> Chip | None:
        """Figures of the chip; None for a CPU, of which nothing is assumed."""
        return CHIPS.get(self.kind)

    @property
    def title(self) -> str:
        chip = self.chip
        shape = f" ({'x'.join(map(str, self.shape))})" if self.platform == "tpu" and self.chips > 1 else ""
        return f"{self.chips} x {chip.title if chip else 'CPU device'}{shape}"

    @property
    def memory(self) -> int:
        """Bytes that a program may use on each chip; of a CPU its share of the machine's memory."""
        if chip := self.chip:
            return int(chip.memory * chip.usable)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.chips

    @property
    def interconnect(self) -> float | None:
        """Bytes/s that each chip can send: all axes of a slice at once, both ways round where they close to a ring."""
        chip = self.chip
        if chip is None or self.chips == 1:
            return None
        if self.platform == "cuda":
            return chip.link
        sides = [n for n in self.shape if n > 1]
        closed = [n % chip.ring == 0 for n in sides]
        if len(self.shape) == 3:  # optical switches close the axes of whole cubes only
            closed = [len(sides) == 3 and all(closed)] * len(sides)
        return chip.link * sum(2 if ring else 1 for ring in closed)


def parse_topology(name: str) -> Topology:
    """The topology of a name (see the module).

    Raises:
        UserError: no such topology.
    """
    text = name.strip().lower()
    if found := re.fullmatch(r"cpu(?:x(\d+))?", text):
        return Topology(text, "cpu", (_count(name, found[1] or "1", range(1, 257)),))
    if found := re.fullmatch(r"h100(?:x(\d+))?", text):
        return Topology(text, "h100", (_count(name, found[1] or "1", range(1, 9)),))
    if found := re.fullmatch(r"(v5e|v5litepod|v5p|v6e)[-:](\d+(?:x\d+)*)", text):
        kind = found[1].replace("v5litepod", "v5e")
        shapes = SHAPES[3 if kind == "v5p" else 2]
        if "x" in found[2]:
            shape = tuple(int(n) for n in found[2].split("x"))
            if shape not in shapes.values():
                raise _unknown(name, ", ".join("x".join(map(str, s)) for s in shapes.values()))
            return Topology(text, kind, shape)
        per_chip = 2 if kind == "v5p" else 1
        return Topology(text, kind, shapes[_count(name, found[2], [n * per_chip for n in shapes]) // per_chip])
    raise _unknown(
        name, "v5e-1 ... v5e-256, v5p-8 ... v5p-512, v6e-1 ... v6e-256, v5e-4x4, h100x1 ... h100x8, cpu, cpux4"
    )


def _count(name: str, text: str, known: Sequence[int]) -> int:
    if int(text) not in known:
        raise _unknown(name, f"{known[0]} to {known[-1]}" if isinstance(known, range) else ", ".join(map(str, known)))
    return int(text)


def _unknown(name: str, expected: str) -> UserError:
    return UserError("There is no such topology", found=name, expected=expected)


# ----------------------------------------------------------------------------------------------------------- compiling

WHEELS = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "nvidia")}
"""Modules that compiling for a platform needs."""


def require_wheels(topology: Topology) -> None:
    """Raises a UserError that gives the one command if the compiler of a platform is not installed."""
    missing = [module for module in WHEELS.get(topology.platform, ()) if find_spec(module) is None]
    if not missing and topology.platform == "cuda" and not (cuda_folder() / "bin" / "ptxas").exists():
        missing = ["nvidia-cuda-nvcc (ptxas)"]
    if missing:
        raise UserError(
            f"The compiler for {topology.title} is not installed",
            found=f"no {', '.join(missing)}",
            remedy=f"pip install 'medseg-jax[preflight-{topology.platform}]'",
        )


def cuda_folder() -> Path:
    """Where the CUDA wheels keep their programs."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(p) / "cu13" for p in places if (Path(p) / "cu13").is_dir()), Path(places[0] if places else "."))


def environment(topology: Topology) -> dict[str, str]:
    """Variables of a process that compiles for a topology; they must be set before JAX is imported."""
    if topology.platform == "tpu":
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so that several may compile at once
        }
    if topology.platform == "cuda":
        cuda = cuda_folder()
        return {
            "JAX_PLATFORMS": "cpu",
            "PATH": f"{cuda / 'bin'}:{os.environ.get('PATH', '')}",
            "CUDA_ROOT": str(cuda),
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda}",
        }
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.chips}"}


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, in a process that has the topology's `environment`."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.chips]
    if topology.platform == "tpu":
        shape = "x".join(map(str, topology.shape))
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.kind}:{shape}").devices
    nodes = f"1x1x{topology.chips}"
    found = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology=nodes)
    return found.devices
