"""Becoming a device with a token: the key is made here and never leaves; what comes back is the bundle without one.

The controller is asked over HTTPS. Where the token has a pin, the authority's certificate is fetched first, over a
connection that proves nothing, and compared with the pin; the token is sent only over a connection that this authority
vouches for. That is how ``kubeadm join`` does it.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from agent.contract.base import MalformedMessageError
from agent.contract.bundle import Bundle
from agent.contract.enrolment import CA_PATH, PATH, RENEW_PATH, EnrolmentRequest, EnrolmentToken
from agent.contract.messages import CertificateWant
from agent.errors import ConfigError, UnavailableError
from agent.platform.addresses import is_loopback
from agent.platform.files import PRIVATE, reason, write_atomic
from agent.platform.http import opener

TIMEOUT_S = 30.0
#: Between two questions while an operator has not yet decided.
POLL_S = 5.0
#: An answer is a bundle: a root of trust, and two certificates.
MAX_ANSWER_BYTES = 4 * 2**20
_KEY, _CONTROLLER = "enrolment-key.pem", "controller.json"


@dataclass(frozen=True, slots=True)
class Asking:
    """Whom to ask, with what, and as which device."""

    url: str
    token: EnrolmentToken
    device: str


def default_device() -> str:
    """Return this machine's host name as a device id; empty where nothing of it can be one."""
    name = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return name[:63].rstrip("-")


def enrol_by_token(
    asking: Asking, state_folder: Path, waiting: Callable[[], None], sleep: Callable[[float], None]
) -> Bundle:
    """Ask until the controller has decided; returns the whole bundle. An interrupted run is gone on with by the next.

    ``waiting`` is called once when an operator has to accept this machine, ``sleep`` between two questions.

    Raises:
        ConfigError: the URL cannot be used, or the controller refuses; says why.
        UnavailableError: the controller cannot be reached or does not answer as one, or the disk refuses.
    """
    controller = _Controller(asking)
    key, csr = _key_and_request(state_folder / "identity", asking.device)
    wanted = EnrolmentRequest(token=asking.token.secret, device=asking.device, csr=csr)
    told = False
    while True:
        answer = controller.call("POST", PATH, wanted.to_json())
        if answer.get("bundle") is not None:
            return _bundle(answer["bundle"], key, controller)
        if answer.get("state") != "waiting":
            raise controller.strange("it says neither that this machine waits nor that it is enrolled")
        if not told:
            waiting()
            told = True
        sleep(POLL_S)


def forget_key(state_folder: Path) -> None:
    """The key is where the identity keeps it now.

    Raises:
        UnavailableError: the disk refuses.
    """
    path = state_folder / "identity" / _KEY
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be removed: {reason(error, path.parent)}") from error


def _bundle(values: Any, key: str, controller: _Controller) -> Bundle:
    if not isinstance(values, dict):
        raise controller.strange("its bundle is none")
    if values.get("certificate"):
        values = values | {"private_key": key}
    try:
        return Bundle.from_json(json.dumps(values))
    except MalformedMessageError as error:
        raise controller.strange(f"its bundle is damaged: {error}") from None


def _key_and_request(folder: Path, device: str) -> tuple[str, str]:
    """The key of an enrolment that was interrupted is used again: the controller knows it by its key."""
    from agent.trust.keys import key_pem, new_key, read_key, request_for

    path = folder / _KEY
    try:
        key = read_key(path.read_bytes())
    except FileNotFoundError:
        key = new_key()
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the key {path} cannot be read: {error}; remove it and enrol again") from error
    try:
        write_atomic(path, key_pem(key).encode(), PRIVATE)
    except OSError as error:
        raise UnavailableError(f"the key {path} cannot be written: {reason(error, folder)}") from error
    return key_pem(key), request_for(key, device)


