"""What Qualcomm's NPU loses (see ``loss``): its artifacts take minutes each to compile."""

from __future__ import annotations

from bench.figures import Figure
from bench.loss import QNN_CASES
from bench.loss import figures as of_cases


def figures() -> list[Figure]:
    """A quarter of an hour."""
    return of_cases(QNN_CASES)
