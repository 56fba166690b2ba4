"""Logging of the controller: JSON under systemd or when not on a terminal, readable on one; to standard error."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure(level: str = "info", form: str = "auto") -> None:
    """Set structlog up. ``form`` is auto, json or console."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    readable = form == "console" or (form == "auto" and sys.stderr.isatty() and "INVOCATION_ID" not in os.environ)
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if readable
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING), format="%(name)s: %(message)s")
