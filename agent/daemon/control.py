"""Local control: the person at the device talks to the running agent.

A TCP port of loopback and a token, both in ``control.json`` of the state folder, which only the agent's own user can
read; so it works alike on Linux, Windows and macOS. One JSON object a line each way.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from agent.errors import AgentError

log = structlog.get_logger(component=__name__)

Command = Callable[[str], Awaitable[dict[str, Any]]]
FILE = "control.json"
#: A path may be as long as this alone.
_LINE_BYTES = 16384
_PATIENCE_S = 10.0


class ControlServer:
    """Answers ``{"token": ..., "command": name}`` with its object, or with ``{"error": text}``.

    An ``argument`` beside them is given to the command; without one it is empty. A command that raises is answered
    with its error too. A peer has ten seconds to send its request.
    """

    def __init__(self, folder: Path, commands: Mapping[str, Command]) -> None:
        self._path = folder / FILE
        self._commands = commands
        self._token = secrets.token_urlsafe(24)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, and say where."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LINE_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        temporary = self._path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            json.dump({"port": port, "token": self._token, "pid": os.getpid()}, sink)
        temporary.replace(self._path)

    async def stop(self) -> None:
        """Close, and take the file away."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)  # ours: the state folder is locked

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):  # for the request alone: a command is never stopped halfway
                line = await reader.readline()
            answer = await self._answer(line)
            writer.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            await writer.drain()
        except (TimeoutError, ValueError, OSError) as error:
            log.debug("control connection dropped", error=str(error))
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            token, name, argument = str(asked["token"]), str(asked["command"]), str(asked.get("argument", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": "not a request"}
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            return {"error": "the token is wrong"}
        command = self._commands.get(name)
        if command is None:
            return {"error": f"no command {name}; there are {', '.join(self._commands)}"}
        log.info("asked at the device", command=name)
        try:
            return await command(argument)
        except Exception as error:
            # The person at the device must read what happened, not find the connection closed.
            expected = isinstance(error, AgentError | OSError)
            log.warning("command at the device failed", command=name, error=str(error), exc_info=not expected)
            return {"error": f"the agent could not carry out `{name}`: {_text(error)}"}


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, AgentError) else repr(error)
