"""Why a connection does not come about, in words that say what is known and no more.

An exception of the socket or of TLS, an alert that the broker sent, or a connection that ended without a word: each
has one text here. What to check follows the fact; a guess is never told as the reason.
"""

from __future__ import annotations

import re
import socket
import ssl

from paho.mqtt.client import WebsocketConnectionError
from socks import ProxyError

#: Names that OpenSSL gives to the alerts of a peer (RFC 8446, section 6) and to its own failures.
_TLS = {
    "CERTIFICATE_REQUIRED": "the broker asks for a client certificate, and none was sent",
    "CERTIFICATE_REVOKED": "the broker says that this client's certificate was revoked",
    "CERTIFICATE_EXPIRED": "the broker says that this client's certificate has expired",
    "CERTIFICATE_UNKNOWN": "the broker does not accept this client's certificate",
    "BAD_CERTIFICATE": "the broker does not accept this client's certificate",
    "UNSUPPORTED_CERTIFICATE": "the broker does not accept this client's kind of certificate",
    "UNKNOWN_CA": "the broker does not know the authority that signed this client's certificate",
    "ACCESS_DENIED": "the broker denies this client access",
    "HANDSHAKE_FAILURE": "the broker refuses the handshake",
    "PROTOCOL_VERSION": "the broker and this client have no version of TLS in common",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS; mqtt:// is for brokers without it",
    "UNEXPECTED_EOF_WHILE_READING": "the broker ended the connection during the handshake",
}
_AUTHORITY = "that the CA file of this device is the one of the authority that signed the broker's certificate"
#: What to look at, by OpenSSL's verification code (X509_V_ERR_* in x509_vfy.h).
_CHECK = {
    9: "this device's clock and the dates in the broker's certificate",  # not yet valid
    10: "this device's clock and the dates in the broker's certificate",  # expired
    18: _AUTHORITY,  # self-signed
    19: _AUTHORITY,  # a self-signed one in the chain
    20: _AUTHORITY,  # the issuer is not known
    21: _AUTHORITY,  # the first one cannot be verified
    62: "that the host in the broker's URL is a name in its certificate",
    64: "that the address in the broker's URL is one in its certificate",
}
_ALERT = re.compile(r"\[SSL: (\w+)\]")
NO_WORD = (
    "the broker ended the connection without an answer to CONNECT; a listener for TLS does so to a client without "
    "it: check mqtt:// against mqtts:// and the port"
)


def of_exception(error: Exception, host: str, port: int) -> str:
    """Return the text for what connecting raised."""
    match error:
        case ssl.SSLCertVerificationError():
            check = _CHECK.get(error.verify_code, "")
            text = error.verify_message or error.reason or error
            found = f"TLS fails: the broker's certificate is refused: {text}{'; check ' if check else ''}{check}"
        case ssl.SSLError():
            name = getattr(error, "reason", None) or ""
            found = of_log(str(error)) or f"TLS fails: {_of_name(name) or name or error}"
        case ProxyError():
            found = f"the proxy does not connect to {host}, port {port}: {error}"
        case WebsocketConnectionError():
            found = (
                f"what listens at {host}, port {port}, does not open a WebSocket: {error}; check the path in the"
                " broker's URL, and that MQTT over WebSocket is served there"
            )
        case socket.gaierror():
            found = f"the name {host} cannot be resolved: {error.strerror or error}"
        case ConnectionRefusedError():
            found = f"nobody listens at {host}, port {port}: the connection was refused"
        case TimeoutError():
            found = f"no answer from {host}, port {port}, in time"
        case _:
            found = f"{getattr(error, 'strerror', '') or error}"
    return found


def of_log(line: str) -> str | None:
    """Return the text for an alert of TLS that a line of the MQTT client's log tells of; None where it tells of none.

    With TLS 1.3 a broker refuses a client's certificate after the handshake, when the first bytes are read.
    """
    found = _ALERT.search(line)
    if found is None:
        return None
    return f"TLS fails: {_of_name(found.group(1)) or found.group(1).lower().replace('_', ' ')}"


def _of_name(name: str) -> str | None:
    return next((text for end, text in _TLS.items() if name.endswith(end)), None)
