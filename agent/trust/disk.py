"""The disk's refusals in the words of trust."""

from __future__ import annotations

from pathlib import Path

from agent.contract.failures import FailureCode
from agent.errors import TrustError
from agent.platform.files import is_disk_full, reason


def disk_error(error: OSError, path: Path) -> TrustError:
    """Return the ``TrustError`` for an ``OSError`` at ``path``; a full disk has a code of its own."""
    code = FailureCode.STORE_DISK_FULL if is_disk_full(error) else FailureCode.STORE_IO
    return TrustError(f"the trust store cannot be used at {path}: {reason(error, path.parent)}", code)
