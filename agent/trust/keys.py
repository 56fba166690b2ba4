"""The device's key and the requests that it signs. Imports cryptography, so it is imported when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a device must know of one. ``key``: its public key, SubjectPublicKeyInfo in DER."""

    name: str
    begins: datetime
    ends: datetime
    key: bytes

    @property
    def renewal_at(self) -> datetime:
        """When two thirds of its time are over."""
        return self.begins + (self.ends - self.begins) * 2 / 3


def new_key() -> PrivateKey:
    """Return an ECDSA key on P-256, which every broker takes."""
    return ec.generate_private_key(ec.SECP256R1())


def read_key(pem: bytes) -> PrivateKey:
    """Read a private key.

    Raises:
        ValueError: it is none, or of a kind that no certificate is asked for.
    """
    try:
        key = load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, PrivateKey):
        raise ValueError(f"a key of the kind {type(key).__name__} is not used")  # noqa: TRY004 - what is wrong is the file
    return key


def key_pem(key: PrivateKey) -> str:
    """Return a private key as PEM, PKCS #8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_bytes(key: PrivateKey) -> bytes:
    """Return the public key, SubjectPublicKeyInfo in DER."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def request_for(key: PrivateKey, device: str) -> str:
    """Return a certificate request (PKCS #10, PEM) for the device."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return request.public_bytes(Encoding.PEM).decode()


def signature_of(key: PrivateKey, data: bytes) -> bytes:
    """Sign with the device's key: ECDSA with SHA-256, Ed25519, or RSA-PSS with SHA-256."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    return key.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH), hashes.SHA256())


def read_certificate(pem: str | bytes) -> Certificate:
    """Read a certificate.

    Raises:
        ValueError: it is none.
    """
    found = x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    names = [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    key = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Certificate(names[0] if names else "", found.not_valid_before_utc, found.not_valid_after_utc, key)
