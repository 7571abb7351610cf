"""medseg export RUN --to FORM ... --out DIR [--json]"""

import json
import sys

from medseg_jax.cli import Parser

EPILOG = """stablehlo: one program for CPU, NVIDIA GPU and TPU, any batch size, weights inside; JAX alone runs it.
onnx: for ONNX runtimes. safetensors: named weights; the folder then predicts like a run (medseg predict DIR ...).
Each is read back and compared with the run at batch 1 and 8; DIR/MODEL_CARD.md says what the model is."""


def main(argv: list[str]) -> int:
    """Exports a run."""
    parser = Parser("medseg export", description="Write a run in forms that others can use.", epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--to", nargs="+", default=["stablehlo"], metavar="FORM", help="stablehlo (default), onnx, safetensors"
    )
    parser.add_argument("--out", "-o", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights (default: best)")
    parser.add_argument("--json", action="store_true", help="print files and differences as JSON")
    args = parser.parse_args(argv)

    from medseg_jax.inference.export import export

    found = export(args.run, args.out, args.to, args.checkpoint, progress=lambda text: print(text, file=sys.stderr))
    if args.json:
        print(json.dumps({str(path): values for path, values in found.items()}))
    else:
        print(args.out)
    return 0
