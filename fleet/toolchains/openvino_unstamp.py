"""Takes out of OpenVINO's files what differs from build to build."""

from __future__ import annotations

from pathlib import Path


def unstamp(folder: Path) -> None:
    """To be filled by what is found."""
