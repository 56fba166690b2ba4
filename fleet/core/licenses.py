"""Licences as SPDX spells them, and which of them a profile admits."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

#: What a manifest says where the checkpoint's card names no licence.
UNKNOWN = "unknown"


def spdx(text: str) -> str | None:
    """Return ``text`` as the SPDX expression that it is, such as ``Apache-2.0`` for ``apache-2.0``; None: it is none.

    Source: SPDX specification, annex D; the list is that of ``packaging``.
    """
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return None


def not_admitted(license_: str, admitted: Sequence[str]) -> str | None:
    """Why a model under ``license_`` is not among those ``admitted``; None: it is, or all are (none is listed).

    A name that SPDX does not have is compared as it is written, without regard to case.
    """
    if not admitted or _comparable(license_) in {_comparable(one) for one in admitted}:
        return None
    listed = ", ".join(admitted)
    if license_ == UNKNOWN:
        return f"its checkpoint names no licence (`license:` at the head of README.md), and only {listed} may be used"
    return f"its licence is {license_}, and only {listed} may be used"


def _comparable(text: str) -> str:
    return (spdx(text) or text).casefold()
