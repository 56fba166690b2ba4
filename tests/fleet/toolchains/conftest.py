from __future__ import annotations

from pathlib import Path

import pytest

from fleet.toolchains.checkpoint.sample_source import sample_gguf
from tests.models import sample_artifact, sample_dir, tiny_artifact, tiny_dir

__all__ = ["sample_artifact", "sample_dir", "sample_file", "tiny_artifact", "tiny_dir"]


@pytest.fixture(scope="session")
def sample_file() -> Path:
    """The GGUF that the sample is made of, fetched once for all runs."""
    return sample_gguf()
