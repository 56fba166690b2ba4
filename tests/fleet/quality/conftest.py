from __future__ import annotations

from tests.models import sample_artifact, sample_dir, tiny_artifact, tiny_dir

__all__ = ["sample_artifact", "sample_dir", "tiny_artifact", "tiny_dir"]
