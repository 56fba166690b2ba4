"""A TCP proxy between a client and a broker, on loopback: cuts connections, swallows bytes, delays, limits the rate."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """``delay_s`` is one way; ``bytes_per_s`` holds for each direction of each connection; 0 is no limit.

    ``frozen`` swallows what comes, as a network does whose cable was pulled; ``refusing`` ends new connections.
    """

    target: tuple[str, int]
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    frozen: bool = False
    refusing: bool = False
    port: int = 0
    connections: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End every connection now."""
        assert self._loop is not None
        done = threading.Event()
        self._loop.call_soon_threadsafe(self._cut, done)
        done.wait(5)

    def _cut(self, done: threading.Event) -> None:
        for writer in self._writers:
            writer.transport.abort()
        done.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(128)

        async def deliver() -> None:
            while (item := await under_way.get()) is not None:
                if writer.transport.is_closing():
                    continue
                await asyncio.sleep(max(0.0, item[0] - loop.time()))
                with contextlib.suppress(OSError):
                    writer.write(item[1])
                    await writer.drain()

        delivering = loop.create_task(deliver())
        free_at = 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.frozen:
                    continue
                free_at = max(free_at, loop.time())
                if self.bytes_per_s:
                    free_at += len(data) / self.bytes_per_s
                await under_way.put((free_at + self.delay_s, data))
        await under_way.put(None)
        await delivering
        writer.transport.abort()

    async def _serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        stopped = asyncio.create_task(stop.wait())
        await stopped
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()} or {stopped}, timeout=2)


@contextmanager
def proxy(host: str, port: int, *, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> Iterator[Proxy]:
    """In a thread of its own."""
    one = Proxy((host, port), delay_s, bytes_per_s)
    ready, stop = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=lambda: asyncio.run(one._serve(ready, stop)), daemon=True)
    thread.start()
    ready.wait(5)
    try:
        yield one
    finally:
        assert one._loop is not None
        one._loop.call_soon_threadsafe(stop.set)
        thread.join(5)
