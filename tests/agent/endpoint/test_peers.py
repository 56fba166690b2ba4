"""Programs on one machine are told apart, by process where the system says it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import aiohttp
import pytest

from agent.endpoint.http import peers
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and SO_PEERCRED are Linux's")
BODY = {"model": MODEL, "messages": HELLO}
CLIENT = """
import http.client, json, socket, sys
class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)
where, body = sys.argv[1:]
for _ in range(2):
    connection = (Unix if where.startswith("/") else http.client.HTTPConnection)(where)
    headers = {"Content-Type": "application/json", "Host": "localhost"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    assert connection.getresponse().status == 200
"""


async def ask_from_another_process(where: str) -> int:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, where, json.dumps(BODY))
    assert await process.wait() == 0
    return process.pid


def clients(endpoint: Endpoint) -> list[str]:
    return [request.client for request in endpoint.inference.requests]


@LINUX
@pytest.mark.parametrize("unix", [False, True])
async def test_each_process_is_a_client_of_its_own(serve: Serve, unix: bool, tmp_path: Path):
    config = {"unix_socket": tmp_path / "s"} if unix else {}
    endpoint = await serve(SimulatedInference(), **config)
    endpoint.stats.active = 1  # somebody is at work, so it matters
    where = str(tmp_path / "s") if unix else endpoint.url.removeprefix("http://")
    pids = [await ask_from_another_process(where) for _ in range(2)]
    names = clients(endpoint)
    assert names[0] == names[1] and names[2] == names[3], "two connections of one process are one client"
    assert names[0] != names[2]
    assert all(name.endswith(f"process {pid}") for name, pid in zip(names[::2], pids, strict=True))


@LINUX
async def test_our_own_process_is_found_through_several_connections(endpoint: Endpoint):
    endpoint.stats.active = 1
    for _ in range(2):
        async with aiohttp.ClientSession() as session, session.post(f"{endpoint.url}/v1/chat/completions", json=BODY):
            pass
    assert {name.rpartition(", ")[2] for name in clients(endpoint)} == {f"process {os.getpid()}"}


async def test_where_nobody_is_at_work_nothing_is_looked_up(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_loopback_peer", lambda *_: pytest.fail("looked up"))
    assert (await endpoint.post("/v1/chat/completions", BODY))[0] == 200
    assert clients(endpoint) == ["127.0.0.1"]


async def test_what_is_stored_belongs_to_the_client_whatever_the_program(endpoint: Endpoint):
    first = await endpoint.openai.responses.create(model=MODEL, input="x")
    endpoint.stats.active = 1
    again = await endpoint.openai.responses.create(model=MODEL, input="y", previous_response_id=first.id)
    assert again.previous_response_id == first.id


@pytest.mark.parametrize("fault", ["no table", "garbage", "not in it", "another user's"])
async def test_where_the_system_does_not_tell_the_connection_or_the_user_counts(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
):
    (tmp_path / "net").mkdir()
    table = tmp_path / "net" / "tcp"
    if fault == "garbage":
        table.write_text("head\nx\n")
    elif fault == "not in it":
        table.write_text("head\n 0: 0100007F:0001 0100007F:0002 01 0:0 0:0 0 1000 0 77 1\n")
    elif fault == "another user's":
        port = int(endpoint.url.rpartition(":")[2])
        monkeypatch.setattr(peers, "_port", lambda text: int(text.rpartition(":")[2]))
        monkeypatch.setattr(peers, "_sockets", lambda _peer, own: iter([(4711, "77")] if own == port else []))
    monkeypatch.setattr(peers, "_PROC", tmp_path)
    endpoint.stats.active = 1
    assert (await endpoint.post("/v1/chat/completions", BODY))[0] == 200
    assert ("user 4711" if fault == "another user's" else "connection 127.0.0.1:") in clients(endpoint)[0]


async def test_a_transport_without_a_socket_is_unknown():
    class Bare(asyncio.Transport):
        def get_extra_info(self, name: str, default: object = None) -> object:
            return default

    assert await peers.program_at(Bare()) == "unknown"
    assert not peers._is_loopback("no address")
