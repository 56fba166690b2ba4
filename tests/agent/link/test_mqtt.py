"""The link against real brokers, with its connection cut, frozen and refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from agent.core.backoff import BackoffPolicy
from agent.errors import LinkError
from agent.link import LinkSettings, Message, MqttLink, Will
from tests.simulators.broker import Broker, free_port, mosquitto
from tests.simulators.proxy import proxy
from tests.waiting import until

FAST = BackoffPolicy(base_s=0.1, cap_s=0.5)


def settings(url: str, **more: object) -> LinkSettings:
    return LinkSettings(url, f"t-{uuid.uuid4().hex[:12]}", backoff=FAST, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def connected(url: str, **more: object) -> AsyncIterator[MqttLink]:
    async with MqttLink(settings(url, **more)) as link:
        await link.wait_connected(10)
        yield link


def topic(*levels: str) -> str:
    return "/".join(("t", uuid.uuid4().hex[:8], *levels))


async def test_message_comes_with_all_its_properties(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("a")
    async with connected(broker.url) as one, connected(broker.url) as other:
        await other.subscribe(name, got.append)
        await one.publish(
            name, b"\x00\xff", response_topic="answer/here", correlation=b"\x01", properties={"status": "ok", "n": "1"}
        )
        await until(lambda: got)
    assert got == [Message(name, b"\x00\xff", False, "answer/here", b"\x01", {"status": "ok", "n": "1"})]


async def test_retained_state_is_there_for_who_comes_later(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("state")
    async with connected(broker.url) as one:
        await one.publish(name, b"first", retain=True)
        await one.publish(name, b"second", retain=True)
    async with connected(broker.url) as other:
        await other.subscribe(name, got.append)
        await until(lambda: got)
    assert [(message.payload, message.retained) for message in got] == [(b"second", True)]


async def test_what_is_acknowledged_by_hand_comes_once_each(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("safe")
    async with connected(broker.url) as one, connected(broker.url, receive_maximum=3) as other:
        await other.subscribe(name, got.append, manual_ack=True)
        for n in range(7):
            await one.publish(name, b"%d" % n)
        done = 0
        while done < 7:
            await until(lambda done=done: len(got) > done)
            for message in got[done:]:
                assert message.acknowledge is not None
                await asyncio.to_thread(message.acknowledge)
                message.acknowledge()  # a second time is no packet of its own
                done += 1
        await asyncio.sleep(0.1)
    assert [message.payload for message in got] == [b"%d" % n for n in range(7)]


async def test_a_broker_that_sends_past_the_receive_maximum_is_not_read_until_something_is_safe() -> None:
    """A broker of a few lines, as none from a shelf can be made to do it at will."""
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.read(1000)
        writer.write(b"\x20\x03\x00\x00\x00")  # CONNACK
        await reader.read(1000)
        writer.write(b"\x90\x04\x00\x01\x00\x01")  # SUBACK
        body = bytes(50_000)
        for number in range(1, 400):
            packet = b"\x00\x01x" + number.to_bytes(2, "big") + b"\x00" + body
            writer.write(b"\x32" + _remaining(len(packet)) + packet)
            await writer.drain()
            sent = number

    got: list[Message] = []
    server = await asyncio.start_server(pour, "127.0.0.1", 0)
    async with (
        server,
        MqttLink(settings(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}", receive_maximum=5)) as link,
    ):
        await link.wait_connected(5)
        await link.subscribe("x", got.append, manual_ack=True)
        await until(lambda: len(got) >= 10)
        await asyncio.sleep(0.5)
        assert len(got) < 20, "what is not read stays in the kernel's buffers"
        assert sent < 399, "the broker is held up"
        while len(got) < 399:
            for message in got:
                assert message.acknowledge is not None
                message.acknowledge()
            await asyncio.sleep(0.01)
    assert len(got) == 399


def _remaining(length: int) -> bytes:
    out = b""
    while True:
        length, low = divmod(length, 128)
        out += bytes([low | (0x80 if length else 0)])
        if not length:
            return out


async def test_whatever_is_safe_first_acknowledgements_go_in_the_order_of_the_messages(broker: Broker) -> None:
    """A broker may end the connection otherwise (MQTT 5, section 4.6), and rumqttd does."""
    got: list[Message] = []
    name = topic("order")
    async with connected(broker.url) as one, connected(broker.url, receive_maximum=50) as other:
        await other.subscribe(name, got.append, manual_ack=True)
        for turn in range(5):
            for n in range(8):
                await one.publish(name, b"%d" % n)
            await until(lambda turn=turn: len(got) == 8 * (turn + 1))
            new = got[8 * turn :]
            random.Random(turn).shuffle(new)
            for message in new:
                assert message.acknowledge is not None
                message.acknowledge()
        await asyncio.sleep(0.3)
        assert other.connected and other.reconnects == 0
    assert len(got) == 40


async def test_an_acknowledgement_from_before_a_reconnect_is_not_sent_on_the_new_connection(tmp_path: Path) -> None:
    got: list[Message] = []
    name = topic("safe")
    with mosquitto(tmp_path) as broker, proxy(broker.host, broker.port) as line:
        async with connected(broker.url) as one, connected(line.url, receive_maximum=1) as other:
            connects = [1]
            other.on_connected(lambda: connects.append(1))  # when the broker knows the subscription again
            await other.subscribe(name, got.append, manual_ack=True)
            await one.publish(name, b"old")
            await until(lambda: len(got) == 1)
            line.cut()
            await until(lambda: connects == [1, 1])
            await one.publish(name, b"new")
            await one.publish(name, b"newer")
            await until(lambda: len(got) == 2)
            late = got[0].acknowledge
            assert late is not None
            late()  # the new connection uses the same packet id
            await asyncio.sleep(0.2)
            assert [message.payload for message in got] == [b"old", b"new"]
            assert got[1].acknowledge is not None
            got[1].acknowledge()
            await until(lambda: len(got) == 3)


async def test_what_a_controller_published_once_is_not_sent_again_over_what_another_published_since(
    broker: Broker,
) -> None:
    got: list[Message] = []
    name = topic("desired")
    with proxy(broker.host, broker.port) as line:
        async with connected(broker.url) as other, connected(line.url) as cut_off:
            await cut_off.publish(name, b"order 1", retain=True)
            line.cut()
            await other.publish(name, b"order 2", retain=True)
            await until(lambda: cut_off.reconnects == 1 and cut_off.connected)
            await cut_off.publish(topic("marker"), b"")
            await other.subscribe(name, got.append)
            await until(lambda: got)
    assert got[0].payload == b"order 2"


async def test_a_shared_subscription_gets_nothing_that_was_retained_before(broker: Broker) -> None:
    """Mosquitto 2.0 sends it unless it is told not to: a flood in which a controller's own reading drowns."""
    shared: list[Message] = []
    own: list[Message] = []
    name = topic("state")
    async with connected(broker.url) as one, connected(broker.url) as other:
        await one.publish(name, b"before", retain=True)
        await other.subscribe(f"$share/g/{name}", shared.append)
        await other.subscribe(topic("something else"), own.append)
        await one.publish(name, b"after", retain=True)
        await until(lambda: shared)
        await other.subscribe_exact([name], own.append)
        await until(lambda: own)
    assert [message.payload for message in shared] == [b"after"]


