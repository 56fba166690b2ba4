"""A view of a checkpoint with a config.json that every toolchain reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fleet.toolchains.checkpoint.phi3_writer import write_json

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def hub_config(config: dict[str, Any], stored_dtype: str) -> dict[str, Any]:
    """``config`` as the hub spells it.

    transformers 5 saves ``rope_parameters`` with ``rope_type``, where the hub, and so every toolchain, has
    ``rope_theta`` and ``rope_scaling`` with ``type``. The dtype must be what is stored: a toolchain that loads
    float32 weights as the bfloat16 that config.json claims would round them before it quantizes.
    """
    view = dict(config)
    rope = dict(view.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        view["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        view["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    scaling = view.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling is not None:
        kind = scaling.get("type") or scaling.get("rope_type")
        kind = "longrope" if kind == "su" else kind  # as it was called first
        original = scaling.get("original_max_position_embeddings")
        view.setdefault("original_max_position_embeddings", original or view["max_position_embeddings"])
        unwanted = {"rope_type", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "factor"}
        if view.get("model_type") == "phimoe":  # there transformers 5 looks for it here alone
            unwanted.remove("original_max_position_embeddings")
        scaling = {key: value for key, value in scaling.items() if key not in unwanted} | {"type": kind}
    elif view.get("model_type") == "phi3":
        # Absent, it would default to 4096, and a difference from max_position_embeddings means LongRoPE to some.
        view["original_max_position_embeddings"] = view["max_position_embeddings"]
    view["rope_scaling"] = scaling
    view.pop("dtype", None)
    view["torch_dtype"] = _DTYPES.get(stored_dtype, "float32")
    return view


def mirror(source: Path, folder: Path, **changes: Any) -> Path:
    """Return a folder that refers to the files of ``source``, with ``changes`` in its config.json."""
    from fleet.toolchains.checkpoint.safetensors_scan import read_tensors

    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, int] = {}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "config.json":
            _refer(file, folder / file.name)
        if file.suffix == ".safetensors":
            for tensor in read_tensors(file):
                stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.count
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = max(stored, key=lambda name: stored[name], default="F32")
    write_json(folder / "config.json", hub_config(config, dtype) | changes)
    return folder


def _refer(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file.resolve())
    except OSError:  # Windows wants a privilege for symbolic links
        try:
            os.link(file, place)
        except OSError:
            shutil.copyfile(file, place)
