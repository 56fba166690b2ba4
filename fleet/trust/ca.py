"""The device certificate authority: per-device client certificates for the broker's mutual TLS.

It guards availability only (who may connect, and by the broker's ACL, to which topics). What a device runs is
guarded by TUF, so a stolen CA key gives nobody a model to put on a device.

ECDSA on P-256, since every broker and cloud takes it. Source: RFC 5280.
"""

from __future__ import annotations

import ipaddress
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from agent.contract.base import DeviceId, sha256_hex
from agent.platform.files import PRIVATE, explained, remove_leftovers, write_atomic
from fleet.errors import RepositoryError, UsageError
from fleet.home import Home
from fleet.trust.clock import utc_now

CA_DAYS = 3650
#: As long as the CA: no date may lock out devices that nobody visits. A device that is lost is revoked.
DEVICE_DAYS = CA_DAYS
SERVER_DAYS = 397
CRL_DAYS = 30
RSA_BITS = 2048

DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

#: A broker's clock may be behind ours by this much.
_SKEW = timedelta(hours=1)

#: A device that woke up in 1970 must still be able to check the broker's certificate; RFC 5280 has no earlier time
#: that every TLS library reads.
_ALWAYS = datetime(1970, 1, 2, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM texts: a certificate, its private key, and the CA that issued it."""

    certificate: str
    private_key: str = field(repr=False)
    ca: str = field(repr=False)
    expires: datetime


class DeviceCA:
    """The CA in ``home.ca``: ``ca.pem``, ``ca-key.pem`` (0600), ``issued/``, ``revoked.json``, and ``crl.pem``.

    ``issued`` has a file a name, so that the next certificate costs the same after a hundred thousand. Before 0.2 it
    was one file, ``issued.json``, which is taken apart when the CA is next used.
    """

    def __init__(self, home: Home, clock: Callable[[], datetime] = utc_now) -> None:
        self._folder = home.ca
        self._clock = clock
        self._lock = FileLock(home.root / "ca.lock", timeout=30)

    @property
    def exists(self) -> bool:
        """Whether ``init`` was completed.

        Raises:
            RepositoryError: the folder cannot be looked at.
        """
        with _boundary(self._folder):
            return (self._folder / "ca.pem").exists()

    def init(self, name: str = "phifleet device CA") -> None:
        """A new CA, good for ten years.

        Raises:
            RepositoryError: there is one already, or the disk refuses.
        """
        with self._locked():
            if self.exists:
                raise RepositoryError(f"{self._folder} holds a CA already: use it, or name another home")
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            now = self._clock()
            certificate = (
                _builder(subject, subject, key.public_key(), _ALWAYS, now + timedelta(days=CA_DAYS))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(sign_certificates=True), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            write_atomic(self._folder / "ca-key.pem", _key_pem(key), PRIVATE)
            self._write_crl(certificate, key, [])
            write_atomic(self._folder / "ca.pem", certificate.public_bytes(Encoding.PEM))

    def ca_pem(self) -> str:
        """Return the CA's certificate, for brokers and bundles.

        Raises:
            RepositoryError: no CA here.
        """
        with _boundary(self._folder):
            return self._ca()[0].public_bytes(Encoding.PEM).decode()

    def enrol(self, device: str, days: float = DEVICE_DAYS) -> Credentials:
        """Return a new key and client certificate, CN = device id. To renew is to enrol again; the old one stays good.

        Raises:
            UsageError: the device id is not one.
            RepositoryError: no CA, or the disk refuses.
        """
        try:
            device = TypeAdapter(DeviceId).validate_python(device)
        except ValidationError:
            raise UsageError(f"{device!r} is no device id: lower case letters, digits and dashes, 63 at most") from None
        return self._certify(device, days, ExtendedKeyUsageOID.CLIENT_AUTH, ())

    def certify(self, device: str, csr_pem: str, days: float = DEVICE_DAYS) -> Credentials:
        """Return a client certificate for the key of a request (PKCS #10); ``private_key`` is empty: it stays there.

        Raises:
            UsageError: the request is not one, or not for this device; see ``read_request``.
            RepositoryError: no CA, or the disk refuses.
        """
        return self._certify(device, days, ExtendedKeyUsageOID.CLIENT_AUTH, (), read_request(csr_pem, device))

    def server_certificate(self, hosts: Sequence[str], days: float = SERVER_DAYS) -> Credentials:
        """For a broker on these host names or addresses: for tests, the demo, and small fleets."""
        if not hosts:
            raise UsageError("a server certificate names at least one host")
        return self._certify(hosts[0], days, ExtendedKeyUsageOID.SERVER_AUTH, hosts)

    def client_certificate(self, name: str, days: float = SERVER_DAYS) -> Credentials:
        """For a controller: its name has a dot, which no device id has, so the broker's ACL can tell them apart."""
        if "." not in name:
            raise UsageError(
                f"{name!r} could be a device's: the name of a controller has a dot, as in fleet.controller"
            )
        return self._certify(name, days, ExtendedKeyUsageOID.CLIENT_AUTH, ())

    def verify(self, certificate_pem: str, signature: bytes, data: bytes) -> str:
        """Return the device whose key has signed ``data``, by the certificate that this CA gave it.

        That the certificate has ended does not matter: the key is the one that was enrolled.

        Raises:
            UsageError: the certificate is none of this CA's, or the signature is wrong.
            RepositoryError: there is no CA here.
        """
        with _boundary(self._folder):
            ca, _ = self._ca()
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
            certificate.verify_directly_issued_by(ca)
            key = certificate.public_key()
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            elif isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, data)
            elif isinstance(key, rsa.RSAPublicKey):
                pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
                key.verify(signature, data, pss, hashes.SHA256())
            else:
                raise UsageError(f"its certificate has a key of the kind {type(key).__name__}, which no device has")
        except InvalidSignature:
            raise UsageError("the signature is wrong, or its certificate is of another fleet") from None
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UsageError(f"its certificate cannot be used: {error}") from None
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(names[0].value) if names else ""

    def revoke(self, device: str) -> int:
        """Put every certificate of a device on ``crl.pem``; returns how many. The broker must read it again."""
        with self._locked():
            now = self._clock().isoformat()
            revoked = self._revoked()
            known = {entry["serial"] for entry in revoked}
            found = [entry for entry in self._issued(device) if entry["serial"] not in known and entry["expires"] > now]
            if found:
                revoked += [{**entry, "revoked": now} for entry in found]
                self._save_revoked(revoked)
            if found or self._crl_lacks(revoked):
                self._write_crl(*self._ca(), revoked)
            return len(found)

    def refresh_crl(self) -> bool:
        """Sign ``crl.pem`` again when half of its time is over, or when it lacks a certificate that was revoked.

        Brokers refuse everybody once it has expired.
        """
        with self._locked():
            ends, revoked = self._crl().next_update_utc, self._revoked()
            due = ends is None or ends - self._clock() < timedelta(days=CRL_DAYS / 2) or self._crl_lacks(revoked)
            if due:
                self._save_revoked(revoked)
                self._write_crl(*self._ca(), self._revoked())
            return due

    def _certify(
        self,
        name: str,
        days: float,
        purpose: x509.ObjectIdentifier,
        hosts: Sequence[str],
        public_key: DeviceKey | None = None,
    ) -> Credentials:
        with self._locked():
            ca, ca_key = self._ca()
            key, now = None, self._clock()
            if public_key is None:
                key = ec.generate_private_key(ec.SECP256R1())
                public_key = key.public_key()
            begins = _ALWAYS if hosts else now - _SKEW
            ends = min(now + timedelta(days=days), ca.not_valid_after_utc)
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            builder = (
                _builder(subject, ca.subject, public_key, begins, ends)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(_usage(sign_certificates=False), critical=True)
                .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            )
            if hosts:
                names = x509.SubjectAlternativeName([_host_name(host) for host in hosts])
                builder = builder.add_extension(names, critical=False)
            certificate = builder.sign(ca_key, hashes.SHA256())
            entry = {"name": name, "serial": f"{certificate.serial_number:x}", "expires": ends.isoformat()}
            self._save_issued(name, [*self._issued(name), entry])
            return Credentials(
                certificate.public_bytes(Encoding.PEM).decode(),
                _key_pem(key).decode() if key is not None else "",
                ca.public_bytes(Encoding.PEM).decode(),
                ends,
            )

    def _ca(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        if not self.exists:
            raise RepositoryError(f"{self._folder} holds no CA: run `phifleet init`")
        path = self._folder / "ca-key.pem"
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise RepositoryError(f"{path} can be read by others: chmod 600 it")
        key = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise RepositoryError(f"{path} is no ECDSA key")
        return x509.load_pem_x509_certificate((self._folder / "ca.pem").read_bytes()), key

    def _issued(self, name: str) -> list[dict[str, str]]:
        return _entries(self._issued_file(name))

    def _save_issued(self, name: str, issued: Sequence[dict[str, str]]) -> None:
        write_atomic(self._issued_file(name), self._live(issued))

    def _issued_file(self, name: str) -> Path:
        # Hashed: the name of a broker may be any host's, and a file system has rules of its own.
        digest = sha256_hex(name.encode())
        return self._folder / "issued" / digest[:2] / f"{digest[2:34]}.json"

    def _revoked(self) -> list[dict[str, str]]:
        return _entries(self._folder / "revoked.json")

    def _save_revoked(self, revoked: Sequence[dict[str, str]]) -> None:
        write_atomic(self._folder / "revoked.json", self._live(revoked))

    def _crl(self) -> x509.CertificateRevocationList:
        return x509.load_pem_x509_crl((self._folder / "crl.pem").read_bytes())

    def _crl_lacks(self, revoked: Sequence[dict[str, str]]) -> bool:
        """Return whether a revocation was written down and the list was not.

        The disk refused, or the process was killed.
        """
        listed, now = {entry.serial_number for entry in self._crl()}, self._clock().isoformat()
        return any(int(entry["serial"], 16) not in listed for entry in revoked if entry["expires"] > now)

    def _live(self, entries: Sequence[dict[str, str]]) -> bytes:
        """Without those that have expired: nobody accepts them any more."""
        now = self._clock().isoformat()
        return json.dumps([entry for entry in entries if entry["expires"] > now], indent=1).encode()

    def _take_apart(self) -> None:
        """The one file of before 0.2; it is removed last, so that an interruption begins again."""
        old = self._folder / "issued.json"
        if not old.exists():
            return
        by_name: dict[str, list[dict[str, str]]] = {}
        for entry in _entries(old):
            by_name.setdefault(entry["name"], []).append(entry)
        for name, entries in by_name.items():
            plain = [{key: value for key, value in entry.items() if key != "revoked"} for entry in entries]
            self._save_issued(name, plain)
        self._save_revoked([entry for entries in by_name.values() for entry in entries if "revoked" in entry])
        old.unlink()

    def _write_crl(
        self, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey, entries: Sequence[dict[str, str]]
    ) -> None:
        now = self._clock()
        builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
        builder = builder.last_update(now - _SKEW).next_update(now + timedelta(days=CRL_DAYS))
        for entry in entries:
            revoked = x509.RevokedCertificateBuilder().serial_number(int(entry["serial"], 16))
            when = datetime.fromisoformat(entry["revoked"])
            builder = builder.add_revoked_certificate(revoked.revocation_date(when).build())
        write_atomic(self._folder / "crl.pem", builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _boundary(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                remove_leftovers(self._folder)
                self._take_apart()
                yield


def _entries(path: Path) -> list[dict[str, str]]:
    return TypeAdapter(list[dict[str, str]]).validate_json(path.read_bytes()) if path.exists() else []


@contextmanager
def _boundary(folder: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise RepositoryError(
            f"another process has held the lock of {folder} for 30 s: wait for it, or end it"
        ) from None
    except OSError as error:
        why = explained(error, folder)
        raise RepositoryError(f"the device CA in {folder} cannot be read or written: {why}") from error
    except ValueError as error:
        raise RepositoryError(f"the device CA in {folder} cannot be read or written: {error}") from error


def read_request(csr_pem: str, device: str) -> DeviceKey:
    """Return the public key of a certificate request, whose sender has the private one.

    Raises:
        UsageError: it cannot be read, is not signed with its own key, is for another name, or its key is weak.
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        signed, key = request.is_signature_valid, request.public_key()
        names = [str(one.value) for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"the certificate request cannot be read: {error}") from None
    if not signed:
        raise UsageError("the certificate request is not signed with its own key")
    if names != [device]:
        raise UsageError(f"the certificate request is for {', '.join(names) or 'nobody'}, and not for {device}")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey) or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= RSA_BITS):
        return key
    raise UsageError("the certificate request's key must be ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 bits")


def key_digest(key: DeviceKey) -> str:
    """Return SHA-256 of a public key (SubjectPublicKeyInfo, DER) in lower case hex."""
    return sha256_hex(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def certificate_digest(pem: str) -> str:
    """Return SHA-256 of a certificate (DER) in lower case hex, as a pin has it."""
    return sha256_hex(x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER))


def issued_by(pem: str, ca_pem: str) -> bool:
    """Return whether the first certificate in ``pem`` was issued by the CA directly."""
    try:
        x509.load_pem_x509_certificate(pem.encode()).verify_directly_issued_by(
            x509.load_pem_x509_certificate(ca_pem.encode())
        )
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: DeviceKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
