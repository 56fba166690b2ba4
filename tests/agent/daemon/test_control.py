"""The control port passes on what became of a command, whatever became of it."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from agent.cli.local import NotRunningError, ask
from agent.daemon import control
from agent.daemon.control import ControlServer
from agent.errors import AgentError, StoreError


async def refusal(folder: Path, error: Exception) -> str:
    """What the person at the device reads when the command raises ``error``."""

    async def command(_: str) -> dict[str, Any]:
        raise error

    server = ControlServer(folder, {"rollback": command})
    await server.start()
    try:
        with pytest.raises(AgentError) as caught:
            await asyncio.to_thread(ask, folder, "rollback")
    finally:
        await server.stop()
    assert not isinstance(caught.value, NotRunningError)
    return str(caught.value)


async def test_a_full_disk_is_passed_on_with_the_file(tmp_path: Path):
    found = await refusal(tmp_path, OSError(errno.ENOSPC, "No space left on device", "/var/lib/x/paused"))
    assert found == "the agent could not carry out `rollback`: No space left on device: /var/lib/x/paused"


async def test_an_error_of_the_agent_is_passed_on_in_its_own_words(tmp_path: Path):
    assert "the journal cannot be written" in await refusal(tmp_path, StoreError("the journal cannot be written"))


async def test_a_defect_is_told_as_one(tmp_path: Path):
    assert await refusal(tmp_path, KeyError("slot")) == "the agent could not carry out `rollback`: KeyError('slot')"


async def test_a_slow_command_is_answered_and_never_stopped_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control, "_PATIENCE_S", 0.05)

    async def command(_: str) -> dict[str, Any]:
        await asyncio.sleep(0.3)  # longer than a peer may take for its request
        return {"ok": "rolled back"}

    server = ControlServer(tmp_path, {"rollback": command})
    await server.start()
    try:
        assert await asyncio.to_thread(ask, tmp_path, "rollback") == {"ok": "rolled back"}
    finally:
        await server.stop()
