"""Where each private key is: a file of public keys and securesystemslib signer URIs, never a list of roles.

Which key holds which role is said by the TUF root and by ``director.json`` alone, so a rotation that is
interrupted cannot leave two opinions. A ``file2:`` URI with a relative path is a PEM in the home's ``keys/``;
any other scheme (``hsm:``, ``awskms:``, ``gcpkms:``, ``azurekms:``, ``hv:``) is opened by securesystemslib.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from agent.platform.files import PRIVATE, write_atomic
from fleet.errors import RepositoryError

FILE_SCHEME = "file2:"


class KeyEntry(BaseModel):
    """One key: what it was made for (for people), where its private half is, and its public half."""

    model_config = ConfigDict(extra="forbid")

    role: str
    uri: str
    public: dict[str, Any]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = 1
    keys: dict[str, KeyEntry] = {}


class Keyring:
    """``keys/keyring.json`` and the PEM files beside it. Not locked: its owner, the repository, is.

    ``offline`` is a second folder in which files are looked for: the medium that holds the root keys.
    """

    def __init__(self, folder: Path, offline: Path | None = None) -> None:
        self._folder = folder
        self._offline = offline
        self._path = folder / "keyring.json"

    def entries(self) -> dict[str, KeyEntry]:
        """By key id.

        Raises:
            RepositoryError: the file is damaged.
        """
        return self._load().keys

    def create(self, role: str) -> Key:
        """Return a new Ed25519 key as a PEM file of mode 0600, entered in the file; its public half."""
        signer = CryptoSigner.generate_ed25519()
        key = signer.public_key
        path = self._folder / f"{role}-{key.keyid[:12]}.pem"
        try:
            write_atomic(path, signer.private_bytes, PRIVATE)
            return self.add(role, FILE_SCHEME + path.name, key)
        except BaseException:
            self._delete_unless_entered(path, key.keyid)
            raise

    def add(self, role: str, uri: str, key: Key) -> Key:
        """Enter a key whose private half is elsewhere, such as in an HSM or a KMS."""
        document = self._load()
        document.keys[key.keyid] = KeyEntry(role=role, uri=uri, public=key.to_dict())
        self._save(document)
        return key

    def keep_only(self, keyids: Collection[str]) -> None:
        """Forget every other key, as one that holds no role any more.

        Its file is deleted first: after a crash or a refusing disk the key is still entered, and the next call deletes
        the rest.
        """
        document = self._load()
        gone = [keyid for keyid in document.keys if keyid not in keyids]
        for keyid in gone:
            path = self._file_of(document.keys.pop(keyid).uri)
            if path is not None:
                path.unlink(missing_ok=True)
        if gone:
            self._save(document)

    def signer(self, keyid: str) -> Signer:
        """Opens the private half.

        Raises:
            RepositoryError: not in the keyring, the file is missing, readable by others, or is another key.
        """
        entry = self._load().keys.get(keyid)
        if entry is None:
            raise RepositoryError(f"{self._path} has no key {keyid[:12]}: restore the keyring, or rotate its role")
        key = Key.from_dict(keyid, dict(entry.public))
        try:
            path = self._file_of(entry.uri)
            return Signer.from_priv_key_uri(entry.uri, key) if path is None else _open_file(path, key)
        except RepositoryError:
            raise
        except Exception as error:  # each kind of signer raises its own: network, PIN, file
            raise RepositoryError(f"cannot open the {entry.role} key {keyid[:12]} at {entry.uri}: {error}") from error

    def _delete_unless_entered(self, path: Path, keyid: str) -> None:
        with suppress(OSError, RepositoryError):
            if keyid not in self._load().keys:
                path.unlink(missing_ok=True)

    def _file_of(self, uri: str) -> Path | None:
        if not uri.startswith(FILE_SCHEME):
            return None
        path = Path(uri.removeprefix(FILE_SCHEME))
        if self._offline is not None and not (self._folder / path).exists():
            return self._offline / path
        return self._folder / path

    def _load(self) -> _Document:
        try:
            return _Document.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _Document()
        except ValidationError as error:
            raise RepositoryError(
                f"{self._path} is damaged ({error.error_count()} problems): restore it from a backup"
            ) from None

    def _save(self, document: _Document) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if os.name == "posix":
            self._folder.chmod(0o700)
        write_atomic(self._path, document.model_dump_json(indent=2).encode(), PRIVATE)


def _open_file(path: Path, key: Key) -> Signer:
    if os.name == "posix" and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RepositoryError(f"{path} can be read by others: chmod 600 it, and rotate the key if others were there")
    if not isinstance(key, SSlibKey):
        raise RepositoryError(f"{path}: a key of type {key.keytype} cannot be a file")
    private = load_pem_private_key(path.read_bytes(), None)
    return CryptoSigner(private, key)
