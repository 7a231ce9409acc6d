"""What the C library does with memory that is freed, where that is glibc; nothing elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 65536
_NEVER = -1


def give_back_memory() -> None:
    """Return freed memory to the system."""
    _call("malloc_trim", 0)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let freed memory stay with the process, for the time of the `with`.

    By default every large array is new memory that the system hands out, zeroed, page by page, at its first touch. That
    takes longer than many an operation on it.
    """
    _call("mallopt", _MMAP_MAX, 0)
    _call("mallopt", _TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_MAX, _DEFAULT_MMAP_MAX)
        _call("mallopt", _TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        give_back_memory()


def _call(function: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: on Windows
        getattr(ctypes.CDLL(None), function)(*arguments)
