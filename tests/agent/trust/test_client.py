"""The trust client against the real repository and metadata server."""

from __future__ import annotations

from datetime import timedelta

import pytest

from agent.contract.failures import FailureCode
from agent.core.ports import Trust
from agent.errors import TrustError
from tests.agent.trust.conftest import World
from tests.simulators.link import Faults
from tests.simulators.repository import make_desired, make_manifest, ref


async def test_an_order_and_its_manifest(world: World) -> None:
    manifest = make_manifest()
    world.repository.publish(manifest)
    order = make_desired(world.clock, ref(manifest))
    trust: Trust = world.client
    await trust.refresh()
    assert trust.verify_desired(world.repository.sign_desired(order), 0) == order
    assert await trust.manifest(ref(manifest)) == manifest
