"""The checkpoint as a PyTorch model: what the reference and the recovery compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fleet.errors import ModelError


def load_float32(source: Path) -> Any:
    """Return the model, with every weight out of the checkpoint and no code of it.

    Raises:
        ModelError: transformers had to invent, drop or resize a tensor.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, report.get(kind) or ())) for kind in _KINDS}
    found = [f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items() if names]
    if found:
        raise ModelError(f"{source}: transformers does not read it whole ({'; '.join(found)})")
    return model.eval()


_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
