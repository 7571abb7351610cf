"""medseg verify RUN [--predict N] [--json]"""

import argparse
import json


def main(argv: list[str]) -> int:
    """Checks a run or predictions; returns 1 if a claim is false."""
    parser = argparse.ArgumentParser(
        "medseg verify",
        description="Is a run what it says? sha256 of checkpoints, shapes of the weights, the data set, "
        "splits, log, the choice of the best weights, final scores, versions. Exit code 1 if there is a problem.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of predictions")
    parser.add_argument("--predict", type=int, default=0, metavar="N", help="also predict N validation cases again")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)

    from medseg_jax.evaluation.verify import verify

    checks = verify(args.run, predict=args.predict)
    problems = sum(check.state == "problem" for check in checks)
    if args.json:
        print(json.dumps([check.json() for check in checks], indent=1, ensure_ascii=False))
        return int(problems > 0)
    for check in checks:
        print(f"{check.state:8s} {check.name:12s} {check.text}")
        for name, value in (("file", check.file), ("try", check.remedy)):
            if value and check.state != "ok":
                print(f"{'':21s} {name}: {value}")
    warnings = sum(check.state == "warning" for check in checks)
    print(f"{len(checks)} checks, {problems} problems, {warnings} warnings")
    return int(problems > 0)
