"""The process that holds a model: ``python -m agent.runtimes.engines.worker MODULE --fd N``.

One thread reads messages, the main thread steps the engine. A crash in here costs the daemon nothing but the
requests in flight. It leaves with its parent: by signal on Linux, and everywhere when the socket closes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from agent.contract.failures import FailureCode
from agent.core.inference import InferenceError
from agent.errors import RuntimeLoadError
from agent.platform.files import is_disk_full
from agent.platform.parents import die_with_parent
from agent.runtimes.protocol import wire
from agent.runtimes.protocol.engine import Engine, Runtime
from agent.runtimes.protocol.registry import resolve

#: Seconds between beats while steps bring no events: well under any hang limit.
BEAT_S = 0.5


class Worker:
    """Loads one model and steps it. ``send`` and ``inbox`` are the two directions of the socket."""

    def __init__(
        self,
        runtime: Runtime,
        send: Callable[[wire.FromWorker], None],
        inbox: queue.SimpleQueue[wire.ToWorker],
    ) -> None:
        self._runtime = runtime
        self._send = send
        self._inbox = inbox
        self._steps = 0
        self._beaten = 0.0

    def run(self) -> int:
        """Until told to close; returns the exit status."""
        self._send(wire.Hello(os.getpid(), self._runtime.name))
        first = self._inbox.get()
        if not isinstance(first, wire.Load):
            return 0 if isinstance(first, wire.Close) else 2
        engine = self._load(first)
        if engine is None:
            return 1
        try:
            self._serve(engine)
        finally:
            engine.close()
        return 0

    def _load(self, load: wire.Load) -> Engine | None:
        begun = time.perf_counter()
        try:
            engine = self._runtime.load(load.source, load.options)
        except RuntimeLoadError as error:
            self._send(wire.LoadFailed(error.code, str(error)))
            return None
        except Exception as error:  # native runtimes raise anything; all of it means: no model
            # A disk that is full (caches, a mapped file) says nothing about the artifact, and passes.
            code = FailureCode.STORE_DISK_FULL if is_disk_full(error) else FailureCode.RUNTIME_LOAD
            self._send(wire.LoadFailed(code.value, f"{self._runtime.name} cannot load {load.source.path}: {error}"))
            return None
        seconds = time.perf_counter() - begun
        loaded = wire.Loaded(
            engine.context, engine.device, seconds, resident_bytes(), engine.capabilities, engine.device_share
        )
        self._send(loaded)
        return engine

    def _serve(self, engine: Engine) -> None:
        while True:
            while not (engine.busy and self._inbox.empty()):
                message = self._inbox.get()
                if isinstance(message, wire.Close):
                    return
                self._handle(engine, message)
            events = engine.step()
            self._steps += 1
            if events:
                self._send(wire.Events(tuple(events)))
            if time.monotonic() - self._beaten > BEAT_S or not engine.busy:
                self._beat(engine)

    def _handle(self, engine: Engine, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Generate):
            try:
                engine.submit(message.request)
            except InferenceError as error:
                self._refuse(message.request.id, error)
            except Exception as error:  # one request that a native library chokes on is not the others' fault
                self._refuse(message.request.id, InferenceError("invalid", f"the runtime refuses it: {error}"))
        elif isinstance(message, wire.Cancel):
            engine.cancel(message.id)
        elif isinstance(message, wire.Count):
            self._send(wire.Counted(message.ref, engine.count_tokens(message.text)))

    def _refuse(self, request_id: str, error: InferenceError) -> None:
        self._send(wire.Refused(request_id, error.kind, str(error), error.param, error.retry_after_s))

    def _beat(self, engine: Engine) -> None:
        self._beaten = time.monotonic()
        self._send(wire.Beat(self._steps, {**engine.stats(), "memory_bytes": float(resident_bytes())}))


def resident_bytes() -> int:
    """Of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _inherit(fd: int, parent: int) -> socket.socket:
    if sys.platform == "win32":
        # Not run here: Windows hands sockets over by a shared description on standard input.
        return socket.fromshare(base64.b64decode(sys.stdin.buffer.readline()))
    die_with_parent(parent)
    return socket.socket(fileno=fd)


def _limit_memory(limit: int) -> None:
    """Private memory past ``limit`` bytes is refused, which native code meets as a failed allocation."""
    if limit and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _output_to_log() -> None:
    """Native libraries print where they like: standard output goes where standard error goes, to the daemon's log."""
    sys.stdout.flush()
    os.dup2(2, 1)


def _read(sock: socket.socket, inbox: queue.SimpleQueue[wire.ToWorker]) -> None:
    """Everything the daemon says; its end means that the daemon is gone, and nothing is left to do here."""
    with contextlib.suppress(OSError), sock.makefile("rb") as lines:
        for line in lines:
            message = wire.decode(line)
            inbox.put(message)  # type: ignore[arg-type]
    os._exit(0)


def _check(module: str) -> int:
    """Import it and print, as the last line, what it has."""
    output = os.fdopen(os.dup(1), "w")
    _output_to_log()
    try:
        found = resolve(module).check()
    except Exception as error:  # the reason is the answer
        output.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        output.flush()
        return 1
    output.write(json.dumps({"version": found.version, "devices": list(found.devices)}) + "\n")
    output.flush()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; its entry point."""
    parser = argparse.ArgumentParser(prog="agent.runtimes.engines.worker")
    parser.add_argument("module", help="module that has a RUNTIME")
    parser.add_argument("--check", action="store_true", help="import it, print what it has, leave")
    parser.add_argument("--fd", type=int, default=-1, help="the inherited socket")
    parser.add_argument("--parent", type=int, default=0, help="process id of the daemon")
    parser.add_argument("--memory-limit", type=int, default=0, help="bytes of private memory, 0 for no limit")
    options = parser.parse_args(arguments)
    _limit_memory(options.memory_limit)
    if options.check:
        return _check(options.module)
    sock = _inherit(options.fd, options.parent)
    _output_to_log()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the person's Ctrl-C is for the daemon, which closes us
    inbox: queue.SimpleQueue[wire.ToWorker] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, inbox), daemon=True).start()
    status = Worker(resolve(options.module), lambda message: sock.sendall(wire.encode(message)), inbox).run()
    sys.stderr.flush()
    # Native destructors at interpreter exit crash more often than they help; everything of ours is closed.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
