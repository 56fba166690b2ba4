"""Listening, with and without TLS; and the command line at a server as on the home."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from agent.contract.messages import State
from fleet.api.client import RemoteClient
from fleet.api.server import ApiServer
from fleet.cli.main import run
from fleet.core.roles import Role
from fleet.demo.processes import Process, running
from fleet.errors import FleetError, UsageError
from fleet.home import Home
from fleet.operations.fleet import Fleet
from fleet.registry import Received, Recorder
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA
from tests.fleet.world import World, put_artifact, topic_of
from tests.simulators.broker import free_port
from tests.waiting import listens, wait_until


@contextmanager
def listening(world: World, **settings: Any) -> Iterator[ApiServer]:
    """A server in a thread of its own, as `phifleet serve` has one in a process of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    with Fleet(FleetSettings(home=world.home.root, **({"api": "127.0.0.1:0"} | settings))) as fleet:
        server = ApiServer(fleet)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(20)
            loop.close()


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """The settings of the command line name it, with an admin's token, and a home that holds nothing."""
    with listening(world) as made:
        _, token = world.registry.tokens.create("laptop", Role.ADMIN, world.actor)
        monkeypatch.setenv("PHIFLEET_SERVER", made.url)
        monkeypatch.setenv("PHIFLEET_SERVER_TOKEN", token)
        monkeypatch.setenv("PHIFLEET_HOME", str(world.home.root.parent / "nothing"))
        yield made


