"""medseg train CONFIG --out RUN"""

import dataclasses
from pathlib import Path

from medseg_jax.cli import Parser

EPILOG = """CONFIG is a config .py file, a data set folder (made by medseg data convert: the default U-Net with
its plan), or an older run. Every field of the config can be overridden: --seed 1, --data FOLDER,
--stages.0.optim.lr 3e-4, ... (medseg train CONFIG --fields lists them). The same command started again
resumes where the run stopped. With --fold all, or --fold 0, --fold 1 ... one after the other or side by side, RUN
becomes a cross-validation; once all folds are there, RUN/cross_validation holds their common scores. With --hold-out
DOMAIN, or all, training and selection know nothing of one site, which is scored at the end: RUN/hold_out.md. With
--class all, or --class NAME, each class gets a network of its own, and RUN predicts them together. On several
machines, start the same command on each of them: srun and TPU pods are recognised, else set COORDINATOR_ADDRESS,
NUM_PROCESSES and PROCESS_ID."""


def main(argv: list[str]) -> int:
    """Trains, or resumes."""
    parser = Parser("medseg train", description="Train a model.", epilog=EPILOG)
    parser.add_argument("config", metavar="CONFIG", help="config .py, data set folder, or run folder")
    parser.add_argument("--out", "-o", metavar="RUN", help="folder of the run (default: runs/<name of the config>)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the last stage")
    parser.add_argument(
        "--fold", metavar="K", help="cross-validation: fold K (from 0), or all, in RUN/fold_K; --folds N, 5 by default"
    )
    parser.add_argument(
        "--hold-out", metavar="DOMAIN", help="leave a domain (site, scanner) out and score it; all: each in turn"
    )
    parser.add_argument(
        "--class", dest="name", metavar="NAME", help="a network for this class alone, in RUN/class_NAME; all: for each"
    )
    parser.add_argument(
        "--oracle", action="store_true", help="with --hold-out: also choose weights on the domain itself, to compare"
    )
    parser.add_argument("--fresh", action="store_true", help="throw away what is in RUN and start anew")
    parser.add_argument("--no-report", action="store_true", help="no final scores and report.html")
    parser.add_argument("--fields", action="store_true", help="list all fields of the config that can be overridden")
    args, rest = parser.parse_known_args(argv)
    parser.mind(rest)
    if args.fold is not None and args.fold != "all" and not args.fold.isdigit():
        parser.error(f"--fold must be a number or all, not {args.fold}")
    if sum(way is not None for way in (args.fold, args.hold_out, args.name)) > 1:
        parser.error("--fold, --hold-out and --class each make several runs of one: choose one of them")
    if args.oracle and args.hold_out is None:
        parser.error("--oracle needs --hold-out")

    from medseg_jax import config as configs

    loaded = configs.override(
        configs.load(args.config), ["--help"] if args.fields else rest, f"medseg train {args.config}"
    )
    if args.steps:
        last = dataclasses.replace(loaded.stages[-1], steps=args.steps)
        loaded = dataclasses.replace(loaded, stages=(*loaded.stages[:-1], last))

    from medseg_jax.runtime.distributed import joined
    from medseg_jax.runtime.guards import Interrupted
    from medseg_jax.training.by_class import train_by_class
    from medseg_jax.training.folds import train_folds
    from medseg_jax.training.hold_out import train_hold_out
    from medseg_jax.training.train import train

    out = Path(args.out) if args.out else Path("runs") / Path(args.config).stem
    with joined():
        try:
            if args.hold_out is not None:
                domain = None if args.hold_out == "all" else args.hold_out
                train_hold_out(loaded, out, domain, oracle=args.oracle, fresh=args.fresh, report=not args.no_report)
            elif args.name is not None:
                name = None if args.name == "all" else args.name
                train_by_class(loaded, out, name, fresh=args.fresh, report=not args.no_report)
            elif args.fold is None:
                train(loaded, out, fresh=args.fresh, report=not args.no_report)
            else:
                fold = None if args.fold == "all" else int(args.fold)
                out = train_folds(loaded, out, fold, fresh=args.fresh, report=not args.no_report)
        except Interrupted as stop:
            print(f"medseg train: {stop}")
            return 128 + stop.signal
    print(out)
    return 0
