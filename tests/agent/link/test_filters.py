from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from agent.link.mqtt import filter_pattern

LEVEL = st.text(alphabet="ab$", max_size=2)


@given(
    st.lists(st.one_of(st.just("+"), LEVEL), min_size=1, max_size=4),
    st.booleans(),
    st.lists(LEVEL, min_size=1, max_size=5),
)
def test_filters_match_as_pahos_do(levels: list[str], rest: bool, topic: list[str]) -> None:
    name = "/".join([*levels, "#"] if rest else levels)
    text = "/".join(topic)
    if not name or not text:
        return
    assert (filter_pattern(name).match(text) is not None) == topic_matches_sub(name, text), (name, text)


@pytest.mark.parametrize(
    ("name", "text", "matches"),
    [
        ("$share/fleet/a/+/want", "a/b/want", True),
        ("$share/fleet/a/+/want", "$share/fleet/a/b/want", False),
        ("a.b/+", "axb/c", False),
        ("#", "$SYS/x", False),
    ],
)
def test_particular_filters(name: str, text: str, matches: bool) -> None:
    assert (filter_pattern(name).match(text) is not None) == matches
