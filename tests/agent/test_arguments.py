"""Options of the whole program may stand anywhere; nothing else moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.platform.arguments import hoisted

OPTIONS = ("--home", "--config")


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["status", "--home", "x", "--once"], ["--home", "x", "status", "--once"]),
        (["device", "list", "--home=x"], ["--home=x", "device", "list"]),
        (["--home", "a", "status", "--home", "b"], ["--home", "a", "--home", "b", "status"]),
        (["deploy", "--", "--home", "x"], ["deploy", "--", "--home", "x"]),
        (["status", "--home"], ["status", "--home"]),
        ([], []),
    ],
)
def test_an_option_of_the_program_moves_to_the_front(typed: list[str], read: list[str]):
    assert hoisted(typed, OPTIONS) == read


@given(st.lists(st.sampled_from(["status", "--home", "--home=x", "--once", "--", "x"]), max_size=8))
def test_no_argument_is_lost_or_made_up_and_twice_is_as_once(typed: list[str]):
    found = hoisted(typed, OPTIONS)
    assert sorted(found) == sorted(typed)
    assert hoisted(found, OPTIONS) == found or "--home" in typed[-1:] or "--" in typed
