"""The command line: `medseg VERB ...`. Each verb is one small file, imported when it is called.

Exit codes: 0 done; 1 a problem that the message explains; 2 wrong usage; 130 and 143 stopped by Ctrl-C and SIGTERM,
with everything saved.
"""

import difflib
import importlib
import sys

VERBS = {
    "info": "versions, configs, methods, models; --devices asks JAX what it runs on",
    "demo": "everything once on synthetic data: train, evaluate on an unseen site, predict, report",
    "data": "convert, check, plan, preview: from a folder of images to a data set",
    "check": "dry run of a config: shapes, parameters, memory, one batch",
    "train": "train a config or a data set folder; started again, it resumes",
    "predict": "segment images with a run",
    "evaluate": "score predictions against references",
    "compare": "is one model better than another? paired test over the same cases",
    "verify": "is a run what it says? manifests, weights, data, splits, log, scores",
    "report": "one self-contained HTML page of a run",
}

USAGE = """usage: medseg VERB ...

medical image segmentation in JAX: from a folder of images to a trained model, honest scores and predictions

{verbs}

medseg VERB --help says more. First time here? medseg demo
exit codes: 0 done, 1 problem (explained), 2 wrong usage, 130/143 stopped and saved"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {name:9s} {text}" for name, text in VERBS.items())))
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        from medseg_jax import __version__

        print(f"medseg_jax {__version__}")
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, 1)
        print(f"medseg: no verb {argv[0]!r}." + (f" Did you mean {near[0]}?" if near else ""), file=sys.stderr)
        print(f"verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(verb: str, argv: list[str]) -> int:
    from medseg_jax.types import UserError

    try:
        return importlib.import_module(f"medseg_jax.cli.{verb}").main(argv)
    except UserError as error:
        print(f"medseg {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"medseg {verb}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:  # tyro ends the process after --help and after wrong usage
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:
        return 0
