"""An OpenSSF model signature over a folder, which ``model_signing verify`` accepts.

The key is an ECDSA key on P-256 in the home, or one of the operator's. It says who exported a folder, to people outside
of the fleet; devices do not look at it, they trust the signed TUF targets.

Source: https://github.com/ossf/model-signing-spec.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from agent.platform.files import PRIVATE, write_atomic
from fleet.errors import UsageError
from fleet.home import Home

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
#: In the exported folder.
SIGNATURE = "model.sig"


def signing_key(home: Home) -> Path:
    """Return the file of the home's own key, which is made when it is first wanted (mode 0600)."""
    path = home.keys / "model-signing.pem"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        home.keys.mkdir(parents=True, exist_ok=True)
        if os.name == "posix":
            home.keys.chmod(0o700)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(path, pem, PRIVATE)
    return path


def public_key(key: Path) -> bytes:
    """Return the public half of the key in the file, as PEM.

    Raises:
        UsageError: no such file, others can read it, it needs a password, or it is no key that the signature can have.
    """
    try:
        if os.name == "posix" and stat.S_IMODE(key.stat().st_mode) & 0o077:
            raise UsageError(f"{key} can be read by others: chmod 600 it, and replace the key if others were there")
        private = load_pem_private_key(key.read_bytes(), None)
    except OSError as error:
        raise UsageError(f"{key}: cannot be read: {error.strerror or error}") from None
    except TypeError:
        raise UsageError(f"{key}: is protected by a password; take it off into a file of mode 0600") from None
    except ValueError:
        raise UsageError(f"{key}: is no private key in PEM") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in _CURVES:
        raise UsageError(f"{key}: a model signature takes an ECDSA key on P-256, P-384 or P-521; "
                         "`openssl ecparam -name prime256v1 -genkey -noout` makes one")  # fmt: skip
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign_folder(folder: Path, key: Path) -> Path:
    """Sign every file in ``folder`` into its ``model.sig``, and return that.

    Raises:
        UsageError: the library that signs is not installed.
    """
    try:
        from model_signing import signing
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("model_signing"):
            raise
        raise UsageError("--sign needs a library that is not installed: pip install 'phifleet[sign]'") from None
    signature = folder / SIGNATURE
    config = signing.Config()  # type: ignore[no-untyped-call]  # its constructor has no annotation
    config.use_elliptic_key_signer(private_key=key).sign(folder, signature)
    return signature
