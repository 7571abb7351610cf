"""medseg preflight CONFIG --topology NAME [NAME ...]"""

import json
from pathlib import Path
from typing import Any

from medseg_jax.cli import Parser

EPILOG = """Topologies: v5e-1 ... v5e-256, v6e-8, v5p-64 (Google Cloud's names; v5p counts two cores a chip), v5e-4x4
(chips along each axis), h100x1 ... h100x8, cpu, cpux4. Compilers: pip install 'medseg-jax[preflight-tpu]' or
'medseg-jax[preflight-cuda]'. Fields of the config can be overridden as in medseg train. Nothing is run: the figures are
the compiler's and the roofline is a bound from below. Ctrl-C during the search for a batch shows what is known."""


def main(argv: list[str]) -> int:
    """Know before you rent."""
    parser = Parser(
        "medseg preflight",
        description="Compile the training and prediction steps for hardware that is not here: does it fit, what does a "
        "step move and compute, what binds it, how large may the batch be, what would it cost?",
        epilog=EPILOG,
    )
    parser.add_argument("config", metavar="CONFIG", help="config .py, data set folder, or run folder")
    parser.add_argument("--topology", nargs="+", required=True, metavar="NAME", help="one or more; see below")
    parser.add_argument("--plan-file", metavar="JSON", help="plan to use, of a data set that is not on this disk")
    parser.add_argument("--patch-size", type=int, nargs="+", metavar="N", help="sides of a patch, if there is no plan")
    parser.add_argument("--channels", type=int, metavar="N", help="channels of an image")
    parser.add_argument("--classes", type=int, metavar="N", help="classes, without the background")
    parser.add_argument("--overlapping", action="store_true", help="classes may overlap (one sigmoid each)")
    parser.add_argument("--cases", type=int, metavar="N", help="training cases, for the cost of an epoch")
    parser.add_argument("--batch", type=int, metavar="ROWS", help="rows a step of all chips together")
    parser.add_argument("--no-search", action="store_true", help="neither the largest batch nor what to change")
    parser.add_argument("--compiles", type=int, default=8, metavar="N", help="programs to compile at most for that (8)")
    parser.add_argument("--patience", type=float, default=900, metavar="S", help="seconds for one program (900)")
    parser.add_argument("--price", type=float, metavar="X", help="of one chip for one hour, in any currency")
    parser.add_argument("--picture", metavar="PNG", help="picture of the memory (of each topology)")
    parser.add_argument("--json", action="store_true", help="machine-readable: a list, one entry a topology")
    args, rest = parser.parse_known_args(argv)
    parser.mind(rest)

    from medseg_jax.runtime import chips
    from medseg_jax.training.preflight import preflight

    for name in args.topology:  # before the first one takes its minutes
        chips.require_wheels(chips.parse_topology(name))
    results = []
    for name in args.topology:
        results.append(
            preflight(
                args.config,
                name,
                overrides=rest,
                plan=args.plan_file,
                patch_size=args.patch_size,
                channels=args.channels,
                classes=args.classes,
                overlapping=args.overlapping,
                cases=args.cases,
                batch=args.batch,
                search=not args.no_search,
                compiles=args.compiles,
                patience=args.patience,
                price=args.price,
                picture=_picture(args.picture, name, len(args.topology)),
            )
        )
        if not args.json:
            print("\n".join(table(results[-1])) + "\n")
    if args.json:
        print(json.dumps(results, indent=1))
    return 0 if all(r["fits"] for r in results) else 1


def _picture(path: str | None, topology: str, count: int) -> Path | None:
    if path is None or count == 1:
        return Path(path) if path else None
    return Path(path).with_stem(f"{Path(path).stem}-{topology.replace(':', '-')}")


