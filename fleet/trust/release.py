"""The files of the TUF repository, and the order in which a new release of them is written.

What is written first has a new name and is referred to by nothing (consistent snapshots); the last step replaces
one file. A process that dies in the middle leaves the repository as it was.

Source: The Update Framework specification 1.0, sections 4, 6.1 and 6.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError as TufError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from agent.contract.base import MalformedMessageError
from agent.contract.director import DIRECTOR_TARGET, ISSUED_AT_FIELD, DirectorKeys
from agent.platform.files import remove_leftovers, write_atomic
from fleet.errors import RepositoryError
from fleet.trust.keyring import Keyring

#: A device in the middle of a download may still want what was current a moment ago.
KEPT_VERSIONS = 16

#: Of the snapshot: what the audit was when it was signed. Devices keep it, whatever becomes of the database.
AUDIT_FIELD = "x-phifleet-audit"

_ROOT = re.compile(r"\d+\.root\.json")
_VERSIONED = re.compile(r"(?P<version>\d+)\.(?:snapshot|targets)\.json")


class Expiry(BaseModel):
    """How long signatures hold, in days. The online roles are signed again at half of theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: float = Field(default=365.0, gt=0)
    targets: float = Field(default=365.0, gt=0)
    snapshot: float = Field(default=14.0, gt=0)
    timestamp: float = Field(default=7.0, gt=0)

    def of(self, role: str) -> timedelta:
        """Return how long a signature of ``role`` holds."""
        return timedelta(days=getattr(self, role))


@dataclass(slots=True)
class Signatures:
    """The current metadata of every role; edited in place, then released."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]

    def of(self, role: str) -> Metadata[Any]:
        """By the role's TUF name."""
        metadata: Metadata[Any] = getattr(self, role)
        return metadata

    def broken(self) -> tuple[str, ...]:
        """Roles whose metadata the current root does not accept: a rotation was interrupted."""
        return tuple(role for role in (Targets.type, Snapshot.type, Timestamp.type) if not self._accepted(role))

    def _accepted(self, role: str) -> bool:
        try:
            self.root.signed.verify_delegate(role, self.of(role).signed_bytes, self.of(role).signatures)
        except TufError:
            return False
        return True


