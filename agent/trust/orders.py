"""Orders: DSSE envelopes over ``Desired``, signed by the director.

Source: DSSE 1.0 protocol, securesystemslib.dsse. Imported when something is verified.
"""

from __future__ import annotations

import copy

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key

from agent.contract.base import MalformedMessageError
from agent.contract.director import DirectorKeys
from agent.contract.messages import DESIRED_PAYLOAD_TYPE, Desired, SignedDesired
from agent.errors import TrustError


def verified_order(signed: SignedDesired, keys: DirectorKeys | None) -> Desired:
    """Return the order, when at least the threshold of the director's keys has signed it.

    Raises:
        TrustError: a signature is wrong or by an unknown key, or what is signed is no order.
    """
    if signed.payloadType != DESIRED_PAYLOAD_TYPE:
        raise TrustError(f"the order is of type {signed.payloadType[:80]!r}, not {DESIRED_PAYLOAD_TYPE!r}")
    envelope = _envelope(signed)
    known = set(keys.keys) & set(envelope.signatures) if keys else set()
    if keys is None or len(known) < keys.threshold:
        signers = ", ".join(sorted(keyid[:12] for keyid in envelope.signatures))
        raise TrustError(f"the order is signed by {signers}, which is no key of the director as far as known here")
    try:
        envelope.verify([Key.from_dict(keyid, dict(keys.keys[keyid])) for keyid in sorted(known)], keys.threshold)
        return Desired.from_json(envelope.payload)
    except VerificationError as error:
        raise TrustError(f"the signature of the order is wrong: {error}") from error
    except MalformedMessageError as error:
        raise TrustError(f"what is signed is no order: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrustError(f"a key of the director cannot be read: {error}") from error


def _envelope(signed: SignedDesired) -> Envelope:
    try:
        return Envelope.from_dict(copy.deepcopy(signed.model_dump()))
    except Exception as error:  # it raises as its input makes it: base64, keys, types
        raise TrustError(f"the order is no DSSE envelope: {error!r}") from error