def table(result: dict[str, Any]) -> list[str]:
    """The result in lines for people."""
    data, capacity = result["data"], result["memory_per_chip"]
    patch = " x ".join(map(str, data["patch_size"]))
    lines = [
        f"{result['config']} on {result['title']}: {verdict(result)}   ({result['label']})",
        f"  patch {patch}, {data['channels']} channel(s), {len(data['classes'])} class(es); {size(capacity)} a chip",
    ]
    lines += [f"  note: {note}" for note in (*data["notes"], *result["notes"])]
    for stage in result["stages"]:
        head = f"stage {stage['stage']}: {sum(stage['rows'])} rows, {stage['rows_per_chip']:g} a chip"
        lines += _part(head, stage, capacity)
    prediction = result["prediction"]
    lines += _part(f"prediction: {prediction['windows']} windows on one chip", prediction, capacity)
    if largest := result["largest"]:
        known = largest["known_to"]
        how = "more would not fit" if known == 0 else "perhaps more" if known is None else f"known to {known:.0%}"
        how += f": the next one {largest['ended']}" if largest["ended"] else ""
        lines.append(
            f"largest batch of {largest['stage']}: {largest['rows_per_chip']:g} rows a chip, {sum(largest['rows'])} "
            f"together, {size(largest['memory'])} ({how}; {largest['compiles']} compiles)"
        )
    for offer in result["suggestions"]:
        fits = {True: "fits", False: "does not fit", None: offer["status"]}[offer["fits"]]
        memory = f", {size(offer['memory'])}" if offer["memory"] else ""
        lines.append(f"try {offer['words']}: {fits}{memory}\n      {offer['how']}")
    lines.append(f"{result['seconds']:.0f} s on this machine; all figures: {result['label']}")
    return lines


def verdict(result: dict[str, Any]) -> str:
    """In words."""
    return {True: "fits", False: "DOES NOT FIT", None: "not known"}[result["fits"]]


def _part(head: str, part: dict[str, Any], capacity: int) -> list[str]:
    lines = [head]
    if part["status"] != "compiled":
        needed = f", it needs {size(part['needed'])}" if part.get("needed") else ""
        first, *rest = part["error"].strip().splitlines() or ["no word of why"]
        said = rest[:4] if part["status"] == "refused" else rest[-4:]  # what was found and what to try; how it ended
        return [*lines, f"  {part['status']}{needed}: {first[:300]}", *(f"    {line[:300]}" for line in said)]
    memory, counts = part["memory"], part["counts"]
    if "parameters" in part:
        lines[0] += f"; {part['objective']}, {part['parameters']:,} parameters, {part['steps']:,} steps"
    pieces = ", ".join(f"{name} {size(memory[name])}" for name in ("arguments", "outputs", "temporaries", "program"))
    share = memory["total"] / capacity
    lines.append(f"  memory a chip   {size(memory['total'])} of {size(capacity)} ({share:.0%}): {pieces}")
    elsewhere = counts["vector_flops"] + counts["kernel_flops"]
    lines.append(
        f"  work a chip     {counts['matmul_flops'] / 1e12:.3g} TFLOP in matrix units, {elsewhere / 1e12:.3g} others, "
        f"{counts['bytes'] / 1e9:.3g} GB moved" + (f", {counts['kernels']:.0f} kernels" if counts["kernels"] else "")
    )
    for kind, found in counts["collectives"].items():
        sent = f"{found['bytes'] / 1e6:.4g} MB a chip, sends {found['wire_bytes'] / 1e6:.4g} MB"
        lines.append(f"  {kind:15s} {found['count']} a step, {sent}")
    if counts["unknown_loops"]:
        lines.append(f"  note: {counts['unknown_loops']} loop(s) of unknown length are counted once")
    if roof := part.get("roofline"):
        pieces = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in roof["seconds"].items())
        lines.append(f"  a step takes    at least {1e3 * roof['step']:.3g} ms, bound by {roof['binds']} (ms: {pieces})")
    if price := part.get("cost"):
        lines.append(f"  it costs        at least {price['epoch']:.3g} an epoch, {price['stage']:.4g} for the stage")
    return lines


def size(n: float) -> str:
    """Bytes in words."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
