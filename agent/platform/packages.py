"""How an extra of phifleet is installed, for messages that say so."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def install_command(extra: str) -> str:
    """Return the command that installs ``extra`` beside this very interpreter, run where the wheel of phifleet lies."""
    try:
        found = version("phifleet")
    except PackageNotFoundError:  # run from a folder of sources that is not installed
        found = "VERSION"
    return f"{sys.executable} -m pip install 'phifleet-{found}-py3-none-any.whl[{extra}]'"
