"""Enrolment by token, over HTTPS: what a machine that has no identity yet sends, and the token that it was given.

The private key is made on the machine and never leaves it; what comes back is the bundle without one.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field

from agent.contract.base import CertificateRequest, DeviceId, WireModel

#: Under the controller's URL.
PATH = "/api/v1/enrolments"
CA_PATH = "/api/v1/enrolments/ca"
RENEW_PATH = "/api/v1/enrolments/{device}/renew"
#: Begins a token, so that one that was cut, or is another kind, is noticed before it is sent anywhere.
PREFIX = "phifleet-enrol."


class EnrolmentRequest(WireModel):
    """Asks for a certificate for the key that the request holds."""

    version: int = 1
    token: Annotated[str, Field(min_length=1, max_length=128, repr=False, description="the secret in the token")]
    device: DeviceId
    csr: CertificateRequest


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """What `phifleet device token` prints. ``ca``: SHA-256 of the certificate (DER, hex) of the authority that signed
    the controller's; None: one of the system's authorities did, or the controller is asked on this machine alone.
    """

    secret: str
    ca: str | None = None

    def __str__(self) -> str:
        document = json.dumps({"secret": self.secret, "ca": self.ca}, separators=(",", ":"))
        return PREFIX + base64.urlsafe_b64encode(document.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one.

        Raises:
            ValueError: it is not one, or a part of it is missing; the text never quotes it.
        """
        text = text.strip()
        if not text.startswith(PREFIX):
            raise ValueError(f"an enrolment token begins with {PREFIX}; `phifleet device token` prints one")
        encoded = text.removeprefix(PREFIX)
        try:
            found = json.loads(base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True))
            secret, ca = found["secret"], found["ca"]
        except (binascii.Error, ValueError, KeyError, TypeError):
            raise ValueError("the enrolment token is damaged: a part of it is missing, or was changed") from None
        if not isinstance(secret, str) or not (ca is None or isinstance(ca, str)):
            raise ValueError("the enrolment token is damaged: a part of it is missing, or was changed")
        return cls(secret, ca)
