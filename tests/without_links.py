"""Runs a module in a network namespace of loopback alone: `python -m tests.without_links MODULE ARG...`

Linux, as root. Whoever wants to talk to it enters the namespace: `nsenter --target PID --net`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys

CLONE_NEWNET = 0x40000000


def possible() -> bool:
    """Whether this machine and user can do it."""
    return sys.platform == "linux" and os.geteuid() == 0 and all(map(shutil.which, ("ip", "nsenter")))


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
