"""Two things about llama.cpp's CPU back end that must be set right before it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: How long OpenMP spins at each of the thousand barriers of a token. Its own choice is several times slower where
#: other processes want the cores too (3 tokens/s against 9, measured on the sample with 4 others on 2 cores), and no
#: faster where they do not (88 tokens/s both).
_SPINS = "3000"
#: Bytes: above the kernel's MINSIGSTKSZ, below what a signal frame with AMX tiles takes.
_SMALL_STACK = 2560
_DISABLED = 2


class _AltStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def quiet_openmp() -> None:
    """Before the library is imported: OpenMP reads its environment then."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


@contextlib.contextmanager
def without_amx() -> Iterator[None]:
    """Loading a model in here makes llama.cpp leave out AMX, and use its repacked kernels instead.

    Its AMX path crashes on some machines that have it (its issue 20824; on ours with Q4_0). It asks the kernel for
    the tiles when it loads, and the kernel refuses them to a process with an alternate signal stack too small for
    them (Linux, Documentation/arch/x86/xstate.rst), which it takes as "AMX is not ready".
    """
    if not _has_amx():
        yield
        return
    buffer = ctypes.create_string_buffer(_SMALL_STACK)
    before = _AltStack()
    small = _AltStack(ctypes.addressof(buffer), 0, _SMALL_STACK)
    libc = ctypes.CDLL(None)
    libc.sigaltstack(ctypes.byref(small), ctypes.byref(before))
    try:
        yield
    finally:
        if not before.sp:
            before = _AltStack(None, _DISABLED, 0)
        libc.sigaltstack(ctypes.byref(before), None)


def _has_amx() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return " amx_int8" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False
