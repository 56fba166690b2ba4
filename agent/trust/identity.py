"""Who this device is: the imported bundle in the state folder, with the PEM files that TLS reads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from agent.contract.base import MalformedMessageError
from agent.contract.bundle import Bundle
from agent.errors import ConfigError, UnavailableError
from agent.platform.files import PRIVATE, reason, write_atomic

BUNDLE, CERTIFICATE = "bundle.json", "client.pem"


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device. The paths are of PEM files, None where the bundle brought none."""

    device: str
    profile: str
    broker: str
    root: bytes
    issued_at: datetime
    trust_folder: Path
    broker_ca: Path | None
    certificate: Path | None
    private_key: Path | None


def read_bundle(path: Path) -> Bundle:
    """Return a bundle file.

    Raises:
        ConfigError: missing, readable by others, damaged, or of another version; says which field.
    """
    try:
        data, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"bundle {path} cannot be read: {error.strerror or error}") from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"bundle {path} holds a private key and can be read by others: chmod 600 it")
    try:
        return Bundle.from_json(data)
    except MalformedMessageError as error:
        raise ConfigError(
            f"bundle {path} is damaged: {error}. Make it again on the controller: phifleet device add ID --bundle FILE"
        ) from error


def enrol(bundle: Bundle, state_folder: Path, *, replace: bool = False) -> Identity:
    """Import a bundle. The same one again, or a renewed certificate for the same device and fleet, is always fine.

    Raises:
        ConfigError: the device is enrolled as another or in another fleet, and ``replace`` is False; or the disk
            refuses.
    """
    folder, trust = state_folder / "identity", state_folder / "trust"
    old = _enrolled(state_folder, replace)
    same_fleet = old is None or bool(_root_keyids(old.root) & _root_keyids(bundle.root))
    if old is not None and not replace:
        _refuse_another(old, bundle, same_fleet)
    try:
        if not same_fleet and trust.exists():
            shutil.rmtree(trust)  # what another fleet signed: versions and times that mean nothing here
        if old is not None and same_fleet and _was_renewed(old, bundle):
            bundle = bundle.model_copy(update={"certificate": old.certificate})
        for name, pem in _pem_files(bundle).items():
            if pem is None:
                (folder / name).unlink(missing_ok=True)
            else:
                _keep(folder / name, pem.encode())
        _keep(folder / BUNDLE, bundle.to_json())
    except OSError as error:
        raise UnavailableError(f"the identity cannot be written to {folder}: {reason(error, folder)}") from error
    return _identity(bundle, state_folder)


def _was_renewed(old: Bundle, new: Bundle) -> bool:
    """Return whether the device has a later certificate for the bundle's key; a bundle may be imported each start."""
    if old.certificate is None or new.certificate in (None, old.certificate) or old.private_key != new.private_key:
        return False
    from agent.trust.keys import read_certificate

    try:
        return read_certificate(old.certificate).ends > read_certificate(str(new.certificate)).ends
    except ValueError:
        return False


def refuse_unless_free(state_folder: Path, device: str, *, replace: bool) -> None:
    """Before a controller is asked: this device is not enrolled as another, unless it is to be replaced.

    Raises:
        ConfigError: it is; or its identity cannot be read.
    """
    old = _enrolled(state_folder, replace)
    if old is not None and old.device != device and not replace:
        raise ConfigError(f"this device is enrolled as {old.device} already: to enrol as {device}, add --replace")


def _keep(path: Path, data: bytes) -> None:
    """Write what has changed: a device that is started with its bundle each time also starts on a full disk."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    write_atomic(path, data, PRIVATE)


def load(state_folder: Path) -> Identity:
    """Return the identity imported before.

    Raises:
        ConfigError: none, or damaged.
    """
    path = state_folder / "identity" / BUNDLE
    if not _is_there(path):
        raise ConfigError(
            f"this device has no identity in {state_folder}: enrol it with `phifleet-agent enrol`, or start it with "
            "--bundle FILE"
        )
    return _identity(read_bundle(path), state_folder)


def _identity(bundle: Bundle, state_folder: Path) -> Identity:
    folder = state_folder / "identity"
    paths = {name: folder / name if pem is not None else None for name, pem in _pem_files(bundle).items()}
    return Identity(
        device=bundle.device,
        profile=bundle.profile,
        broker=bundle.broker,
        root=bundle.root.encode(),
        issued_at=bundle.issued_at,
        trust_folder=state_folder / "trust",
        broker_ca=paths["broker-ca.pem"],
        certificate=paths["client.pem"],
        private_key=paths["client-key.pem"],
    )


def _pem_files(bundle: Bundle) -> dict[str, str | None]:
    return {"broker-ca.pem": bundle.broker_ca, "client.pem": bundle.certificate, "client-key.pem": bundle.private_key}


def _enrolled(state_folder: Path, replace: bool) -> Bundle | None:
    path = state_folder / "identity" / BUNDLE
    try:
        return read_bundle(path) if _is_there(path) else None
    except ConfigError:
        if replace:
            return None
        raise


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise ConfigError(f"the identity {path} cannot be read: {error.strerror or error}") from error


def _refuse_another(old: Bundle, new: Bundle, same_fleet: bool) -> None:
    if old.device != new.device:
        raise ConfigError(
            f"this device is enrolled as {old.device}, the bundle is for {new.device}: use another bundle, or enrol "
            "again with --replace"
        )
    if not same_fleet:
        raise ConfigError(
            f"device {old.device} trusts another root than the bundle brings: if the fleet was made anew, enrol "
            "again with --replace"
        )


def _root_keyids(root: str) -> set[str]:
    """Who may sign for the fleet. A mistake is to be noticed here, not an attack: whoever imports has the device."""
    try:
        return set(json.loads(root)["signed"]["roles"]["root"]["keyids"])
    except (ValueError, KeyError, TypeError):
        return set()