def test_the_commands_of_every_day_work_at_a_server(
    server: ApiServer, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def phifleet(*arguments: str, code: int = 0) -> str:
        assert run(list(arguments)) == code, capsys.readouterr().err
        return capsys.readouterr().out

    artifact = world.manifest.id
    assert phifleet("device", "label", "pi-1", "site=lyon") == "pi-1: site=lyon\n"
    assert phifleet("selector", "save", "lyon", "label.site=lyon") == "@lyon means label.site=lyon\n"
    assert [one["device"] for one in json.loads(phifleet("device", "list", "--selector", "@lyon", "--json"))] == [
        "pi-1"
    ]
    assert "@lyon" in phifleet("selector", "list")
    assert phifleet("release", "create", "autumn", artifact) == "release autumn has 1 variants\n"
    assert "autumn" in phifleet("release", "list")
    assert phifleet("deploy", "autumn", "--device", "pi-1").startswith(f"pi-1: ordered {artifact} as pi-1-1-")
    assert "was withdrawn before it was published" in phifleet("cancel", "pi-1")
    assert "no controller runs" in phifleet("status")
    assert json.loads(phifleet("status", "pi-1", "--json"))["devices"][0]["device"] == "pi-1"
    assert json.loads(phifleet("device", "show", "pi-1", "--json"))["labels"] == {"site": "lyon"}
    assert "1 (100%)" in phifleet("rollout", "plan", "autumn", "--selector", "@lyon")
    assert "has begun" in phifleet("rollout", "start", "autumn", "--selector", "@lyon", "--name", "r-1")
    assert phifleet("rollout", "pause", "r-1") == "rollout r-1 is paused\n"
    assert "paused, wave 1 of 1" in phifleet("rollout", "status", "r-1")
    assert "r-1" in phifleet("rollout", "list")
    assert "no device has been compared yet" in phifleet("rollout", "explain", "r-1")
    assert "token:laptop" in phifleet("audit", "list")
    assert "each as it was written" in phifleet("audit", "verify")
    assert phifleet("token", "create", "wall", "--role", "viewer", "--days", "30").startswith("phifleet_")
    (wall,) = [one for one in json.loads(phifleet("token", "list", "--json")) if one["name"] == "wall"]
    assert phifleet("token", "revoke", wall["id"]) == f"token {wall['id']} is revoked\n"
    assert "revoked" in phifleet("token", "list")
    assert phifleet("webhook", "create", "https://example.com/hook", "--event", "rollout.*").startswith("whsec_")
    (hook,) = json.loads(phifleet("webhook", "list", "--json"))
    assert "rollout.*" in phifleet("webhook", "list")
    assert phifleet("webhook", "delete", hook["id"]) == f"webhook {hook['id']} is deleted\n"
    assert phifleet("release", "delete", "autumn") == "release autumn is forgotten\n"
    assert phifleet("selector", "delete", "@lyon") == "@lyon is forgotten\n"
    assert "revoked pi-2" in phifleet("device", "revoke", "pi-2", "--yes")
    assert phifleet("device", "remove", "pi-3", "--yes") == "removed pi-3\n"
    assert [one["device"] for one in json.loads(phifleet("device", "list", "--json"))] == ["pi-1", "pi-2"]


def test_an_order_at_a_server_is_waited_for_and_rolled_back(
    server: ApiServer, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.cli.deploy.REMOTE_POLL_S", 0.02)

    def device() -> None:
        """It commits what it is ordered."""
        while not (order := world.registry.deployments.newest().get("pi-1")) or order.stage == "committed":
            threading.Event().wait(0.02)
        said = world.reported(order, State.COMMITTED)
        Recorder(world.registry).record([Received(topic_of(said, "pi-1"), said.to_json(), world.clock.now())])

    for artifact in (world.manifest, put_artifact(world.home, b"other weights")):
        thread = threading.Thread(target=device)
        thread.start()
        assert run(["deploy", artifact.id, "--device", "pi-1", "--wait"]) == 0
        thread.join(20)
    assert run(["rollback", "pi-1"]) == 0
    assert f"pi-1: goes back to {world.manifest.id}" in capsys.readouterr().out
    assert run(["deploy", world.manifest.id, "--device", "pi-1", "--wait", "--timeout", "1"]) == 9
    assert "1 of 1 not committed: pi-1: queued" in capsys.readouterr().err


def test_what_a_server_says_has_the_exit_code_that_it_has_here(
    server: ApiServer, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["device", "show", "pi-9"]) == 2
    assert capsys.readouterr().err == "error: no device is named pi-9; there are: pi-1, pi-2, pi-3\n"
    assert run(["build", "x"]) in (2, 10)
    assert run(["trust", "status"]) == 2
    assert f"works on the controller's home: run it on the controller, without the server {server.url}" in (
        capsys.readouterr().err
    )
    _, token = world.registry.tokens.create("wall", Role.VIEWER, world.actor)
    monkeypatch.setenv("PHIFLEET_SERVER_TOKEN", token)
    assert run(["token", "list"]) == 2
    assert "the token wall has the role viewer, and this needs admin" in capsys.readouterr().err
    monkeypatch.delenv("PHIFLEET_SERVER_TOKEN")
    assert run(["status"]) == 2
    assert "wants a token: set PHIFLEET_SERVER_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("PHIFLEET_SERVER_TOKEN", token)
    monkeypatch.setattr("fleet.api.client.time.sleep", lambda _: None)
    assert run(["--server", f"http://127.0.0.1:{free_port()}", "status"]) == 1
    assert "cannot be reached: [Errno 111] Connection refused" in capsys.readouterr().err
    for url in ("https://a..b", "https://xn--a.example", f"https://{'a' * 70}.example"):
        assert run(["--server", url, "status"]) == 1
        assert f"error: {url} cannot be reached: " in capsys.readouterr().err
    for url, says in (
        ("http://fleet.example:8700", "must be https://: a token would be sent in the clear"),
        ("ftp://127.0.0.1", "must be https://HOST:PORT"),
        ("https://me:secret@fleet.example", "must be https://HOST:PORT"),
        ("https://[::1", "must be https://HOST:PORT"),
    ):
        assert run(["--server", url, "status"]) == 2
        assert says in capsys.readouterr().err


def test_off_loopback_it_speaks_tls_and_refuses_to_listen_without(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set api_cert and api_key, so that tokens are not sent in the clear"):
        ApiServer(Fleet(FleetSettings(home=world.home.root, api="0.0.0.0:8700")))
    ca = DeviceCA(Home(tmp_path / "ca"))
    ca.init()
    made = ca.server_certificate(["127.0.0.1"])
    cert, key, authority = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "authority.pem"
    cert.write_text(made.certificate)
    key.write_text(made.private_key)
    authority.write_text(ca.ca_pem())
    _, token = world.registry.tokens.create("laptop", Role.VIEWER, world.actor)
    with listening(world, api="0.0.0.0:0", api_cert=cert, api_key=key) as server:
        at = {"home": tmp_path, "server": f"https://127.0.0.1:{server.port}", "server_token": token}
        found = RemoteClient(FleetSettings(**at, server_ca=authority)).call("GET", "/status")
        assert found["devices"] == 3
        with pytest.raises(FleetError, match="certificate verify failed"):
            RemoteClient(FleetSettings(**at)).call("GET", "/status")
    with pytest.raises(UsageError, match=r"nowhere\.pem: cannot be read"):
        RemoteClient(FleetSettings(**at, server_ca=tmp_path / "nowhere.pem"))
    key.write_text("nonsense")
    with pytest.raises(UsageError, match=r"api_cert .*cert\.pem, api_key .*key\.pem: cannot be used"):
        ApiServer(Fleet(FleetSettings(home=world.home.root, api="127.0.0.1:0", api_cert=cert, api_key=key)))


def test_a_port_that_is_taken_is_named(world: World) -> None:
    with listening(world) as server:
        again = listening(world, api=f"127.0.0.1:{server.port}")
        with pytest.raises(UsageError, match=f"{server.port} cannot be listened on"), again:
            pass


class _Strange:
    """Something else that listens there."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        writer.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ht>", "does not answer as phifleet does"),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\n<ht>",
            "answers 404 Not Found: is that the API's address",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "answers 302 Found"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be reached: "),
    ],
)
def test_what_is_no_controller_is_said_to_be_none(
    answer: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.api.client.time.sleep", lambda _: None)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    strange = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(_Strange(answer).serve, "127.0.0.1", 0), loop
    ).result(20)
    port = strange.sockets[0].getsockname()[1]
    settings = FleetSettings(home=tmp_path, server=f"http://127.0.0.1:{port}", server_token="x")  # type: ignore[arg-type]
    try:
        with pytest.raises(FleetError, match=says):
            RemoteClient(settings).call("GET", "/status")
    finally:
        loop.call_soon_threadsafe(strange.close)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_a_controller_serves_it_and_says_when_it_cannot(world: World, tmp_path: Path) -> None:
    port = free_port()
    _, token = world.registry.tokens.create("laptop", Role.VIEWER, world.actor)
    arguments = ["fleet", "--home", str(world.home.root), "serve", "--api", f"127.0.0.1:{port}"]
    environment = {"PHIFLEET_BROKER_PORT": str(free_port())}
    with running(Process("controller", arguments, tmp_path / "serve.log", environment)):
        wait_until(lambda: listens("127.0.0.1", port), "it listens")
        at = FleetSettings(home=tmp_path, server=f"http://127.0.0.1:{port}", server_token=SecretStr(token))
        assert RemoteClient(at).call("GET", "/status")["controller_running"] is True
        environment = {"PHIFLEET_BROKER_PORT": str(free_port())}
        second = Process("second", arguments, tmp_path / "second.log", environment)
        with running(second):
            wait_until(lambda: "cannot be listened on" in second.tail(), "it says why it does not")
    assert f"error: api 127.0.0.1:{port} cannot be listened on: " in (tmp_path / "second.log").read_text()
    assert "Traceback" not in (tmp_path / "serve.log").read_text() + (tmp_path / "second.log").read_text()