def remember_controller(state_folder: Path, url: str, token: EnrolmentToken) -> None:
    """Write down whom to ask for a certificate when the broker accepts the old one no more.

    Raises:
        UnavailableError: the disk refuses.
    """
    path = state_folder / "identity" / _CONTROLLER
    try:
        write_atomic(path, json.dumps({"url": url, "ca": token.ca}).encode(), PRIVATE)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {reason(error, path.parent)}") from error


def renew_at_controller(identity_folder: Path, device: str, csr: str) -> str | None:
    """Return a new certificate for the old key from the controller's API; None if no controller was written down.

    Raises:
        ConfigError: the controller refuses.
        UnavailableError: it cannot be reached, or does not answer as one.
    """
    path = identity_folder / _CONTROLLER
    try:
        known = json.loads(path.read_bytes())
        asking = Asking(str(known["url"]), EnrolmentToken("", known["ca"]), device)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnavailableError(f"{path} cannot be read: {error}") from error
    controller = _Controller(asking)
    answer = controller.call("POST", RENEW_PATH.format(device=device), CertificateWant(csr=csr).to_json())
    certificate = answer.get("certificate")
    if not isinstance(certificate, str):
        raise controller.strange("there is no certificate in its answer")
    return certificate


class _Controller:
    """The controller's HTTP API, as far as a machine without an identity needs it."""

    def __init__(self, asking: Asking) -> None:
        self._url = asking.url.rstrip("/")
        _check_url(self._url)
        self._opener = opener(self._context(asking.token))

    def call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the answer.

        Raises:
            ConfigError: it refuses.
            UnavailableError: it cannot be reached, or does not answer as a controller does.
        """
        return self._call(self._opener, method, path, body)

    def strange(self, why: str) -> UnavailableError:
        """Return the error for an answer that no controller gives."""
        return UnavailableError(f"{self._url} does not answer as a controller of phifleet does: {why}")

    def _context(self, token: EnrolmentToken) -> ssl.SSLContext | None:
        if not self._url.startswith("https://"):
            return None
        if token.ca is None:
            return ssl.create_default_context()
        unproven = ssl.create_default_context()
        unproven.check_hostname, unproven.verify_mode = False, ssl.CERT_NONE
        pem = self._call(opener(unproven), "GET", CA_PATH).get("certificate")
        try:
            found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem or "")).hexdigest()
            context = ssl.create_default_context(cadata=pem) if found == token.ca else None
        except (ValueError, TypeError, ssl.SSLError):
            raise self.strange("its authority has no certificate") from None
        if context is None:
            raise ConfigError(
                f"{self._url} is not the controller that the token is for: its authority's certificate is another one."
                " The token was not sent. Check the URL, and that nobody answers in the controller's place"
            )
        return context

    def _call(
        self, asked_by: urllib.request.OpenerDirector, method: str, path: str, body: bytes | None = None
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(self._url + path, body, headers, method=method)  # noqa: S310 - http(s) alone
        try:
            with asked_by.open(request, timeout=TIMEOUT_S) as response:
                raw = response.read(MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except (urllib.error.URLError, OSError, HTTPException, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise UnavailableError(f"the controller at {self._url} cannot be asked: {_told(why)}") from None
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.strange("its answer is no JSON object")
        return answer

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """A problem as RFC 9457 has it is the controller's; anything else is not."""
        try:
            problem = json.loads(error.read(MAX_ANSWER_BYTES))
            detail, code = str(problem["detail"]), str(problem["code"])
        except (OSError, ValueError, KeyError, TypeError, HTTPException):
            raise self.strange(f"status {error.code}") from None
        text = f"the controller refuses: {detail}"
        raise (UnavailableError if error.code >= 500 else ConfigError)(f"{text} ({code})") from None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"--url {url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"--url {url!r}: write https://HOST:PORT, as the controller's API is reached")
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigError(f"--url {url}: the token would be sent in the clear; use https")


def _told(why: object) -> str:
    if isinstance(why, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {why.verify_message}"
    return str(getattr(why, "strerror", None) or why)
