"""The selective scan: timed on this CPU beside PyTorch, compiled for TPUs and the H100.

    python benchmarks/scan.py cpu [--peers PYTHON]    times backends; peers with a Python that has torch and mambapy
    python benchmarks/scan.py compile                 needs the libtpu wheel; for the H100 jax-cuda13-plugin, -pjrt
                                                      (both with --no-deps) and nvidia-cuda-nvcc
    python benchmarks/scan.py one TARGET ROWS LENGTH D forward|backward [CHUNK]     one cell, as JSON
    python benchmarks/scan.py table                   prints all of results/scan.json

What is compiled is labelled "compiled, not timed": its figures are the compiler's (bundles of the inner loops, spills)
or counted from the blocks that the kernels move. The compiler's `bytes_accessed` cannot look into a kernel: for TPUs it
is what the kernels declare (each operand once) plus what XLA does around them, with padding and copies inside VMEM.
Floors in bytes: 4 R L (3D + 2N) forward, 4 R L (5D + 4N) backward.
CPU floor: the exponentials exp(delta A) alone, b * L * c * N of them forward, at the rate of XLA's own exp in the same
kind of loop, on one core (XLA runs a loop of small kernels on one).
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from medseg_jax.runtime import chips

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scan.json"
GROUPS, STATES = 4, 16
REVERSE = (False, False, True, True)
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
STAGES = tuple((8, 4096 // 4**i, 192 * 2**i) for i in range(4)) + tuple((6, 9216 // 4**i, 192 * 2**i) for i in range(4))
"""(batch, length, d) of VM-UNet's four stages: Fundus (8 images of 256 x 256), Prostate (6 of 384 x 384)."""


