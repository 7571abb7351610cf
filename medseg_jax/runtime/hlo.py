"""What a compiled program does, counted in its optimised HLO: FLOPs, bytes of main memory, collectives.

XLA's own cost analysis is not enough: it counts the body of a loop once, is not there for GPUs, and counts operands in
a TPU's fast memory (VMEM) as traffic. Here every instruction counts as often as its loops repeat it:

    matmul FLOPs    2 x multiply-adds of dots and convolutions, cuDNN's and cuBLAS's included; places where a kernel
                    meets padding or the holes of a dilated image are left out, but not of cuDNN's
    vector FLOPs    one for each number that an elementwise operation makes or a reduction takes in
    kernel FLOPs    what a hand-written kernel declares as its cost
    bytes           operands and results of what runs on its own (a fusion, a copy, a kernel), each once; what a fusion
                    slices out of an operand counts as the slice; what lies in a TPU's VMEM does not count
    collectives     by kind: how many, the bytes of one device's operands, and the bytes that it sends in a ring: twice
                    the operands for an all-reduce of many, (n - 1) / n of them or of the result for the others

A loop whose repetitions the compiler does not know counts once, and is said to (`unknown_loops`). Of a conditional the
dearest branch counts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

FREE = """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota opt-barrier domain
add-dependency while call conditional async-start async-update async-done get-dimension-size"""
FREE = frozenset(FREE.split())
"""Opcodes that move nothing themselves; what they call is counted on its own."""

ELEMENTWISE = """add subtract multiply divide maximum minimum power remainder abs negate sign floor ceil sqrt rsqrt cbrt
round-nearest-even round-nearest-afz exponential exponential-minus-one log log-plus-one logistic tanh tan sine cosine
atan2 erf compare select clamp and or xor not shift-left shift-right-logical shift-right-arithmetic"""
ELEMENTWISE = frozenset(ELEMENTWISE.split())

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
BITS |= {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}

ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
CALLED = re.compile(
    r"(calls|condition|body|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Shape:
    """One array of a type: its numbers, and whether it lies in main memory."""

    dtype: str
    sizes: tuple[int, ...]
    main_memory: bool

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return self.elements * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations it calls, by attribute."""
        found = CALLED.findall(self.attributes)
        return {key: tuple(n.strip().lstrip("%") for n in names.strip("{}").split(",")) for key, names in found}


