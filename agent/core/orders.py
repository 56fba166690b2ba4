"""What follows when an order could not be verified. Pure."""

from __future__ import annotations

from enum import StrEnum

from agent.contract.failures import FailureCode


class AfterRefusal(StrEnum):
    """``RETRY`` later: the refusal says nothing about the order. ``REJECT``: it does, and is reported."""

    RETRY = "retry"
    REJECT = "reject"


#: The controller is away, or the disk refuses: neither says anything about the order.
_PASSING = frozenset({FailureCode.TRUST_UNREACHABLE, FailureCode.STORE_DISK_FULL, FailureCode.STORE_IO})
#: What newer metadata may change.
_KEYS_MAY_BE_NEW = frozenset({FailureCode.TRUST_SIGNATURE, FailureCode.TRUST_UNREACHABLE, FailureCode.TRUST_NOT_FOUND})


def after_refusal(code: FailureCode) -> AfterRefusal:
    """Decide what follows when the check of an order ended with ``code``."""
    return AfterRefusal.RETRY if code in _PASSING else AfterRefusal.REJECT


def keys_may_be_new(code: FailureCode) -> bool:
    """Return whether to refresh the metadata and check once more: the director's keys may be new to this device."""
    return code in _KEYS_MAY_BE_NEW
