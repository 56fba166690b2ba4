"""Orders that come, are held, and are tried again."""

from __future__ import annotations

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, Failure
from agent.core.deployment import Deployment
from agent.daemon.orders import Orders
from agent.daemon.state import AgentState
from agent.errors import TrustError
from tests.waiting import until


class Refuses:
    """Implements ports.Trust: counts what it is asked to check, and refuses it."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def verify_desired(self, payload: bytes, newest_sequence: int) -> Desired:
        self.asked.append(payload)
        raise TrustError("it is for another device", FailureCode.TRUST_WRONG_DEVICE)

    async def refresh(self) -> None:
        return

    async def manifest(self, ref: ArtifactRef) -> Manifest:
        raise AssertionError("nothing was accepted")


async def test_an_order_that_could_not_be_taken_is_tried_again_if_there_was_one() -> None:
    trust, state, rejected = Refuses(), AgentState(Deployment()), []
    orders = Orders(trust, lambda attempt: 0.0, state, lambda order: None, lambda: rejected.append(1))
    full = Failure(code=FailureCode.STORE_DISK_FULL, message="no room")
    orders.again(full)
    assert (state.rejected, trust.asked) == (full, []), "after a restart none has come yet"
    orders.take(b"order")
    await until(lambda: rejected, "it is refused")
    orders.again(full)
    await until(lambda: len(trust.asked) == 2, "it is tried again")
    orders.pause()
    orders.take(b"newer")
    assert len(trust.asked) == 2, "held"
    orders.resume()
    await until(lambda: trust.asked[-1] == b"newer", "what was held is taken")
    await orders.end()
