"""Keys, roles and certificates that cannot be what is asked for: each is refused in words, and nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import CryptoSigner, Key

from fleet.errors import RepositoryError, UsageError
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.keyring import FILE_SCHEME, Keyring
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_repository


@pytest.fixture
def ca(tmp_path: Path) -> DeviceCA:
    made = DeviceCA(Home(tmp_path))
    made.init()
    return made


def test_a_server_certificate_names_a_host(ca: DeviceCA) -> None:
    with pytest.raises(UsageError, match="names at least one host"):
        ca.server_certificate([])


def test_a_ca_key_that_others_can_read_signs_nothing(ca: DeviceCA, tmp_path: Path) -> None:
    (tmp_path / "ca" / "ca-key.pem").chmod(0o644)
    with pytest.raises(RepositoryError, match="can be read by others: chmod 600"):
        ca.enrol("pi-1")


def test_a_ca_key_of_another_kind_is_named(ca: DeviceCA, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "ca" / "ca-key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(RepositoryError, match="is no ECDSA key"):
        ca.enrol("pi-1")


def test_a_key_that_the_keyring_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="has no key abcdefabcdef: restore the keyring, or rotate its role"):
        Keyring(tmp_path).signer("abcdef" * 10)


def test_a_key_of_another_library_cannot_be_a_file(tmp_path: Path) -> None:
    class Foreign(Key):
        def to_dict(self) -> dict[str, object]:
            return dict(self._to_dict())

        @classmethod
        def from_dict(cls, keyid: str, key_dict: dict[str, object]) -> Foreign:
            return cls(keyid, "hsm", "hsm", {"public": "x"})

        def verify_signature(self, signature: object, data: bytes) -> None:
            raise NotImplementedError

    from fleet.trust import keyring

    with pytest.raises(RepositoryError, match="a key of type hsm cannot be a file"):
        keyring._open_file(tmp_path / "key.pem", Foreign("ab" * 32, "hsm", "hsm", {"public": "x"}))


def test_keys_of_an_hsm_are_forgotten_and_no_file_is_looked_for(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    kept = keyring.create("targets")
    elsewhere = CryptoSigner.generate_ed25519().public_key
    keyring.add("targets", "hsm:2", elsewhere)
    keyring.keep_only([kept.keyid])
    assert list(keyring.entries()) == [kept.keyid]
    keyring.keep_only([kept.keyid])
    assert keyring.signer(kept.keyid).public_key == kept


def test_a_key_on_the_offline_medium_is_found_there(tmp_path: Path) -> None:
    here, medium = tmp_path / "keys", tmp_path / "usb"
    medium.mkdir()
    key = Keyring(here).create("root")
    (file,) = here.glob("root-*.pem")
    file.rename(medium / file.name)
    assert Keyring(here, medium).signer(key.keyid).public_key == key
    with pytest.raises(RepositoryError, match=f"cannot open the root key .* at {FILE_SCHEME}"):
        Keyring(here).signer(key.keyid)


@pytest.mark.parametrize("role", ["director", "nobody", ""])
def test_what_has_no_expiry_is_not_renewed(tmp_path: Path, role: str) -> None:
    repository = make_repository(tmp_path, FakeClock())
    with pytest.raises(RepositoryError, match="has no expiry: one of root, targets, snapshot, timestamp"):
        repository.renew(role)


def test_a_role_that_there_is_not_is_not_rotated(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, FakeClock())
    with pytest.raises(RepositoryError, match="'nobody' is no role: one of root"):
        repository.rotate("nobody")