class Release:
    """Reads and writes the files under one folder. Whoever writes holds the repository's lock."""

    def __init__(self, folder: Path, keyring: Keyring, clock: Callable[[], datetime]) -> None:
        self.metadata = folder / "metadata"
        self.targets = folder / "targets"
        self._config = folder / "config.json"
        self._keyring = keyring
        self._clock = clock
        #: How many entries the audit has, and the newest one's hash; None where nobody says.
        self.audit_head: Callable[[], tuple[int, str] | None] = lambda: None

    def expiry(self) -> Expiry:
        """From ``config.json``; the operator may edit it.

        Raises:
            RepositoryError: a field is unknown or no positive number.
        """
        try:
            return Expiry.model_validate_json(self._config.read_bytes())
        except FileNotFoundError:
            return Expiry()
        except ValidationError as error:
            raise RepositoryError(f"{self._config}: expiry in days: {error}") from None

    def save_expiry(self, expiry: Expiry) -> None:
        """Write ``config.json``."""
        write_atomic(self._config, expiry.model_dump_json(indent=2).encode())

    def newest_root(self) -> int:
        """Return version, 0 without one.

        Raises:
            OSError: the folder is there and cannot be read.
        """
        try:
            names = [path.name for path in self.metadata.iterdir()]
        except FileNotFoundError:
            return 0
        return max((int(name.split(".")[0]) for name in names if _ROOT.fullmatch(name)), default=0)

    def load(self) -> Signatures:
        """Return the release that devices see now; needs no lock, as what it refers to never changes.

        Raises:
            RepositoryError: no repository here, or a file is missing or damaged.
            OSError: a file cannot be read.
        """
        version = self.newest_root()
        if version == 0:
            raise RepositoryError(f"{self.metadata.parent} holds no repository: run `phifleet init`")
        try:
            root = Metadata[Root].from_bytes(self._read(f"{version}.root.json"))
            timestamp = Metadata[Timestamp].from_bytes(self._read("timestamp.json"))
            snapshot_version = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_bytes(self._read(f"{snapshot_version}.snapshot.json"))
            targets_version = snapshot.signed.meta["targets.json"].version
            targets = Metadata[Targets].from_bytes(self._read(f"{targets_version}.targets.json"))
        except (TufError, FileNotFoundError, KeyError) as error:
            raise RepositoryError(f"{self.metadata} is damaged: {error}; restore it from a backup") from error
        return Signatures(root, timestamp, snapshot, targets)

    def _read(self, name: str) -> bytes:
        return (self.metadata / name).read_bytes()

    def director(self, targets: Targets) -> DirectorKeys:
        """Return the director's keys that devices accept now.

        Raises:
            RepositoryError: the file is missing or damaged.
            OSError: it cannot be read.
        """
        try:
            target = targets.targets[DIRECTOR_TARGET]
            return DirectorKeys.from_json((self.targets / target.get_prefixed_paths()[0]).read_bytes())
        except (MalformedMessageError, FileNotFoundError, KeyError) as error:
            raise RepositoryError(f"{self.targets} is damaged: {error}; restore it from a backup") from error

    def write_target(self, target: TargetFile, data: bytes) -> None:
        """Put a target's bytes under the name that its hash gives."""
        write_atomic(self.targets / target.get_prefixed_paths()[0], data)

    def is_due(self, metadata: Metadata[Any]) -> bool:
        """Half of the time that its signature holds is over."""
        signed = metadata.signed
        return bool(signed.expires - self._clock() < self.expiry().of(signed.type) / 2)

    def write(self, state: Signatures, *, since: str, also: Iterable[Signer] = ()) -> None:
        """Sign and write the roles from ``since`` on in the order targets, snapshot, timestamp.

        ``also`` signs ``since`` too: the coming key of a rotation, so that old and new root accept the release.
        """
        order = (Targets.type, Snapshot.type, Timestamp.type)
        for role in order[order.index(since) :]:
            self._write_role(state, role, tuple(also) if role == since else ())
        self._prune(state)

    def sign_lasting(self, state: Signatures, lasting: timedelta) -> dict[str, bytes]:
        """Return a snapshot and a timestamp that hold so long, by name; nothing is written.

        Their versions are used up: whoever sees this release goes on with the next one, which is to be written now.
        """
        return dict(self._sign_role(state, role, (), lasting) for role in (Snapshot.type, Timestamp.type))

    def _write_role(self, state: Signatures, role: str, also: Sequence[Signer]) -> None:
        name, data = self._sign_role(state, role, also)
        write_atomic(self.metadata / name, data)

    def _sign_role(
        self, state: Signatures, role: str, also: Sequence[Signer], lasting: timedelta | None = None
    ) -> tuple[str, bytes]:
        metadata = state.of(role)
        self._stamp(metadata, lasting)
        holders = state.root.signed.roles[role]
        signers = self.signers(role, holders.keyids, holders.threshold if not also else 0)
        data = _signed(metadata, [*signers, *also])
        if role == Timestamp.type:
            return "timestamp.json", data
        version = metadata.signed.version
        meta = MetaFile.from_data(version, data, ["sha256"])
        if role == Targets.type:
            state.snapshot.signed.meta["targets.json"] = meta
        else:
            state.timestamp.signed.snapshot_meta = meta
        return f"{version}.{role}.json", data

    def sign_root(self, old: Root, new: Root) -> tuple[Metadata[Root], bytes]:
        """``new`` as the root after ``old``, signed by the thresholds of both; nothing is written.

        Raises:
            RepositoryError: too few root keys can be opened.
        """
        metadata = Metadata(new)
        self._stamp(metadata)
        signers: dict[str, Signer] = {}
        for root in (old, new):
            role = root.roles[Root.type]
            for signer in self.signers(Root.type, role.keyids, role.threshold):
                signers[signer.public_key.keyid] = signer
        return metadata, _signed(metadata, signers.values())

    def write_root(self, root: Root, data: bytes) -> None:
        """From here on devices see this root."""
        write_atomic(self.metadata / f"{root.version}.root.json", data)

    def _stamp(self, metadata: Metadata[Any], lasting: timedelta | None = None) -> None:
        signed, now = metadata.signed, self._clock().replace(microsecond=0)
        signed.version += 1
        signed.expires = now + (lasting or self.expiry().of(signed.type))
        if signed.type == Timestamp.type:
            signed.unrecognized_fields[ISSUED_AT_FIELD] = now.isoformat()
        if signed.type == Snapshot.type and (head := self.audit_head()) is not None:
            signed.unrecognized_fields[AUDIT_FIELD] = {"entries": head[0], "hash": head[1]}

    def signers(self, role: str, keyids: Iterable[str], threshold: int) -> list[Signer]:
        """Return all signers that can be opened.

        Raises:
            RepositoryError: fewer than ``threshold``; says why of each that could not be opened.
        """
        opened, problems = [], []
        for keyid in keyids:
            try:
                opened.append(self._keyring.signer(keyid))
            except RepositoryError as error:
                problems.append(str(error))
        if len(opened) < threshold:
            raise RepositoryError(f"{role} needs {threshold} keys, {len(opened)} can be opened: {'; '.join(problems)}")
        return opened

    def clean(self) -> None:
        """Delete what a killed process had begun to write."""
        for folder in (self.metadata, self.targets, self.targets / "artifacts", self.targets / "indexed"):
            remove_leftovers(folder)

    def _prune(self, state: Signatures) -> None:
        current = {"snapshot": state.snapshot.signed.version, "targets": state.targets.signed.version}
        for path in self.metadata.iterdir():
            match = _VERSIONED.fullmatch(path.name)
            if match and int(match["version"]) <= current[path.name.split(".")[1]] - KEPT_VERSIONS:
                path.unlink(missing_ok=True)


@contextmanager
def signing(role: str, signer: Signer) -> Iterator[None]:
    """A KMS or an HSM fails in its own ways; all of them become a ``RepositoryError``."""
    try:
        yield
    except Exception as error:
        raise RepositoryError(f"signing {role} with key {signer.public_key.keyid[:12]} failed: {error}") from error


def _signed(metadata: Metadata[Any], signers: Iterable[Signer]) -> bytes:
    metadata.signatures.clear()
    for signer in signers:
        with signing(metadata.signed.type, signer):
            metadata.sign(signer, append=True)
    return metadata.to_bytes()


def blank(keys: dict[str, list[Key]], root_threshold: int, now: datetime) -> Signatures:
    """Unsigned metadata of version 0, which signing makes version 1; ``keys`` by role."""
    root = Root(expires=now, consistent_snapshot=True)
    for role in (Root.type, Targets.type, Snapshot.type, Timestamp.type):
        for key in keys[role]:
            root.add_key(key, role)
    root.roles[Root.type].threshold = root_threshold
    state = Signatures(
        Metadata(root),
        Metadata(Timestamp(expires=now)),
        Metadata(Snapshot(expires=now)),
        Metadata(Targets(expires=now)),
    )
    for role in (Root.type, Targets.type, Snapshot.type, Timestamp.type):
        state.of(role).signed.version = 0
    return state