@dataclass
class Counts:
    """What a computation does, once."""

    matmul_flops: float = 0.0
    vector_flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    unknown_loops: int = 0
    matmul_by_dtype: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, list[float]] = field(default_factory=dict)
    """kind -> [how many, bytes of operands, bytes sent]"""

    def add(self, other: "Counts", times: float = 1.0) -> None:
        """Adds so many repetitions of another count."""
        for name in ("matmul_flops", "vector_flops", "kernel_flops", "bytes", "kernels"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops
        for dtype, flops in other.matmul_by_dtype.items():
            self.matmul_by_dtype[dtype] = self.matmul_by_dtype.get(dtype, 0.0) + times * flops
        for kind, new in other.collectives.items():
            old = self.collectives.get(kind, [0.0] * 3)
            self.collectives[kind] = [a + times * b for a, b in zip(old, new, strict=True)]


def count(text: str, devices: int = 1) -> Counts:
    """Counts one run of a program, on one device.

    Args:
        text: optimised HLO, as `compiled.as_text()` gives it.
        devices: how many run it, for collectives that name no groups.
    """
    return _Program(text, devices).total()


# ------------------------------------------------------------------------------------------------------------- reading


class _Program:
    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._memo: dict[tuple[str, bool], Counts] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] not in ("", " ", "}") and (found := COMPUTATION.match(line)):
                current = self.computations.setdefault(found[2], {})
                if found[1]:
                    self.entry = found[2]
            elif (found := INSTRUCTION.match(line)) and (parsed := _instruction(found, line[found.end() :])):
                current[parsed.name] = parsed

    def total(self) -> Counts:
        return self._count(self.entry, fused=False)

    def _count(self, name: str, fused: bool) -> Counts:
        """Of one computation with all that it calls; inside a fusion nothing moves to or from main memory."""
        if (name, fused) not in self._memo:
            total = Counts()
            table = self.computations.get(name, {})
            for instruction in table.values():
                self._add(total, instruction, table, fused)
            self._memo[name, fused] = total
        return self._memo[name, fused]

    def _add(self, total: Counts, one: Instruction, table: dict[str, Instruction], fused: bool) -> None:
        operands = [table[name] for name in one.operands if name in table]
        base = one.opcode.removesuffix("-start")
        if base in COLLECTIVES:
            size = float(sum(s.bytes for o in operands for s in o.shapes))
            sent = size * _ring(base, _group(one.attributes, self.devices))
            total.add(Counts(collectives={base: [1.0, size, sent]}))
        elif one.opcode == "while":
            trips = self._trips(one)
            total.unknown_loops += trips is None
            total.add(self._count(one.called["body"][0], fused), 1 if trips is None else trips)
        elif one.opcode == "conditional":
            branches = [self._count(n, fused) for names in one.called.values() for n in names]
            total.add(max(branches, key=lambda c: c.matmul_flops + c.vector_flops + c.bytes))
        elif one.opcode in ("call", "async-start", "fusion"):
            for name in one.called.get("calls", one.called.get("to_apply", ())):
                total.add(self._count(name, fused or one.opcode == "fusion"))
        elif one.opcode in ("dot", "convolution", "custom-call"):
            flops, kind = _matmul_flops(one, operands)
            if flops:
                total.add(Counts(matmul_flops=flops, matmul_by_dtype={kind: flops}))
            elif one.opcode == "custom-call" and _is_kernel(one):
                total.kernels += 1
                declared = re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.attributes)
                total.kernel_flops += int(declared[1]) if declared else 0
        elif one.opcode in ELEMENTWISE:
            total.vector_flops += sum(s.elements for s in one.shapes)
        elif one.opcode in ("reduce", "reduce-window"):
            total.vector_flops += sum(s.elements for o in operands[: len(operands) // 2] for s in o.shapes)
        if not fused and one.opcode not in FREE and not one.opcode.endswith("-done"):
            total.bytes += self._bytes(one, operands)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: as the compiler notes it, else n of a condition `i < n` (JAX's loops start at 0)."""
        if noted := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(noted[1])
        table = self.computations.get(loop.called["condition"][0], {})
        root = next((i for i in table.values() if i.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = table.get(root.operands[1])
        return int(limit.operands[0]) if limit is not None and limit.opcode == "constant" else None

    # ------------------------------------------------------------------------------------------------------- bytes

    def _bytes(self, one: Instruction, operands: list[Instruction]) -> int:
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main(one.shapes)
        if one.opcode in ("dynamic-slice-start", "slice-start"):  # ((operands), slice, context), mostly into VMEM
            part = one.shapes[-2:-1]
            return sum(s.bytes for s in part) * operands[0].shapes[0].main_memory + _main(part)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _main(operands[1].shapes if len(operands) > 1 else one.shapes)
        if one.opcode.endswith("-start"):
            written = one.shapes[1:2] if one.opcode.startswith(("all-gather", "collective")) else one.shapes[:1]
            return sum(_main(o.shapes) for o in operands) + _main(written)
        if one.opcode != "fusion":
            return sum(_main(o.shapes) for o in operands) + _main(one.shapes)
        inside = self.computations.get(one.called.get("calls", ("",))[0], {})
        return self._read(inside, operands) + self._written(inside, one)

    def _read(self, inside: dict[str, Instruction], operands: list[Instruction]) -> int:
        """Of a fusion's operands; one that is only sliced counts as its slices, one that is only updated not at all."""
        total = 0
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            number = int(parameter.operands[0]) if parameter.operands else 0
            if number >= len(operands):
                continue
            uses = list(_users(inside, parameter.name))
            slices = [i for i in uses if i.opcode in ("dynamic-slice", "slice", "gather")]
            updated = [i for i in uses if i.opcode == "dynamic-update-slice"]
            if uses and len(slices) + len(updated) == len(uses) and _main(operands[number].shapes):
                total += sum(s.bytes for i in slices for s in i.shapes)
            else:
                total += _main(operands[number].shapes)
        return total

    def _written(self, inside: dict[str, Instruction], one: Instruction) -> int:
        """Of a fusion's results; an array that is updated in place counts as the update."""
        roots = [i for i in inside.values() if i.root]
        if roots and roots[0].opcode == "tuple":
            roots = [inside[name] for name in roots[0].operands if name in inside]
        total = 0
        for root, shape in zip(roots, one.shapes, strict=False):
            while root.opcode in ("bitcast", "copy") and root.operands and root.operands[0] in inside:
                root = inside[root.operands[0]]
            if root.opcode == "dynamic-update-slice" and root.operands[1] in inside:
                total += shape.main_memory * sum(s.bytes for s in inside[root.operands[1]].shapes)
            else:
                total += _main((shape,))
        return total


def _users(table: dict[str, Instruction], name: str) -> Iterator[Instruction]:
    """Who uses a value, seen through bitcasts."""
    for instruction in table.values():
        if name in instruction.operands:
            if instruction.opcode == "bitcast":
                yield from _users(table, instruction.name)
            else:
                yield instruction


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(s.bytes for s in shapes if s.main_memory)


def _instruction(found: re.Match, rest: str) -> Instruction | None:
    """`TYPE opcode(operands), attributes`"""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    literal = opcode in ("parameter", "constant")
    operands = (inside,) if literal else tuple(n.lstrip("%") for n in re.findall(r"%[\w.\-]+", inside))
    return Instruction(found[2], opcode, _shapes(kind), operands, rest[end + 1 :], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _shapes(kind: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            dtype, tuple(int(re.sub(r"\D", "", n)) for n in sizes.split(",") if n), not re.search(r"S\([1-9]", layout)
        )
        for dtype, sizes, layout in ARRAY.findall(kind)
        if dtype in BITS or dtype.startswith("f8")
    )


# ----------------------------------------------------------------------------------------------------------- arithmetic


def _group(attributes: str, devices: int) -> int:
    """How many devices take part in a collective, by the largest of its groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups, size]<=[...]
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):  # axes of a mesh, by name
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return prod(sizes.get(name, 1) for name in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes):
        return max(len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    return devices


def _ring(kind: str, n: int) -> float:
    """Bytes that each of n devices sends for a byte of its operands."""
    if kind == "collective-permute":
        return 1.0
    return {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0}.get(kind, (n - 1) / n)


def _is_kernel(one: Instruction) -> bool:
    return any(name in one.attributes for name in ("tpu_custom_call", "mosaic_gpu"))


def _matmul_flops(one: Instruction, operands: list[Instruction]) -> tuple[float, str]:
    """(FLOPs, dtype of the operands) of a dot or a convolution, whoever computes it; 0 for other calls."""
    if len(operands) < 2 or not operands[0].shapes or not operands[1].shapes or not one.shapes:
        return 0.0, ""
    left, right, result = operands[0].shapes[0], operands[1].shapes[0], one.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    contracting = re.search(r"lhs_contracting_dims\"?[=:][{\[]([\d,\"]*)", one.attributes)
    dtype = left.dtype + (" highest" if "operand_precision={highest" in one.attributes else "")
    if one.opcode == "convolution" and labels:
        return _convolution_flops(one, left, right, result, labels), dtype
    if labels and "conv" in one.attributes:  # cuDNN's three convolutions: image x kernel -> output, in some order
        backward_filter, backward_input = "BackwardFilter" in one.attributes, "BackwardInput" in one.attributes
        kernel, output = (result, right) if backward_filter else (right, left if backward_input else result)
        return 2.0 * output.elements * kernel.elements / kernel.sizes[labels[2].index("o")], dtype
    if contracting:
        sizes = [left.sizes[int(i)] for i in contracting[1].replace('"', "").split(",") if i]
        return 2.0 * result.elements * prod(sizes), dtype
    return 0.0, ""


def _convolution_flops(one: Instruction, image: Shape, kernel: Shape, output: Shape, labels: re.Match) -> float:
    """2 x multiply-adds whose image position exists: neither padding nor a hole that dilation made."""
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    dims = [i for i in range(10) if str(i) in labels[1]]

    def each(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * len(dims)

    pads, strides = each("pad", "0_0"), each("stride", "1")
    holes, dilations = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    total = 2.0
    for n, dim in enumerate(dims):
        sides = [
            s.sizes[text.index(str(dim))] for s, text in zip((image, kernel, output), labels.groups(), strict=True)
        ]
        low = int(pads[n].split("_")[0])
        place = np.arange(sides[2])[:, None] * int(strides[n]) + np.arange(sides[1]) * int(dilations[n]) - low
        hole = int(holes[n])
        total *= int(((place >= 0) & (place <= (sides[0] - 1) * hole) & (place % hole == 0)).sum())
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch = image.sizes[labels[1].index("b")] / (int(groups[1]) if groups else 1)
    return total * batch * kernel.sizes[labels[2].index("i")] * kernel.sizes[labels[2].index("o")]
