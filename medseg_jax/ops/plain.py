"""Plain forms of operations, for converters that know XLA's operations but not its platforms."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_wanted: ContextVar[bool] = ContextVar("plain_forms", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """What is traced within takes the one form that any converter can read: no choice by platform, no kernel."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def plain_wanted() -> bool:
    """Whether `plain_forms` is in force."""
    return _wanted.get()
