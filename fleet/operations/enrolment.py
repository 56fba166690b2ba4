"""Enrolment by token: a machine becomes a device with a key that it has made itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from agent.contract.base import explain
from agent.contract.enrolment import EnrolmentRequest, EnrolmentToken
from agent.contract.profile import DeviceProfile
from fleet.errors import ConflictError, UsageError
from fleet.operations.devices import bundle_values, check_labels
from fleet.operations.fleet import Fleet
from fleet.profiles_loader import load_profile, profile_paths
from fleet.registry import Actor
from fleet.registry.enrolments import EnrolmentRefusal, EnrolmentState, Machine
from fleet.registry.models import EnrolmentTokenRow
from fleet.trust.ca import certificate_digest, issued_by, key_digest, read_request

#: A token that is good for longer is a password of the fleet that lies about.
MOST_HOURS = 24 * 366
MOST_USES = 1_000_000


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """Of a token: how many devices may use it, for how long, whether an operator accepts each, and their labels."""

    uses: int = 1
    hours: float = 24.0
    approval: bool = False
    labels: Mapping[str, str] | None = None


def chosen_profile(name: str, document: dict[str, Any] | None) -> DeviceProfile:
    """Return the profile that devices get: one that comes with phifleet, or the whole of another.

    Raises:
        UsageError: it is not one.
        ProfileError: none has this name.
    """
    if document is None:
        if name not in profile_paths():  # a path here would be one of the server's
            raise UsageError(f"no profile is named {name!r}; `phifleet profiles list` shows those there are")
        return load_profile(name)
    try:
        profile = DeviceProfile.model_validate(document)
    except ValidationError as error:
        raise UsageError(f"profile_document: {explain(error)}") from None
    if profile.name != name:
        raise UsageError(f"profile_document is of {profile.name!r}, and profile is {name!r}")
    return profile


def make_token(
    fleet: Fleet, name: str, document: dict[str, Any] | None, options: TokenOptions, actor: Actor
) -> tuple[EnrolmentTokenRow, EnrolmentToken]:
    """Return a new token, which is shown this once.

    Raises:
        UsageError: the profile, a label, the number of uses or the time cannot be used.
        RepositoryError: there is no root of trust or no device CA yet.
    """
    profile = chosen_profile(name, document)
    _ = fleet.repository
    check_labels(options.labels or {})
    if not 1 <= options.uses <= MOST_USES:
        raise UsageError(f"uses: from 1 to {MOST_USES}, and not {options.uses}")
    if not 0 < options.hours <= MOST_HOURS:
        raise UsageError(f"a token is good for up to {MOST_HOURS} hours, and not for {options.hours:g}")
    pin = authority_pin(fleet)
    row, secret = fleet.registry.enrolments.create(
        profile.name,
        actor,
        expires_at=actor.at + timedelta(hours=options.hours),
        uses=options.uses,
        approval=options.approval,
        labels=options.labels,
        document=document,
    )
    return row, EnrolmentToken(secret, pin)


def authority_pin(fleet: Fleet) -> str | None:
    """Return SHA-256 of the device CA's certificate, if it issued that of the API; else None.

    Raises:
        UsageError: ``api_cert`` cannot be read.
    """
    path = fleet.settings.api_cert
    if path is None or not fleet.ca.exists:
        return None
    try:
        pem = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"api_cert {path}: cannot be read: {error}") from None
    ca = fleet.ca.ca_pem()
    return certificate_digest(ca) if issued_by(pem, ca) else None


def enrol(
    fleet: Fleet, wanted: EnrolmentRequest, address: str, actor: Actor
) -> tuple[EnrolmentState, dict[str, Any] | None] | EnrolmentRefusal:
    """Answer a machine: what became of its request, and the bundle without a private key once it is a device.

    Raises:
        UsageError: the certificate request cannot be used.
        ConflictError: the id is another machine's.
        RepositoryError: there is no device CA, or the disk refuses: the machine asks again.
    """
    key = read_request(wanted.csr, wanted.device)
    machine = Machine(wanted.device, key_digest(key), address)
    found = fleet.registry.enrolments.ask(wanted.token, machine, actor.at)
    if isinstance(found, EnrolmentRefusal):
        return found
    state = EnrolmentState(found.state)
    if state is not EnrolmentState.ENROLLED:
        return state, None
    device = fleet.registry.devices.get(wanted.device)
    values = bundle_values(fleet, wanted.device, device.profile, None)
    if str(values["broker"]).startswith(("mqtts://", "wss://")):
        values["certificate"] = _certified(fleet, wanted.device, wanted.csr)
    values["issued_at"] = values["issued_at"].isoformat()
    return state, values


def renew_for_key(fleet: Fleet, device: str, csr: str, actor: Actor) -> str:
    """Return a new certificate for the key with which a device was enrolled by token; it may have been off for long.

    Raises:
        UsageError: the request cannot be used.
        ConflictError: the device was revoked, removed, or enrolled with another key or by a bundle.
        RepositoryError: there is no device CA, or the disk refuses.
    """
    key = key_digest(read_request(csr, device))
    if not fleet.registry.enrolments.owns(device, key):
        raise ConflictError(
            f"{device} is not enrolled with this key, or was revoked or removed: it needs a new token or bundle"
        )
    made = _certified(fleet, device, csr)
    fleet.registry.audit.record(actor, "device.certificate", device)
    return made


def _certified(fleet: Fleet, device: str, csr: str) -> str:
    return fleet.ca.certify(device, csr, fleet.settings.device_certificate_days).certificate
