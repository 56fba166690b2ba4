"""Transfers over a real broker whose link or disk refuses: the right error, and nothing is lost or stays claimed."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import Progress
from agent.errors import LinkError, StoreError, TransferError
from agent.store import fetch as fetch_module
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from agent.store.partial import Partial
from tests.disk import MIB
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.broker import Broker
from tests.simulators.transfer import linked, only, serving


class Device:
    def __init__(self, link: Any, home: Path, manifest: Manifest) -> None:
        self.store = ArtifactStore(home, reserve_bytes=0)
        self.link, self.manifest = link, manifest

    async def fetch(self) -> Progress:
        fetcher = Fetcher(self.link, self.store, f"d-{uuid.uuid4().hex[:8]}")
        return await fetcher.fetch(self.manifest, window_bytes=MIB, stall_s=10, on_progress=lambda _: None)

    async def fetch_the_rest(self) -> Progress:
        progress = await self.fetch()
        self.store.verify(self.manifest.digest)
        return progress


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_artifact(tmp_path / "source", {"model.bin": noise(3 * MIB, uuid.uuid4().int)})


@asynccontextmanager
async def device_of(broker: Broker, tmp_path: Path, manifest: Manifest) -> AsyncIterator[Device]:
    async with serving(broker.url, only(manifest, tmp_path / "source")), linked(broker.url) as link:
        yield Device(link, tmp_path / "device", manifest)


async def test_a_broker_that_refuses_the_chunks_topics_is_named_and_nothing_stays_claimed(
    embedded_broker: Broker, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(embedded_broker, tmp_path, manifest) as device:
        with monkeypatch.context() as patch:

            async def refuse(*_: object, **__: object) -> None:
                raise LinkError("broker: refuses the subscription: not authorized")

            patch.setattr(device.link, "subscribe", refuse)
            with pytest.raises(TransferError, match="not authorized") as caught:
                await device.fetch()
        assert caught.value.code is FailureCode.TRANSFER_UNAVAILABLE
        await device.fetch_the_rest()


async def test_a_request_that_the_broker_refuses_is_sent_again(
    embedded_broker: Broker, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(embedded_broker, tmp_path, manifest) as device:
        publish, refused = device.link.publish, iter(range(2))

        async def flaky(*arguments: Any, **more: Any) -> None:
            if next(refused, None) is not None:
                raise LinkError("broker: quota exceeded")
            await publish(*arguments, **more)

        monkeypatch.setattr(device.link, "publish", flaky)
        await device.fetch_the_rest()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_refuses_in_the_middle_costs_only_what_it_refused(
    embedded_broker: Broker, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async with device_of(embedded_broker, tmp_path, manifest) as device:
        write, left = os.pwrite, [int(2.5 * MIB)]

        def refuse(descriptor: int, data: Any, offset: int) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
            return write(descriptor, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            with pytest.raises(StoreError) as caught:
                await device.fetch()
        expected = FailureCode.STORE_IO if code == errno.EIO else FailureCode.STORE_DISK_FULL
        assert caught.value.code is expected
        assert (await device.fetch_the_rest()).bytes_received < 0.4 * manifest.size


async def test_a_disk_that_refuses_while_the_bytes_are_brought_to_it_ends_the_transfer(
    embedded_broker: Broker, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(embedded_broker, tmp_path, manifest) as device:

        def refuse(_: Partial) -> None:
            raise StoreError("cannot write: No space left on device", FailureCode.STORE_DISK_FULL)

        with monkeypatch.context() as patch:
            patch.setattr(fetch_module, "FLUSH_BYTES", MIB // 2)
            patch.setattr(Partial, "flush", refuse)
            patch.setattr(Partial, "sync", refuse)
            with pytest.raises(StoreError, match="No space left") as caught:
                await device.fetch()
        assert caught.value.code is FailureCode.STORE_DISK_FULL
        assert (await device.fetch_the_rest()).bytes_received < manifest.size
