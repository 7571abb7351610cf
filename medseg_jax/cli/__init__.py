"""The command line: `medseg VERB ...`. Each verb is one small file, imported when it is called.

Exit codes: 0 done; 1 a problem that the message explains; 2 wrong usage; 75 another process of the run was lost: start
all of them again; 130 and 143 stopped by Ctrl-C and SIGTERM, with everything saved.
"""

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
from typing import NoReturn

VERBS = {
    "info": "versions, configs, methods, models; --devices asks JAX what it runs on",
    "demo": "everything once on synthetic data: train, evaluate on an unseen site, predict, report",
    "data": "convert, sources, check, preview, plan, corrupt: from a folder of images to a data set",
    "check": "dry run of a config: shapes, parameters, memory, one batch",
    "preflight": "will it fit, and what will it cost, on a TPU or GPU that you do not have yet?",
    "train": "train a config or a data set folder; started again, it resumes",
    "predict": "segment images with a run",
    "evaluate": "score predictions against references",
    "compare": "is one model better than another? paired test over the same cases",
    "audit": "which training labels are probably wrong, and where (runs of KMSNoise)",
    "verify": "is a run what it says? manifests, weights, data, splits, log, scores",
    "export": "a run as StableHLO, ONNX or safetensors for others, with a model card",
    "report": "one self-contained HTML page of a run",
}

USAGE = """usage: medseg VERB ...

medical image segmentation in JAX: from a folder of images to a trained model, honest scores and predictions

{verbs}

medseg VERB --help says more. First time here? medseg demo
exit codes: 0 done, 1 problem (explained), 2 wrong usage, 75 another process was lost, 130/143 stopped and saved"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
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
    name = f"{verb} {argv[0]}" if verb == "data" and argv else verb
    try:
        from medseg_jax.types import UserError

        return importlib.import_module(f"medseg_jax.cli.{verb}").main(argv)
    except KeyboardInterrupt:  # first, since it may come before UserError is imported
        print(f"medseg {name}: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"medseg {name}: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as error:  # tyro ends the process after --help and after wrong usage
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        explained = UserError.from_os(error, os.getcwd(), "free disk space, or name files and folders that are yours")
        print(f"medseg {name}: {explained}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """An argument parser that knows what was meant."""

    def error(self, message: str) -> NoReturn:
        """Ends with code 2 and, for an unknown flag, the nearest known one."""
        known = [flag for action in self._actions for flag in action.option_strings]
        words = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        near = [match for word in words for match in difflib.get_close_matches(word, known, 1)]
        super().error(message + (f" (did you mean {near[0]}?)" if near and "unrecognized" in message else ""))

    def mind(self, rest: list[str]) -> None:
        """Ends with code 2 if an argument left over for others (fields of a config) is one of ours, misspelt."""
        from medseg_jax.config import Config

        known = [flag for action in self._actions for flag in action.option_strings]
        fields = {f.name for f in dataclasses.fields(Config)}
        for word in rest:
            flag = word.split("=")[0]
            if not word.startswith("--") or flag[2:] in fields:
                continue
            if near := difflib.get_close_matches(flag, known, 1, 0.85):
                super().error(f"unrecognized argument {word} (did you mean {near[0]}?)")
