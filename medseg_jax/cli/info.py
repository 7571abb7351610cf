"""medseg info [--json] [--devices]"""

import json

from medseg_jax.cli import Parser


def main(argv: list[str]) -> int:
    """Says what is here."""
    parser = Parser("medseg info", description="Versions, configs, methods and models.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--devices", action="store_true", help="also ask JAX for its devices (slower)")
    args = parser.parse_args(argv)

    from pathlib import Path

    import medseg_jax
    from medseg_jax.paths import cache_home
    from medseg_jax.runtime import environment

    package = Path(medseg_jax.__file__).parent
    info = {
        "version": medseg_jax.__version__,
        "versions": environment.versions(),
        "methods": _modules(package / "methods", leave_out={"objective", "teacher"}),
        "models": _modules(package / "models", leave_out={"network", "blocks", "resnet"}),
        "configs": sorted(str(p.relative_to(package.parent)) for p in (package.parent / "configs").rglob("*.py")),
        "cache": str(cache_home()),
    }
    if args.devices:
        info["devices"] = environment.devices()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    for name, value in info.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "  ".join(value)
        print(f"{name:9s} {value}")
    return 0


def _modules(folder, leave_out: set[str]) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in leave_out | {"__init__"})
