"""A checkpoint out of an OCI image layout: unpacked into the user's cache, where every later run finds it."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from fleet.errors import ModelError, StoreError
from fleet.export.oci_layout import model_digest, unpack_layout
from fleet.toolchains.checkpoint.sample_source import cache_folder

#: What a model begins with that is in a layout.
OCI_LAYOUT = "oci-layout:"


def from_layout(text: str) -> Path:
    """Return the folder of the checkpoint in the layout ``DIR`` or ``DIR:TAG``. Every byte was verified when unpacked.

    Raises:
        ModelError: there is no such layout, it is damaged, or it holds several models and no tag was named.
    """
    layout, tag = Path(text).expanduser(), None
    if not layout.is_dir() and ":" in text:
        before, _, tag = text.rpartition(":")
        layout = Path(before).expanduser()
    if not layout.is_dir():
        raise ModelError(f"{OCI_LAYOUT}{text}: {layout} is no folder; pass {OCI_LAYOUT}DIR or {OCI_LAYOUT}DIR:TAG")
    try:
        place = cache_folder() / "oci" / model_digest(layout, tag) / _name(tag or layout.resolve().name)
        if not place.is_dir():
            _unpack(layout, tag, place)
    except StoreError as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"{layout}: cannot be unpacked: {error}") from None
    return place


def _name(text: str) -> str:
    """As a folder's, from which the model gets its name where config.json has none."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "model"


def _unpack(layout: Path, tag: str | None, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=place.parent))
    try:
        unpack_layout(layout, tag, half)
        half.chmod(0o755)
        try:
            half.rename(place)
        except OSError:
            if not place.is_dir():  # another process was as quick: the same bytes
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
