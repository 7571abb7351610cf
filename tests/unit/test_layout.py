"""The order of the rooms, and rules about the source that no linter knows."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "medseg_jax"
ROOMS = [
    *("types", "paths", "ops", "losses", "data", "models", "methods", "config", "weights", "runtime"),
    *("inference", "evaluation", "training", "cli"),
]
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_rooms_above_it(file):
    if room(file) in ("__init__", "cli"):
        return
    names = imported(ast.parse(file.read_text())) - {"medseg_jax.__version__"}
    rooms = {name.split(".")[1] for name in names if name.startswith("medseg_jax.")}
    below = {r for r in rooms if ROOMS.index(r) > ROOMS.index(room(file))}
    assert not below, f"{file.name} imports from {below}, which stand below {room(file)}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_no_forbidden_names(file):
    """pmap is in maintenance; nnx's own transforms cost tens of milliseconds a step; pickles run code."""
    tree = ast.parse(file.read_text())
    used = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not used & {"jax.pmap", "nnx.jit", "nnx.grad", "nnx.Optimizer", "pickle.load", "pickle.loads", "torch.load"}
    assert not {name.split(".")[0] for name in imported(tree)} & {"torch", "cv2", "SimpleITK", "tensorflow", "pickle"}


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
LOADERS = {"load", "loads", "Unpickler", "unsafe_load", "full_load", "load_module", "extractall", "system", "popen"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_nothing_that_runs_code_from_data(file):
    """No eval or exec, no pickle in any disguise, no shell; NumPy never told to unpickle."""
    tree = ast.parse(file.read_text())
    modules = {name.split(".")[0] for name in imported(tree)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else None
        assert name not in RUNS_CODE, f"line {call.lineno}: {name}"
        for word in call.keywords:
            allowed = not (word.arg == "allow_pickle" and getattr(word.value, "value", True) is not False)
            assert allowed, f"line {call.lineno}: allow_pickle"
            assert not (word.arg == "shell" and getattr(word.value, "value", True)), f"line {call.lineno}: shell"
        owner = getattr(getattr(call.func, "value", None), "id", "")
        attribute = getattr(call.func, "attr", "")
        if owner == "np" and attribute == "load":
            said = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            assert said.get("allow_pickle") is False, f"line {call.lineno}: np.load without allow_pickle=False"
        assert not (owner in ("torch", "marshal", "os") and attribute in LOADERS), f"line {call.lineno}"


def test_every_room_is_in_the_list():
    found = {room(f) for f in FILES} - {"__init__"}
    assert found <= set(ROOMS)


def test_the_facade_names_what_exists():
    import medseg_jax

    for name in medseg_jax.__all__:
        assert getattr(medseg_jax, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = medseg_jax.nothing_like_this


def test_importing_the_package_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import medseg_jax, medseg_jax.cli, sys; print([m for m in ('jax', 'numpy', 'tyro') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
