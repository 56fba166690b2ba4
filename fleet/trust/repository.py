"""The TUF repository of the fleet: artifact manifests and the director's keys are its targets.

Every write happens under a lock and ends with the replacement of one file: ``timestamp.json``, or a new root.
Whatever is written before has a new name (consistent snapshots) and is referred to by nothing, so a process
that dies in the middle leaves the repository as it was.

Source: The Update Framework specification 1.0, sections 4 to 6; Uptane standard 2.1 for the director.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Key
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

from agent.contract.base import canonical_json
from agent.contract.chunk_index import without_index
from agent.contract.director import DIRECTOR_TARGET, DirectorKeys
from agent.contract.manifest import Manifest, indexed_target, manifest_target
from agent.contract.messages import DESIRED_PAYLOAD_TYPE, Desired
from agent.platform.files import explained, remove_leftovers, sync_folder
from fleet.errors import FleetError, RepositoryError
from fleet.home import Home
from fleet.trust.clock import utc_now
from fleet.trust.keyring import KeyEntry, Keyring
from fleet.trust.release import AUDIT_FIELD, Expiry, Release, Signatures, blank, signing

DIRECTOR = "director"
ONLINE_ROLES = (Snapshot.type, Timestamp.type)
ROLES = (Root.type, Targets.type, *ONLINE_ROLES, DIRECTOR)

#: Every name that a device may ask for; nothing else reaches the disk.
_SERVED = re.compile(
    r"(?P<metadata>timestamp\.json|[1-9]\d{0,9}\.(?:root|snapshot|targets)\.json)"
    r"|targets/(?P<target>(?:(?:artifacts|indexed)/)?[0-9a-f]{64}\.[a-z0-9]{1,64}\.json)"
)

LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """Of one role, for the operator. ``keys`` maps key ids to signer URIs; the director has no version of its own."""

    role: str
    version: int
    expires: datetime | None
    threshold: int
    keys: Mapping[str, str]


class Repository:
    """The repository in ``home.tuf`` and its keys in ``home.keys``. Safe to use from several processes at once."""

    def __init__(
        self,
        home: Home,
        clock: Callable[[], datetime] = utc_now,
        offline_keys: Path | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        self._home = home
        self._clock = clock
        self._keyring = Keyring(home.keys, offline_keys)
        self._files = Release(home.tuf, self._keyring, clock)
        self._lock = FileLock(home.root / "trust.lock", timeout=lock_timeout_s)

    def sign_audit(self, head: Callable[[], tuple[int, str]]) -> None:
        """Let every snapshot from now on carry what ``head`` returns: the audit's number of entries, and its hash.

        What is signed does not wait for a database: while ``head`` raises an error of ours, the snapshot stays silent.
        """

        def head_if_there() -> tuple[int, str] | None:
            try:
                return head()
            except FleetError:
                return None

        self._files.audit_head = head_if_there

    def signed_audit(self) -> tuple[int, str] | None:
        """Return what the newest snapshot says of the audit, or None.

        Raises:
            RepositoryError: there is no repository, or it is damaged.
        """
        found = self._load().snapshot.signed.unrecognized_fields.get(AUDIT_FIELD)
        return (int(found["entries"]), str(found["hash"])) if isinstance(found, dict) else None

    @property
    def exists(self) -> bool:
        """Whether ``init`` was completed.

        Raises:
            RepositoryError: the folder cannot be looked at.
        """
        with _boundary(self._home):
            return self._home.tuf.is_dir()

    def init(self, *, root_keys: int = 3, root_threshold: int = 2, expiry: Expiry | None = None) -> None:
        """Make keys for every role and version 1 of all metadata.

        Raises:
            RepositoryError: there is one already, the threshold cannot be met, or the disk refuses.
        """
        if not 1 <= root_threshold <= root_keys:
            raise RepositoryError(f"root threshold {root_threshold} must be from 1 to the {root_keys} root keys")
        with self._locked():
            if self.exists:
                raise RepositoryError(f"{self._home.tuf} holds a repository already: use it, or name another home")
            staging = self._home.tuf.with_name(".tuf-new")
            shutil.rmtree(staging, ignore_errors=True)
            self._first_release(Release(staging, self._keyring, self._clock), root_keys, root_threshold, expiry)
            staging.rename(self._home.tuf)
            sync_folder(self._home.root)

    def _first_release(self, files: Release, root_keys: int, root_threshold: int, expiry: Expiry | None) -> None:
        keys = {
            role: [self._keyring.create(role) for _ in range(root_keys if role == Root.type else 1)] for role in ROLES
        }
        # Of an attempt that the disk or a signal ended.
        self._keyring.keep_only({key.keyid for of_role in keys.values() for key in of_role})
        files.save_expiry(expiry or Expiry())
        state = blank(keys, root_threshold, self._clock())
        root, data = files.sign_root(state.root.signed, state.root.signed)
        files.write_root(root.signed, data)
        state.root = root
        self._set_director(files, state, DirectorKeys(keys={key.keyid: key.to_dict() for key in keys[DIRECTOR]}))
        files.write(state, since=Targets.type)

    def publish(self, manifest: Manifest, index: bytes | None = None) -> int:
        """Sign an artifact's manifest into the targets; returns the targets' version. Twice is the same as once.

        ``index``: the one that the manifest refers to. Agents 0.1 know none, so a manifest that lists every chunk is
        signed beside.

        Raises:
            RepositoryError: no repository, a key that cannot be opened, or the disk refuses.
        """
        whole = without_index(manifest, index or b"")
        if manifest.index is not None:  # read by agents 0.1 alone, which know no delta either
            whole = whole.model_copy(update={"deltas": ()})
        documents = {manifest_target(manifest.digest): whole}
        if manifest.index is not None:
            documents[indexed_target(manifest.digest)] = manifest
        with self._writing() as state:
            signed = state.targets.signed
            # What an earlier release of the artifact had must not win over this one.
            changed = manifest.index is None and signed.targets.pop(indexed_target(manifest.digest), None) is not None
            for path, document in documents.items():
                data = document.to_json()
                target = _target(path, data, _custom(manifest))
                if signed.targets.get(path) != target:
                    self._files.write_target(target, data)
                    signed.targets[path] = target
                    changed = True
            if changed:
                self._files.write(state, since=Targets.type)
            return signed.version

    def withdraw(self, digest: str) -> bool:
        """Return no device will take this artifact any more; False if it was not published."""
        with self._writing() as state:
            paths = (manifest_target(digest), indexed_target(digest))
            taken = [state.targets.signed.targets.pop(path, None) for path in paths]
            if not any(taken):
                return False
            self._files.write(state, since=Targets.type)
            return True

    def published(self) -> tuple[str, ...]:
        """Digests of all artifacts that devices may be sent."""
        paths = self._load().targets.signed.targets
        return tuple(sorted(path[len("artifacts/") : -len(".json")] for path in paths if path.startswith("artifacts/")))

    def refresh_online(self) -> bool:
        """Sign snapshot and timestamp again where half of their time is over; True if anything was signed.

        Also heals what an interrupted rotation left. Call it at start and every hour or so.
        """
        with self._writing() as state:
            due = next((role for role in ONLINE_ROLES if self._files.is_due(state.of(role))), None)
            if due is not None:
                self._files.write(state, since=due)
            return due is not None

    def renew(self, role: str) -> int:
        """Sign a TUF role again, with a new expiry, before the old one ends; returns the new version.

        Raises:
            RepositoryError: not a TUF role, or its keys cannot be opened (root's are offline: see ``offline_keys``).
        """
        if role not in ROLES or role == DIRECTOR:
            raise RepositoryError(f"{role!r} has no expiry: one of {', '.join(ROLES[:-1])}")
        with self._writing() as state:
            if role == Root.type:
                state.root, data = self._files.sign_root(state.root.signed, copy.deepcopy(state.root.signed))
                self._files.write_root(state.root.signed, data)
            else:
                self._files.write(state, since=role)
            return int(state.of(role).signed.version)

    def rotate(
        self, role: str, *, keyid: str | None = None, external: tuple[str, Key] | None = None
    ) -> tuple[str, ...]:
        """Replace the keys of a role, or the one named; returns the new key ids. Old private files are deleted.

        ``external`` is ``(signer URI, public key)`` of a key in an HSM or KMS; without it, a file is made. Orders
        that the old director key signed are refused from now on: sign and send them again.

        Raises:
            RepositoryError: unknown role or key, or too few keys of root can be opened.
        """
        if role not in ROLES:
            raise RepositoryError(f"{role!r} is no role: one of {', '.join(ROLES)}")
        with self._writing() as state:
            old = _matching(role, list(self._holders(state, role)), keyid)
            if external is not None and len(old) != 1:
                raise RepositoryError(f"role {role} has {len(old)} keys: name the one that {external[0]} replaces")
            try:
                new = [self._keyring.add(role, *external)] if external else [self._keyring.create(role) for _ in old]
                self._replace(state, role, old, new)
            except BaseException:
                with suppress(OSError, RepositoryError):
                    self._forget_unused_keys()
                raise
            self._forget_unused_keys()
            return tuple(key.keyid for key in new)

    def _forget_unused_keys(self) -> None:
        """What holds a role is read anew: an error after the last rename came too late to undo the rotation."""
        state = self._files.load()
        self._keyring.keep_only({keyid for role in ROLES for keyid in self._holders(state, role)})

    def _replace(self, state: Signatures, role: str, old: Sequence[str], new: Sequence[Key]) -> None:
        if role == DIRECTOR:
            keys = self._files.director(state.targets.signed)
            kept = {keyid: public for keyid, public in keys.keys.items() if keyid not in old}
            added = {key.keyid: key.to_dict() for key in new}
            self._set_director(self._files, state, DirectorKeys(threshold=keys.threshold, keys=kept | added))
            self._files.write(state, since=Targets.type)
            return
        root = copy.deepcopy(state.root.signed)
        for keyid in old:
            root.revoke_key(keyid, role)
        for key in new:
            root.add_key(key, role)
        signed, data = self._files.sign_root(state.root.signed, root)
        if role != Root.type:
            # Signed by the old and the new key, this release is good under both roots: no moment is without one.
            coming = self._files.signers(role, [key.keyid for key in new], len(new))
            self._files.write(state, since=role, also=coming)
        self._files.write_root(signed.signed, data)

    def lasting(self, lasting: timedelta, digests: Sequence[str]) -> tuple[dict[str, bytes], datetime]:
        """Return all that a device without a network needs to verify these artifacts, by the names that it asks for.

        Snapshot and timestamp hold ``lasting``, and with them the rest until the time that is returned: the first end
        of any role. Devices that are online never see these two.

        Raises:
            RepositoryError: an artifact is not published, or keys cannot be opened.
        """
        with self._writing() as state:
            found = self._files.sign_lasting(state, lasting)
            ends = min(state.of(role).signed.expires for role in (Root.type, Targets.type, *ONLINE_ROLES))
            self._files.write(state, since=Snapshot.type)
        targets = state.targets.signed
        names = [f"{version}.root.json" for version in range(1, state.root.signed.version + 1)]
        names.append(f"{targets.version}.targets.json")
        indexed = (indexed_target(digest) for digest in digests)
        # A device with an index needs no manifest of megabytes.
        manifests = [
            path if path in targets.targets else manifest_target(digest)
            for path, digest in zip(indexed, digests, strict=True)
        ]
        for path in (DIRECTOR_TARGET, *manifests):
            if path not in targets.targets:
                raise RepositoryError(f"{path} is not published")
            names.append(f"targets/{targets.targets[path].get_prefixed_paths()[0]}")
        for name in names:
            data = self.read(name)
            if data is None:
                raise RepositoryError(f"{self._home.tuf} is damaged: {name} is missing; restore it from a backup")
            found[name] = data
        return found, ends

    def root_bytes(self) -> bytes:
        """Return the newest root: what a bundle embeds.

        Raises:
            RepositoryError: no repository here.
        """
        with _boundary(self._home):
            version = self._files.newest_root()
        data = self.read(f"{version}.root.json")
        if data is None:
            raise RepositoryError(f"{self._home.root} holds no repository: run `phifleet init`")
        return data

    def read(self, name: str) -> bytes | None:
        """Return a file that devices may have, or None; any other name is None without a look at the disk."""
        match = _SERVED.fullmatch(name)
        if match is None:
            return None
        target = match["target"]
        with _boundary(self._home), suppress(FileNotFoundError):
            return (self._files.targets / target if target else self._files.metadata / name).read_bytes()
        return None

    def sign_desired(self, desired: Desired) -> bytes:
        """Return a ``SignedDesired``: DSSE over the order, by as many director keys as the threshold asks for.

        Raises:
            RepositoryError: the repository cannot be read, or too few director keys can be opened.
        """
        with _boundary(self._home):
            keys = self._files.director(self._files.load().targets.signed)
            signers = self._files.signers(DIRECTOR, keys.keys, keys.threshold)
        envelope = Envelope(desired.to_json(), DESIRED_PAYLOAD_TYPE, {})
        for signer in signers:
            with signing(DIRECTOR, signer):
                envelope.sign(signer)
        return canonical_json(envelope.to_dict())

    def status(self) -> tuple[RoleStatus, ...]:
        """Return versions, expiries and keys of every role.

        Raises:
            RepositoryError: no repository here, or it cannot be read.
        """
        with _boundary(self._home):
            state, entries = self._files.load(), self._keyring.entries()
            return tuple(self._status_of(state, entries, role) for role in ROLES)

    def _status_of(self, state: Signatures, entries: Mapping[str, KeyEntry], role: str) -> RoleStatus:
        signed = None if role == DIRECTOR else state.of(role).signed
        keyids = self._holders(state, role)
        return RoleStatus(
            role=role,
            version=signed.version if signed else 0,
            expires=signed.expires if signed else None,
            threshold=self._threshold(state, role),
            keys={keyid: entries[keyid].uri if keyid in entries else "elsewhere" for keyid in keyids},
        )

    def _holders(self, state: Signatures, role: str) -> Sequence[str]:
        if role == DIRECTOR:
            return tuple(self._files.director(state.targets.signed).keys)
        return tuple(state.root.signed.roles[role].keyids)

    def _threshold(self, state: Signatures, role: str) -> int:
        if role == DIRECTOR:
            return self._files.director(state.targets.signed).threshold
        return state.root.signed.roles[role].threshold

    def _set_director(self, files: Release, state: Signatures, keys: DirectorKeys) -> None:
        data = keys.to_json()
        target = _target(DIRECTOR_TARGET, data, None)
        files.write_target(target, data)
        state.targets.signed.targets[DIRECTOR_TARGET] = target

    def _load(self) -> Signatures:
        with _boundary(self._home):
            return self._files.load()

    @contextmanager
    def _writing(self) -> Iterator[Signatures]:
        with self._locked():
            self._files.clean()
            remove_leftovers(self._home.keys)
            state = self._files.load()
            broken = state.broken()
            if broken:
                self._files.write(state, since=broken[0])
            yield state

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _boundary(self._home):
            self._home.root.mkdir(parents=True, exist_ok=True)
            with self._lock:
                yield


@contextmanager
def _boundary(home: Home) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise RepositoryError(
            f"another process has held {home.root / 'trust.lock'} for too long: wait for it, or end it"
        ) from None
    except OSError as error:
        raise RepositoryError(
            f"the repository in {home.root} cannot be read or written: {explained(error, home.root)}"
        ) from error


def _matching(role: str, keyids: list[str], prefix: str | None) -> list[str]:
    found = [keyid for keyid in keyids if prefix is None or keyid.startswith(prefix)]
    if not found:
        raise RepositoryError(f"role {role} has no key {prefix!r}; it has {', '.join(keyid[:12] for keyid in keyids)}")
    return found


def _target(path: str, data: bytes, custom: dict[str, Any] | None) -> TargetFile:
    target = TargetFile.from_data(path, data, ["sha256"])
    if custom is not None:
        target.unrecognized_fields["custom"] = custom
    return target


def _custom(manifest: Manifest) -> dict[str, Any]:
    quality = manifest.quality.model_dump(mode="json") if manifest.quality else None
    # The canonical JSON that TUF signs over has no floats: figures travel as text.
    return {
        "id": manifest.id,
        "model": manifest.model.name,
        "toolchain": manifest.toolchain.value,
        "precision": manifest.precision.value,
        "target": manifest.target.value,
        "size": manifest.size,
        "quality": {name: str(value) for name, value in quality.items()} if quality else None,
    }