async def test_shared_subscription_gives_each_message_to_one(broker: Broker) -> None:
    got: list[list[Message]] = [[], []]
    name = topic("work")
    async with connected(broker.url) as one, connected(broker.url) as a, connected(broker.url) as b:
        await a.subscribe(f"$share/g/{name}", got[0].append)
        await b.subscribe(f"$share/g/{name}", got[1].append)
        for n in range(20):
            await one.publish(name, b"%d" % n)
        await until(lambda: len(got[0]) + len(got[1]) >= 20)
        await asyncio.sleep(0.1)
    assert sorted(int(message.payload) for message in got[0] + got[1]) == list(range(20))


async def test_unsubscribe_ends_it(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("a")
    async with connected(broker.url) as link:
        await link.subscribe(name, got.append)
        await link.publish(name, b"1")
        await until(lambda: got)
        await link.unsubscribe(name)
        await link.publish(name, b"2")
        await asyncio.sleep(0.2)
    assert [message.payload for message in got] == [b"1"]


async def test_control_runs_on_the_event_loop_and_bulk_on_the_links_thread(broker: Broker) -> None:
    seen: dict[str, threading.Thread] = {}
    name = topic("x")

    def note(kind: str) -> Callable[[Message], None]:
        return lambda message: seen.__setitem__(kind, threading.current_thread())

    async with connected(broker.url) as link:
        await link.subscribe(f"{name}/control", note("control"))
        await link.subscribe(f"{name}/bulk", note("bulk"), bulk=True)
        await link.publish(f"{name}/control", b"")
        await link.publish(f"{name}/bulk", b"")
        await until(lambda: len(seen) == 2)
    assert seen["control"] is threading.main_thread()
    assert seen["bulk"] is not threading.main_thread()


async def test_a_handler_that_raises_costs_nothing_else(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("x")

    def broken(message: Message) -> None:
        raise ValueError("a defect")

    async with connected(broker.url) as link:
        await link.subscribe(f"{name}/bulk", broken, bulk=True)
        await link.subscribe(f"{name}/control", broken)
        await link.subscribe(f"{name}/fine", got.append)
        for leaf in ("bulk", "control", "fine"):
            await link.publish(f"{name}/{leaf}", b"")
        await until(lambda: got)
        assert link.connected


async def test_bulk_is_pulled_in_order_and_control_passes_it(broker: Broker) -> None:
    total, sent, got = 400, 0, 0
    name = topic("bulk")
    in_order = True

    def source() -> tuple[str, bytes] | None:
        nonlocal sent
        if sent == total:
            return None
        sent += 1
        return f"{name}/{sent}", bytes(64 * 1024)

    def received(message: Message) -> None:
        nonlocal got, in_order
        got += 1
        in_order = in_order and message.topic.endswith(f"/{got}")

    async with connected(broker.url) as one, connected(broker.url) as other:
        await other.subscribe(f"{name}/+", received, qos=0, bulk=True)
        one.serve_bulk(source)
        await one.publish(topic("control"), b"")
        assert got < total
        await until(lambda: got == total)
    assert in_order


async def test_hundreds_of_publications_at_once_are_all_acknowledged(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("many")
    async with connected(broker.url) as one, connected(broker.url) as other:
        await other.subscribe(name, got.append)
        await asyncio.gather(*(one.publish(name, b"%d" % n) for n in range(500)))
        await until(lambda: len(got) == 500)
    assert sorted(int(message.payload) for message in got) == list(range(500))


async def test_comes_back_with_subscriptions_and_state(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("a")
    connects = 0

    def count() -> None:
        nonlocal connects
        connects += 1

    with proxy(broker.host, broker.port) as between:
        link = MqttLink(settings(between.url, repeat_retained=True))
        link.on_connected(count)
        async with link, connected(broker.url) as other:
            await link.subscribe(f"{name}/orders", got.append)
            await link.wait_connected(5)
            await link.publish(f"{name}/state", b"online", retain=True)
            for n in range(3):
                between.cut()
                await other.publish(f"{name}/state", b"offline", retain=True)
                await until(lambda n=n: connects == n + 2)
                await other.publish(f"{name}/orders", b"%d" % n)
                await until(lambda n=n: len(got) == n + 1)
            assert link.reconnects == 3
        states: list[Message] = []
        async with connected(broker.url) as late:
            await late.subscribe(f"{name}/state", states.append)
            await until(lambda: states)
    assert states[0].payload == b"online"


async def test_publication_in_flight_when_the_connection_is_cut_fails_with_a_reason(broker: Broker) -> None:
    with proxy(broker.host, broker.port) as between:
        async with connected(between.url) as link:
            between.frozen = True
            waiting = asyncio.create_task(link.publish(topic("a"), b"x"))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            between.cut()
            with pytest.raises(LinkError, match="connection lost"):
                await waiting


async def test_a_network_that_went_silent_is_noticed_by_keepalive(broker: Broker) -> None:
    with proxy(broker.host, broker.port) as between:
        async with connected(between.url, keepalive_s=1) as link:
            between.frozen = True
            await until(lambda: not link.connected)
            between.frozen = False
            between.cut()
            await link.wait_connected(10)


async def test_will_is_published_when_the_client_vanishes_and_not_when_it_leaves(broker: Broker) -> None:
    got: list[Message] = []
    name = topic("presence")
    with proxy(broker.host, broker.port) as between:
        async with connected(broker.url) as watcher:
            await watcher.subscribe(name, got.append)
            async with connected(broker.url, will=Will(name, b"offline")):
                pass
            await asyncio.sleep(0.3)
            assert got == []
            async with connected(between.url, will=Will(name, b"offline")):
                between.refusing = True
                between.cut()
                await until(lambda: got)
    assert got[0].payload == b"offline"


async def test_without_a_broker_it_starts_fails_plainly_and_connects_when_one_comes(tmp_path: Path) -> None:
    port = free_port()
    got: list[Message] = []
    name = topic("a")
    async with MqttLink(settings(f"mqtt://127.0.0.1:{port}", repeat_retained=True)) as link:
        await link.subscribe(name, got.append)
        with pytest.raises(LinkError, match=rf"127\.0\.0\.1:{port}.*refused"):
            await link.wait_connected(0.5)
        with pytest.raises(LinkError, match="not connected"):
            await link.publish(name, b"lost")
        with pytest.raises(LinkError, match="not connected"):
            await link.publish(f"{name}/state", b"kept", retain=True)
        with mosquitto(tmp_path, port=port) as running:
            await link.wait_connected(10)
            await link.publish(name, b"now")
            await until(lambda: got)
            states: list[Message] = []
            async with connected(running.url) as other:
                await other.subscribe(f"{name}/state", states.append)
                await until(lambda: states)
    assert [message.payload for message in got] == [b"now"]
    assert states[0].payload == b"kept"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x02\x00\x05"])
async def test_a_server_that_is_no_broker_is_no_reason_to_crash(answer: bytes) -> None:
    async def pretend(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with MqttLink(settings(f"mqtt://127.0.0.1:{port}")) as link:
        with pytest.raises(LinkError):
            await link.wait_connected(0.7)
        assert link.reason
    server.close()


async def test_refused_credentials_are_named(tmp_path: Path) -> None:
    with mosquitto(tmp_path, listener="allow_anonymous false") as running:
        async with MqttLink(settings(running.url)) as link:
            with pytest.raises(LinkError, match="the broker refuses: Not authorized"):
                await link.wait_connected(1)


async def test_refused_topics_and_payloads_are_named(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    rules.chmod(0o600)
    general = f"acl_file {rules}\nmessage_size_limit 200000"
    with mosquitto(tmp_path, general=general) as running:
        async with connected(running.url) as link:
            with pytest.raises(LinkError, match="closed/a: the broker refuses: Not authorized"):
                await link.publish("closed/a", b"")
            with pytest.raises(LinkError, match=r"cannot be published"):
                await link.publish("open/#", b"")
            await link.publish("open/a", bytes(100_000))
            with pytest.raises(LinkError, match=r"open/a: .*message_size_limit"):
                await link.publish("open/a", bytes(300_000))


async def test_packet_limit_of_the_broker_is_known_beforehand(tmp_path: Path) -> None:
    with mosquitto(tmp_path, general="max_packet_size 100000") as running:
        async with connected(running.url) as link:
            with pytest.raises(LinkError, match="payload too large: 150000 bytes"):
                await link.publish("a", bytes(150_000))
            assert link.connected


async def test_works_above_1024_open_files(broker: Broker) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 2048:
        pytest.skip("the limit of open files is too low here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limit[1]))
    many: list[socket.socket] = []
    try:
        while not many or many[-1].fileno() < 1100:
            many.append(socket.socket())
        async with connected(broker.url) as link:
            await link.publish(topic("a"), b"x")
    finally:
        for sock in many:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


async def test_closing_is_quick_also_while_it_tries_to_connect() -> None:
    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(MqttLink(settings(f"mqtt://127.0.0.1:{free_port()}")))
        await asyncio.sleep(0.3)
        async with asyncio.timeout(3):
            await link.close()


async def test_before_start_and_after_close_it_fails_at_once(broker: Broker) -> None:
    link = MqttLink(settings(broker.url))
    async with asyncio.timeout(5):
        await link.subscribe("a", lambda message: None)
        with pytest.raises(LinkError, match="not started"):
            await link.publish("a", b"")
        await link.close()
        async with connected(broker.url) as link:
            pass
        with pytest.raises(LinkError, match="closed"):
            await link.publish("a", b"")
        await link.unsubscribe("a")


async def test_host_that_is_no_name_is_no_reason_to_crash() -> None:
    async with MqttLink(settings(f"mqtt://{'a' * 70}.example")) as link:
        with pytest.raises(LinkError, match="label"):
            await link.wait_connected(0.5)


async def test_hostile_broker_does_not_end_the_link() -> None:
    chance = random.Random(5)
    connections = 0

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(1000)
        writer.write(b"\x20\x03\x00\x00\x00")  # a good CONNACK
        kind = bytes([chance.choice([0x30, 0x32, 0x34, 0x40, 0x50, 0x62, 0x90, 0xB0, 0xD0, 0xE0, 0xF0])])
        body = chance.randbytes(chance.randrange(0, 40))
        writer.write(kind + bytes([len(body)]) + body + chance.randbytes(chance.randrange(0, 10)))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = MqttLink(LinkSettings(f"mqtt://127.0.0.1:{port}", "device", backoff=BackoffPolicy(0.01, 0.01)))
    async with link:
        await link.subscribe("#", lambda message: None)
        await until(lambda: connections >= 60)
        assert link._network._thread.is_alive()
    server.close()


async def test_a_packet_larger_than_was_agreed_is_refused_before_it_is_read() -> None:
    """paho alone takes all of the 256 MiB that MQTT lets one announce, in memory, before anybody may look."""
    taken = 0

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await reader.read(1000)
        writer.write(b"\x20\x03\x00\x00\x00" + b"\x30\xff\xff\xff\x7f")
        with contextlib.suppress(ConnectionError):
            for _ in range(256):
                writer.write(bytes(1 << 20))
                await writer.drain()
                taken += 1
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = MqttLink(LinkSettings(f"mqtt://127.0.0.1:{port}", "device", backoff=BackoffPolicy(30, 30)))
    async with link:
        await until(lambda: "268435455 bytes" in link.reason)
        assert "this client takes 1048576 at most" in link.reason
    assert taken < 64, "what the sockets hold, and no more"
    server.close()


async def test_slow_broker_slows_the_source(mosquitto_broker: Broker) -> None:
    asked = 0
    name = topic("flood")

    def source() -> tuple[str, bytes] | None:
        nonlocal asked
        asked += 1
        return name, bytes(64 * 1024)

    with proxy(mosquitto_broker.host, mosquitto_broker.port, bytes_per_s=1 << 20) as slow:
        async with connected(slow.url) as link:
            link.serve_bulk(source)
            await asyncio.sleep(1.5)
            assert asked * 64 * 1024 < 32 << 20, "the kernel's buffers and the proxy's queue, and no more"
            before = asked
            await asyncio.sleep(0.5)
            assert asked - before < 100


async def test_a_connection_that_breaks_soon_and_was_of_use_is_made_again_soon(embedded_broker: Broker) -> None:
    """Fourteen times: as many failures in a row would be waited for by the hour."""
    slow = BackoffPolicy(base_s=0.1, cap_s=3600.0)
    with proxy(embedded_broker.host, embedded_broker.port) as line:
        async with asyncio.timeout(60), MqttLink(LinkSettings(line.url, "poor", backoff=slow)) as link:
            for turn in range(1, 15):
                await until(lambda turn=turn: link.connected and line.connections >= turn, timeout_s=20)
                link.progressed()
                await asyncio.to_thread(line.cut)
