"""What of the fleet's trust ends when: metadata that needs an operator, and the certificates of CA, broker and API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

if TYPE_CHECKING:
    from fleet.trust.ca import DeviceCA
    from fleet.trust.repository import Repository

#: An operator is warned this long before.
WARNING = timedelta(days=30)
#: Of a device's certificate: it has tried to renew it for two weeks by then.
DEVICE_WARNING = timedelta(days=14)


@dataclass(frozen=True, slots=True)
class End:
    """``name`` is stable; ``text`` says what it is, ``hint`` what to do."""

    name: str
    text: str
    hint: str
    expires: datetime

    def soon(self, at: datetime) -> bool:
        """It is to be warned of."""
        return self.expires - at < WARNING

    def line(self, at: datetime) -> str:
        """Return one line for an operator."""
        over = self.expires <= at
        return f"{self.text} {'ended' if over else 'ends'} on {self.expires:%Y-%m-%d %H:%M} UTC: {self.hint}"


def ends(repository: Repository | None, ca: DeviceCA | None, certificates: Mapping[str, Path]) -> list[End]:
    """Return what ends, the soonest first. ``certificates`` are PEM files by the setting that names them.

    Raises:
        RepositoryError: the metadata or the CA cannot be read.
    """
    found: list[End] = []
    if repository is not None:
        for role in repository.status():
            if role.role in ("root", "targets") and role.expires is not None:
                renew = f"`phifleet trust renew {role.role}`, with its offline keys"
                found.append(End(role.role, f"the metadata of {role.role}", renew, role.expires))
    if ca is not None and ca.exists:
        authority = x509.load_pem_x509_certificate(ca.ca_pem().encode())
        hint = "no certificate holds for longer; make a new fleet before"
        found.append(End("device_ca", "the certificate of the device CA", hint, authority.not_valid_after_utc))
    return sorted([*found, *_of_files(certificates)], key=lambda end: end.expires)


def _of_files(certificates: Mapping[str, Path]) -> Iterator[End]:
    for name, path in certificates.items():
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            continue  # whoever uses the file says what is wrong with it
        hint = "make it again with `phifleet trust issue-controller` or `issue-broker`, or where it came from"
        yield End(name, f"the certificate {path} ({name})", hint, certificate.not_valid_after_utc)
