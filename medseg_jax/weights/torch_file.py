"""Reads tensors out of a PyTorch checkpoint (.pth, .pt, .bin) without PyTorch and without running anything in it.

A checkpoint is a pickle: a small program for a stack machine, whose instructions may call any function of any package.
`_run` is that machine with the calls taken out: a name stays a name, the few that build tensors are known by heart, and
every other call gives an inert `Opaque`. Optimiser states, configs and argument lists in the file do no harm that way.

Both containers are read: the zip of PyTorch >= 1.6 (data.pkl and one file a storage) and the older stream (a magic
number, then pickles, then raw storages).
"""

import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from medseg_jax.types import UserError

MAGIC = 0x1950A86A20F9469CFC6C
"""First number of the older container."""

DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        *(("Double", np.float64), ("Float", np.float32), ("Half", np.float16), ("BFloat16", ml_dtypes.bfloat16)),
        *(("Long", np.int64), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8)),
        ("Bool", np.bool_),
    )
}
"""Element type of each class of storages."""


@dataclass(frozen=True)
class Name:
    """A function or class that the file names; it is never looked up."""

    text: str


class Opaque:
    """What a call that is not ours would have made."""


class Malformed(Exception):
    """The file is no checkpoint that we know how to read; the text says why."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: Any


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | Path) -> Any:
    """The file's object: nested dicts, lists and tuples, with a NumPy array where a tensor was.

    Raises:
        UserError: the file is missing, damaged, or no PyTorch checkpoint.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(file)
    except OSError as error:
        raise UserError.from_os(error, path, "check the path") from error
    except Exception as error:  # a damaged file misleads the parsers in every way there is
        raise UserError(
            "This file cannot be read as a PyTorch checkpoint",
            file=path,
            found=str(error) or type(error).__name__,
            expected="a file that torch.save wrote (zip or the older stream)",
            remedy="download it again, or save its state_dict with safetensors.torch.save_file",
        ) from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(names) != 1:
            raise Malformed("a zip without data.pkl")
        root = names[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else "little"
        if order != "little":
            raise Malformed(f"{order}-endian numbers")
        tree = _run(BytesIO(archive.read(names[0])))

        def raw(storage: Storage) -> bytes:
            entry = archive.getinfo(f"{root}data/{storage.key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Malformed(f"a compressed entry {entry.filename}")
            return archive.read(entry)

        return _materialise(tree, raw)


def _read_stream(file: BinaryIO) -> Any:
    file.seek(0)
    if _run(file) != MAGIC:
        raise Malformed("neither a zip nor PyTorch's magic number")
    for _ in range(2):
        _run(file)  # protocol version, sizes of the writer's integers
    tree = _run(file)
    keys = _run(file)
    wanted = {storage.key: storage for storage in _storages(tree)}
    buffers = {}
    for key in keys:
        if key not in wanted:
            raise Malformed(f"a storage {key!r} of unknown type")
        count = int.from_bytes(file.read(8), "little")
        buffers[key] = file.read(count * np.dtype(wanted[key].dtype).itemsize)
    return _materialise(tree, lambda storage: buffers[storage.key])


def _storages(tree: Any) -> list[Storage]:
    if isinstance(tree, Tensor):
        return [tree.storage]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [storage for child in children for storage in _storages(child)]


def _materialise(tree: Any, raw: Callable[[Storage], bytes]) -> Any:
    """The same tree with arrays for tensors; each storage is read once."""
    buffers: dict[str, np.ndarray] = {}

    def array(tensor: Tensor) -> np.ndarray:
        key = tensor.storage.key
        if key not in buffers:
            buffers[key] = np.frombuffer(raw(tensor.storage), tensor.storage.dtype)
        buffer = buffers[key]
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, buffer.dtype)
        if min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0 or last >= buffer.size:
            raise Malformed(f"a tensor of shape {tensor.shape} that reaches beyond its storage of {buffer.size}")
        strides = [s * buffer.itemsize for s in tensor.strides]
        view = np.lib.stride_tricks.as_strided(buffer[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.array(view)

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            return array(node)
        if isinstance(node, dict):
            return {k: visit(v) for k, v in node.items()}
        return type(node)(visit(v) for v in node) if isinstance(node, list | tuple) else node

    return visit(tree)


# ---------------------------------------------------------------- the stack machine


def _call(function: Any, args: tuple) -> Any:
    """What a call gives: tensors and plain containers, or an `Opaque`."""
    match function.text if isinstance(function, Name) else "":
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
            storage, offset, shape, strides = args[:4]
            if not isinstance(storage, Storage):
                raise Malformed("a tensor without a storage")
            return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return args[0]
        case "torch._tensor._rebuild_from_type_v2":
            return _call(args[0], tuple(args[2]))
        case "collections.OrderedDict":
            return dict(args[0]) if args else {}
        case "torch.Size":
            return tuple(args[0])
        case _:
            return Opaque()


def _storage(description: Any) -> Storage:
    """The storage that a persistent id describes: ("storage", type, key, place, elements, ...)."""
    kind, name, key = description[:3]
    dtype = DTYPES.get(name.text) if isinstance(name, Name) else None
    if kind != "storage" or dtype is None or (len(description) > 5 and description[5] is not None):
        raise Malformed(f"a storage of unknown kind {getattr(name, 'text', name)}")
    return Storage(str(key), dtype)


MARK = object()


def _run(file: BinaryIO) -> Any:
    """Interprets one pickle without calling or importing anything; the file is left behind its end."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def put(pairs: list[Any]) -> None:
        if isinstance(stack[-1], dict):
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(items: list[Any]) -> None:
        if isinstance(stack[-1], list):
            stack[-1].extend(items)

    for op, arg, _ in pickletools.genops(file):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                stack.append(MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Opaque())
            case "TUPLE" | "FROZENSET":
                stack.append(tuple(to_mark()))
            case "LIST":
                stack.append(to_mark())
            case "DICT":
                items = to_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put([key, value])
            case "SETITEMS":
                put(to_mark())
            case "APPEND":
                extend([stack.pop()])
            case "APPENDS":
                extend(to_mark())
            case "ADDITEMS":
                to_mark()
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[int(arg)] = stack[-1]  # type: ignore[arg-type]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[int(arg)])  # type: ignore[arg-type]
            case "GLOBAL":
                stack.append(Name(str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "NEWOBJ_EX":
                stack[-3:] = [Opaque()]
            case "OBJ" | "INST":
                to_mark()
                stack.append(Opaque())
            case "BUILD":
                stack.pop()
            case _ if op.stack_before == [] and len(op.stack_after) == 1 and not op.name.startswith(("EXT", "PERSID")):
                stack.append(arg)  # numbers, texts and bytes
            case _:
                raise Malformed(f"an instruction {op.name} that checkpoints do not use")
    raise Malformed("a pickle without an end")
