"""Logging of both programs: JSON under systemd or when not on a terminal, readable on one; a small file beside it."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import structlog

#: Bytes of the log file before it is turned over; one older file is kept.
FILE_BYTES = 4 * 1024 * 1024


def configure(level: str = "info", form: str = "auto", folder: Path | None = None) -> None:
    """Set structlog up. ``form`` is auto, json or console, for standard error; a ``folder`` keeps JSON lines too."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    # systemd sets INVOCATION_ID; its journal wants JSON even where a terminal is attached.
    on_terminal = form == "console" or (form == "auto" and sys.stderr.isatty() and "INVOCATION_ID" not in os.environ)
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if on_terminal
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            *([_file_writer(folder)] if folder else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # All that it calls is write and flush.
        logger_factory=structlog.WriteLoggerFactory(_Quiet(sys.stderr)),  # type: ignore[arg-type]
        cache_logger_on_first_use=folder is not None,
    )
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING), format="%(name)s: %(message)s")


class _Quiet:
    """Standard error, which may be a file on a full disk or a pipe that nobody reads: no reason to stop either."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _QuietFile(logging.handlers.RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        # At each opening: a disk that was full or read-only at the start may have room by now.
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """A log that cannot be written is no reason to stop, nor to fill standard error."""


def _file_writer(folder: Path) -> structlog.typing.Processor:
    """So that `phifleet-agent logs` has something to show wherever the agent runs."""
    file = _QuietFile(folder / "agent.log", maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8", delay=True)
    render = structlog.processors.JSONRenderer(ensure_ascii=False)

    def write(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        line = render(logger, name, dict(event))
        file.handle(logging.LogRecord("agent", logging.INFO, "", 0, line, None, None))
        return event

    return write
