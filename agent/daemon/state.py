"""What the parts of the agent know of themselves, for the others to read: each field has one writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from agent.contract.messages import Failure
from agent.core.deployment import Deployment


@dataclass(slots=True)
class AgentState:
    """Plain values. Whoever changes a field of which the fleet should know calls ``Reporter.report``."""

    #: Written by the deployer.
    deployment: Deployment = field(default_factory=Deployment)
    #: Written by the taking of orders: whether they are held for now, and why the last one was not accepted.
    paused: bool = False
    rejected: Failure | None = None
    #: Written by the agent: where the endpoint listens, and how many orders were no messages at all.
    endpoint: str | None = None
    malformed_messages: int = 0
    #: Written by the renewal of the certificate that the device shows to the broker; None: it shows none.
    certificate_expires_at: datetime | None = None
