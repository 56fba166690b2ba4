"""python-tuf's client: brings metadata and targets up to date, and says in our terms what was wrong with them.

Blocking, and imports tuf: it is imported in a thread, when something is verified.

Source: The Update Framework specification 1.0, section 5, "detailed client workflow".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import Updater, UpdaterConfig

from agent.contract.base import MalformedMessageError
from agent.contract.director import DIRECTOR_TARGET, ISSUED_AT_FIELD, DirectorKeys
from agent.contract.failures import FailureCode
from agent.errors import TrustError
from agent.platform.files import PRIVATE, sync_file, sync_folder, write_atomic
from agent.trust.disk import disk_error
from agent.trust.fetcher import METADATA_URL, TARGETS_URL, LinkFetcher
from agent.trust.time import VerifiedClock

#: A manifest without an index names each 64 KiB of an artifact in about 75 bytes: this is enough for 50 GB.
MAX_TARGET_BYTES = 64 * 1024 * 1024

#: Manifests kept, so that a restart does not fetch them again.
KEPT_TARGETS = 8


class Updates:
    """The trusted metadata in ``folder``, starting from the ``root`` that the bundle brought."""

    def __init__(self, folder: Path, root: bytes, clock: VerifiedClock) -> None:
        self._metadata = folder / "metadata"
        self._targets = folder / "targets"
        self._root = root
        self._clock = clock

    def refresh(self, fetcher: LinkFetcher) -> Updater:
        """All top-level metadata, then the director's keys.

        Raises:
            TrustError: the code says which attack or fault; what was verified before it stays.
        """
        with self._mapped():
            self._metadata.mkdir(parents=True, exist_ok=True)
            self._targets.mkdir(parents=True, exist_ok=True)
            self._clean()
            updater = self._refresh(fetcher)
            self._bound_clock(updater)
            for path in (*self._metadata.glob("*.json"), self._metadata):
                sync_folder(path) if path.is_dir() else sync_file(path)
        self.target(updater, DIRECTOR_TARGET)
        return updater

    def target(self, updater: Updater, *paths: str) -> bytes:
        """Return the bytes of the first of these targets that is signed, from disk where they are those signed now.

        Raises:
            TrustError: none is in the signed targets, or its bytes do not come as signed.
        """
        with self._mapped():
            infos = ((path, updater.get_targetinfo(path)) for path in paths)
            path, info = next((found for found in infos if found[1] is not None), (paths[-1], None))
            if info is None:
                raise TrustError(f"{path} is not among the signed targets", FailureCode.TRUST_NOT_FOUND)
            if info.length > MAX_TARGET_BYTES:
                raise TrustError(f"{path} has {info.length} bytes, at most {MAX_TARGET_BYTES} are taken")
            kept = self._targets / Path(path).name
            if updater.find_cached_target(info, str(kept)) is None:
                arriving = self._targets / f".new-{kept.name}"
                try:
                    updater.download_target(info, str(arriving))
                    write_atomic(kept, arriving.read_bytes(), PRIVATE)
                finally:
                    arriving.unlink(missing_ok=True)
                self._prune()
            return kept.read_bytes()

    def director(self) -> DirectorKeys | None:
        """Return the director's keys as far as this device knows, verified from the root of trust on.

        None without them.

        Expiry is not looked at: an order is only the first step, and the next one refreshes.
        """
        try:
            data = (self._metadata / "targets.json").read_bytes()
            targets = Metadata[Targets].from_bytes(data)
            self._newest_root().verify_delegate(Targets.type, targets.signed_bytes, targets.signatures)
            keys = (self._targets / DIRECTOR_TARGET).read_bytes()
            targets.signed.targets[DIRECTOR_TARGET].verify_length_and_hashes(keys)
            return DirectorKeys.from_json(keys)
        except (FileNotFoundError, tuf_errors.RepositoryError, MalformedMessageError, KeyError):
            return None
        except OSError as error:  # a disk that does not read must not look like a signature that is wrong
            raise disk_error(error, self._metadata) from error

    def _newest_root(self) -> Root:
        root = Metadata[Root].from_bytes(self._root).signed
        while True:
            try:
                data = (self._metadata / "root_history" / f"{root.version + 1}.root.json").read_bytes()
                following = Metadata[Root].from_bytes(data)
                root.verify_delegate(Root.type, following.signed_bytes, following.signatures)
                following.signed.verify_delegate(Root.type, following.signed_bytes, following.signatures)
            except (FileNotFoundError, tuf_errors.RepositoryError):
                return root
            root = following.signed

    def _refresh(self, fetcher: LinkFetcher) -> Updater:
        try:
            return self._refresh_once(fetcher)
        except tuf_errors.ExpiredMetadataError:
            # A new root may have replaced the keys whose word set the clock: then their word no longer counts.
            if not self._clock.distrust(self._newest_root().roles["timestamp"].keyids):
                raise
            return self._refresh_once(fetcher)

    def _refresh_once(self, fetcher: LinkFetcher) -> Updater:
        updater = Updater(
            metadata_dir=str(self._metadata),
            metadata_base_url=METADATA_URL,
            target_dir=str(self._targets),
            target_base_url=TARGETS_URL,
            fetcher=fetcher,
            config=UpdaterConfig(max_root_rotations=1024),
            bootstrap=self._root,
        )
        # ngclient takes the time from the system and offers no other way; this one knows the verified lower bound.
        updater._trusted_set.reference_time = self._clock.now()
        updater.refresh()
        return updater

    def _bound_clock(self, updater: Updater) -> None:
        trusted = updater._trusted_set  # the public interface gives targets only
        keyids = trusted.root.roles["timestamp"].keyids
        self._clock.distrust(keyids)
        text = trusted.timestamp.unrecognized_fields.get(ISSUED_AT_FIELD)
        with suppress(ValueError):
            issued_at = datetime.fromisoformat(str(text)).astimezone(UTC)
            # Nobody signs with what has ended: the offline roles bound how far a thief of the online keys can lie.
            if issued_at < min(role.expires for role in trusted):
                self._clock.verified(issued_at, keyids)

    def _clean(self) -> None:
        # What a killed agent had begun to write; ngclient's temporary files begin with tmp.
        for leftovers in (self._metadata.glob("tmp*"), self._targets.glob(".new-*")):
            for path in leftovers:
                path.unlink(missing_ok=True)

    def _prune(self) -> None:
        manifests = [path for path in self._targets.glob("*.json") if path.name != DIRECTOR_TARGET]
        manifests.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in manifests[KEPT_TARGETS:]:
            path.unlink(missing_ok=True)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except tuf_errors.ExpiredMetadataError as error:
            raise TrustError(
                f"{error}, and {self._clock.explain()}; a controller that is running signs it again",
                FailureCode.TRUST_EXPIRED,
            ) from error
        except tuf_errors.BadVersionNumberError as error:
            raise TrustError(f"older metadata than was seen before: {error}", FailureCode.TRUST_REPLAY) from error
        except tuf_errors.RepositoryError as error:
            raise TrustError(f"metadata cannot be trusted: {error}", FailureCode.TRUST_SIGNATURE) from error
        except tuf_errors.DownloadLengthMismatchError as error:
            raise TrustError(f"more bytes than there may be: {error}", FailureCode.TRUST_SIGNATURE) from error
        except tuf_errors.DownloadHTTPError as error:
            raise TrustError(str(error), FailureCode.TRUST_NOT_FOUND) from error
        except tuf_errors.DownloadError as error:
            raise TrustError(str(error), FailureCode.TRUST_UNREACHABLE) from error
        except OSError as error:
            raise disk_error(error, self._metadata) from error