def shapes(b: int, length: int, d: int, shared: bool = True) -> tuple[tuple[int, ...], ...]:
    """u (row-major and column-major sequence, each read in both directions), delta, A, B, C, D, delta_bias."""
    c, k = GROUPS * d, GROUPS
    wide, narrow = (b, length, c), (b, length, k, STATES)
    return ((b, length, c // 2) if shared else wide), wide, (c, STATES), narrow, narrow, (c,), (c,)


def step(backend: Any, what: str, chunk: int | None = None):
    """The scan, or the gradients of the sum of its squares by all seven inputs."""
    import jax

    from medseg_jax.ops.scan import selective_scan

    scan: Any = partial(selective_scan, reverse=REVERSE, backend=backend, chunk=chunk)
    if what == "forward":
        return jax.jit(scan)
    return jax.jit(jax.value_and_grad(lambda *a: (scan(*a) ** 2).sum(), tuple(range(7))))


# ---------------------------------------------------------------------------------------------------------------- CPU


def cpu(peers: str | None, length: int) -> dict:
    """Times in milliseconds, least of several runs; seed 0."""
    import jax
    import jax.numpy as jnp

    b, d = 2, 192
    keys = jax.random.split(jax.random.key(0), 7)
    arrays = [jax.random.normal(key, s) for key, s in zip(keys, shapes(b, length, d), strict=True)]
    arrays[1] -= 4
    arrays[2] = -jnp.exp(0.1 * arrays[2]) * jnp.arange(1.0, STATES + 1)

    @jax.jit
    def exponentials(x):
        return jax.lax.fori_loop(0, length, lambda _, s: jnp.exp(x * s), x)

    floor = _least(exponentials, jnp.full((STATES, b * GROUPS * d), -0.5))
    rows: dict[str, Any] = {}
    for backend in ("chunked", "reference", "associative"):
        row = rows[backend] = {}
        for what in ("forward", "backward"):
            run = step(backend, what).lower(*arrays).compile()
            row[f"{what}_ms"] = _least(run, *arrays, repeats=7 if backend == "chunked" else 2)
            analysis = run.memory_analysis()
            assert analysis is not None
            row[f"{what}_temporary_MB"] = analysis.temp_size_in_bytes / 1e6
        print(backend, row, flush=True)
    short = [x[:, : length // 4] if x.ndim > 2 else x for x in arrays]
    rows[f"chunked, l = {length // 4}"] = {
        f"{what}_ms": _least(step("chunked", what).lower(*short).compile(), *short) for what in ("forward", "backward")
    }
    if peers:
        command = [peers, str(ROOT / "benchmarks" / "peers" / "scan_torch.py"), *map(str, (b, length, d))]
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # spinning ones fight on a busy machine
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads).stdout
        rows |= json.loads(out.splitlines()[-1])
    return {
        "shape": {"b": b, "k": GROUPS, "d": d, "n": STATES, "l": length},
        "exponentials": b * length * GROUPS * d * STATES,
        "floor_one_core_ms": floor,
        "share_of_floor_forward": floor / rows["chunked"]["forward_ms"],
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }


def _least(run, *arrays, repeats: int = 7) -> float:
    import jax

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


# ----------------------------------------------------------------------------------------------------------- compiled


def one(target: str, b: int, length: int, d: int, what: str, chunk: int | None = None) -> dict:
    """Compiles one program and reads the compiler's report. Run in a process of its own (flags are read at import)."""
    if target == "h100":
        return _one_gpu(b, length, d, what, chunk)
    return _one_tpu(target, b, length, d, what, chunk)


def _one_tpu(target: str, b: int, length: int, d: int, what: str, chunk: int | None) -> dict:
    with tempfile.TemporaryDirectory() as dump:
        os.environ |= chips.environment(chips.parse_topology("v5e-4"))  # the same for every TPU
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        import jax
        import jax.numpy as jnp
        from jax.experimental import topologies
        from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

        from medseg_jax.ops.scan.choice import tpu_chunk

        device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices[0]
        place = SingleDeviceSharding(device)
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes(b, length, d)]
        kind = AbstractDevice(device.device_kind, device.num_cores, "tpu")
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):  # what chunk fits depends on it
            program = step("pallas_tpu", what, chunk).lower(*arrays).compile()
            chunk = chunk or tpu_chunk(STATES, d, length)
        bundles = {}
        for kind in ("forward", "backward"):
            for file in Path(dump).glob(f"*selective_scan_{kind}*-final_bundles.txt"):
                if "schedule-analysis" not in file.name:
                    bundles[kind] = inner_loops(file.read_text())
        memory, cost = program.memory_analysis(), program.cost_analysis()
        assert memory is not None
        assert cost is not None
        return {
            "chunk": chunk,
            "bundles_per_step": bundles,
            "temporary_MB": memory.temp_size_in_bytes / 1e6,
            "bytes_accessed_MB": cost["bytes accessed"] / 1e6,
        }


def inner_loops(text: str) -> list[float]:
    """Bundles per step of each innermost loop that steps through time (known by its n exponentials a step,
    several steps unrolled)."""
    bundles: list[list] = []
    for line in text.splitlines():
        if found := re.match(r"\s*0x[0-9a-f]+\s*(?:([A-Z]{2}):|:)\s*(>*)\s*\{(.*)", line):
            bundles.append([found[1] or "", len(found[2]), found[3]])
        elif bundles:
            bundles[-1][2] += line
    loops = []
    for i, (mark, depth, _) in enumerate(bundles):
        if mark == "LB":
            body = [bundles[i]]
            for bundle in bundles[i + 1 :]:
                if bundle[1] < depth or bundle[0] == "LB":
                    break
                body.append(bundle)
            exponentials = sum(len(re.findall(r"= vpow2|= vexp2", text)) for _, _, text in body)
            inner = i + len(body) == len(bundles) or bundles[i + len(body)][1] <= depth
            if inner and exponentials >= 4 * STATES:
                loops.append(len(body) / (exponentials // STATES))
    return loops


def _one_gpu(b: int, length: int, d: int, what: str, chunk: int | None) -> dict:
    h100 = chips.parse_topology("h100")
    os.environ |= chips.environment(h100) | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    import jax
    import jax.numpy as jnp

    from medseg_jax.runtime.sharding import make_mesh, replicated

    place = replicated(make_mesh(devices=chips.devices(h100)[:1]))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes(b, length, d)]
    with tempfile.TemporaryFile("w+") as report:  # ptxas reports through the process's own file descriptors
        kept = [(fd, os.dup(fd)) for fd in (1, 2)]
        for fd, _ in kept:
            os.dup2(report.fileno(), fd)
        try:
            program = step("mosaic_gpu", what, chunk).lower(*arrays).compile()
        finally:
            for fd, copy in kept:
                os.dup2(copy, fd)
        report.seek(0)
        text = report.read()
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", text)],
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
        "stack_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", text)),
        "temporary_MB": memory.temp_size_in_bytes / 1e6,
    }


