"""Log lines are of one style: a short phrase in lower case, snake_case fields, `error` for the text of a failure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
#: What a field of this name would hold is called ``error``.
OTHER_NAMES = {"reason", "err", "exc", "message"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for package in ("agent", "fleet"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def log_calls() -> Iterator[tuple[str, str, list[str]]]:
    for where, call in calls():
        assert isinstance(call.func, ast.Attribute)
        is_log = isinstance(call.func.value, ast.Name) and call.func.value.id in ("log", "_log")
        if is_log and call.func.attr in LEVELS and call.args and isinstance(call.args[0], ast.Constant):
            yield where, str(call.args[0].value), [keyword.arg or "" for keyword in call.keywords]


LINES = list(log_calls())


def test_there_are_log_lines_to_look_at():
    assert len(LINES) > 100


@pytest.mark.parametrize(("where", "event", "fields"), LINES, ids=[line[0] for line in LINES])
def test_a_log_line_is_a_phrase_with_fields(where: str, event: str, fields: list[str]):
    assert "_" not in event and not event.endswith("."), where
    assert event[0].islower() or event.split(maxsplit=1)[0].isupper(), where
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*|", field) for field in fields), where
    assert not OTHER_NAMES & set(fields), where


def test_every_logger_names_itself_in_its_lines():
    found = [
        (where, call)
        for where, call in calls()
        if isinstance(call.func, ast.Attribute) and call.func.attr == "get_logger"
    ]
    assert found
    assert [where for where, call in found if "component" not in {keyword.arg for keyword in call.keywords}] == []
