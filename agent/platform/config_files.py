"""Where the settings of a machine are: one file for each program, which whoever runs the program reads by default."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs


def system_file(name: str) -> Path:
    """Return the machine's file of settings; it need not exist: ``/etc/phifleet/NAME`` on Linux."""
    if sys.platform in ("win32", "darwin"):
        return Path(platformdirs.site_config_dir("phifleet", appauthor=False)) / name
    return Path("/etc/phifleet") / name


def unread(error: OSError) -> str:
    """Why a file of settings was not read, and where rights are missing, as whom to run the command."""
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and hasattr(os, "getuid"):
        return f"{reason}; run the command as the user of the service, for example with sudo -u"
    return reason