def traffic(b: int, length: int, d: int) -> dict[str, float]:
    """Bytes that the TPU kernels' blocks move for one differentiated call, over the floor; lane padding included."""
    from medseg_jax.ops.scan.choice import tpu_chunk

    chunk = tpu_chunk(STATES, d, length)
    groups = 1 if d % 128 == 0 else 2
    length = -(-length // chunk) * chunk
    rows = GROUPS * b
    padded = -(-groups * 2 * STATES // 128) * 128 / groups  # lanes of B and C of one group in memory
    boundaries = STATES * d / chunk
    forward = 3 * d + padded + boundaries
    backward = 5 * d + 2 * padded + boundaries
    floors = 3 * d + 2 * STATES, 5 * d + 4 * STATES
    return {
        "floor_forward_MB": 4e-6 * rows * length * floors[0],
        "inference_over_floor": (forward - boundaries) / floors[0],
        "forward_over_floor": forward / floors[0],
        "backward_over_floor": backward / floors[1],
        "backward_and_sum_of_shared_du_over_floor": (backward + 1.5 * d) / floors[1],
    }


def compile_all(targets: list[str]) -> dict:
    """Every target and stage, each in a process of its own; what does not compile is recorded with its message."""
    table: dict[str, Any] = {}
    for target in targets:
        for b, length, d in STAGES:
            command = [sys.executable, __file__, "one", target, *map(str, (b, length, d)), "backward"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            if done.returncode == 0:
                row = json.loads(done.stdout.splitlines()[-1])
            elif found := re.search(r"Used [\d.]+M of [\d.]+M vmem", done.stderr):
                row = {"error": found[0]}
            else:
                row = {"error": done.stderr.strip().splitlines()[-1][:300]}
            table.setdefault(target, {})[f"{b}x{length}x{d}"] = row
            print(target, b, length, d, row, flush=True)
    return table


# -------------------------------------------------------------------------------------------------------------- table


def table(results: dict) -> None:
    """Prints what results/scan.json holds."""
    if found := results.get("cpu"):
        print(f"Timed on a CPU ({found['cores']} cores, load {found['load_before']:.1f}), shape {found['shape']}")
        print(f"  exponentials {found['exponentials']:.3g}, floor (one core) {found['floor_one_core_ms']:.0f} ms;")
        print(f"  chunked forward reaches {100 * found['share_of_floor_forward']:.0f} % of it")
        short = found["shape"]["l"] // 4
        print(
            f"  {'':48}{'fwd ms':>10}{'fwd+bwd ms':>12}{'ratio':>8}{'temp MB':>9}   (ratio: to chunked at the same l)"
        )
        for name, row in found["rows"].items():
            ours = found["rows"][f"chunked, l = {short}" if name.endswith(f"l = {short}") else "chunked"]["backward_ms"]
            memory = row.get("backward_temporary_MB", float("nan"))
            forward = row.get("forward_ms", float("nan"))
            print(f"  {name:48}{forward:10.0f}{row['backward_ms']:12.0f}{row['backward_ms'] / ours:8.1f}{memory:9.0f}")
    print("\nTPU kernels, bytes moved by their blocks over the floor (counted)")
    for b, length, d in STAGES:
        print(f"  {b}x{length}x{d:<6}", {k: round(v, 3) for k, v in traffic(b, length, d).items()})
    print("\nCompiled, not timed")
    for target, rows in results.get("compiled", {}).items():
        for shape, row in rows.items():
            print(f"  {target:6}{shape:12}", json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    timed = verbs.add_parser("cpu")
    timed.add_argument("--peers")
    timed.add_argument("--length", type=int, default=4096)
    compiled = verbs.add_parser("compile")
    compiled.add_argument("targets", nargs="*", default=[*TOPOLOGIES, "h100"])
    cell = verbs.add_parser("one")
    cell.add_argument("target", choices=[*TOPOLOGIES, "h100"])
    for name in ("rows", "length", "d"):
        cell.add_argument(name, type=int)
    cell.add_argument("what", choices=["forward", "backward"])
    cell.add_argument("chunk", type=int, nargs="?")
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "one":
        print(json.dumps(one(*(getattr(options, n) for n in ("target", "rows", "length", "d", "what", "chunk")))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.verb == "cpu":
        results["cpu"] = cpu(options.peers, options.length)
    elif options.verb == "compile":
        results.setdefault("compiled", {}).update(compile_all(options.targets))
    if options.verb != "table":
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table(results)


if __name__ == "__main__":
    main()
