"""The selector language: what it means, that it reads back, and that no text makes it fail otherwise than by saying
where."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.core.selectors import (
    ATTRIBUTES,
    And,
    Compare,
    Has,
    In,
    Kind,
    Not,
    Or,
    Selector,
    SelectorError,
    attributes,
    matches,
    parse,
    unparse,
)

PI: dict[str, str | float | None] = {
    "name": "pi-007",
    "profile": "pi-5",
    "label.site": "rue 4",
    "agent": "0.2.1",
    "served": "phi-4-mini",
    "presence": "online",
    "memory_gib": 7.9,
    "cpus": None,
}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("profile=pi-5", True),
        ("profile=pi-5 and agent>=0.2", True),
        ("agent>=0.10", False),
        ("agent>=0.2.1 and agent<=0.2.1.0 and agent<1", True),
        ("agent=0.2.1.0", True),
        ("agent<0.2.1", False),
        ("memory_gib>4", True),
        ("memory_gib>7.9", False),
        ("cpus>0", False),
        ("not cpus>0", True),
        ("cpus!=4", True),
        ("has cpus", False),
        ("has label.site", True),
        ("label.site in (lyon, \"rue 4\")", True),
        ("label.site not in (lyon, \"rue 4\")", False),
        ("label.rack not in (a)", True),
        ("label.rack!=a", True),
        ("label.rack=a", False),
        ("name=pi-*", True),
        ('name="pi-?07"', False),
        ('name="pi-[0-9]*"', False),
        ("name!=pi-*", False),
        ("name=\"*\"", True),
        ("served!=phi-4-mini or presence=online and profile=x", False),
        ("(served!=phi-4-mini or presence=online) and profile=pi-5", True),
        ("not (profile=pi-5 and served=other)", True),
        ("not not profile=pi-5", True),
    ],
)  # fmt: skip
def test_what_is_meant(text: str, meant: bool):
    assert matches(parse(text), PI) is meant


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "an attribute is missing"),
        ("   ", 0, "an attribute is missing"),
        ("profil=pi-5", 0, "no attribute is named profil; did you mean profile?"),
        ("colour=red", 0, "there are label.NAME, name"),
        ("profile", 7, "after profile comes ="),
        ("profile=", 8, "a value is missing"),
        ("profile=and", 8, "a value is missing"),
        ("profile=pi-5 and", 16, "an attribute is missing"),
        ("profile=pi-5 agent=1", 13, "here comes `and`, `or`, or nothing"),
        ("(profile=pi-5", 13, ") is missing"),
        ("profile in pi-5", 11, "( is missing"),
        ("profile in (a b)", 14, ") is missing"),
        ("profile not pi", 12, "after `not` comes `in`"),
        ("profile>pi-5", 8, "profile is text, and has no order"),
        ("agent>=new", 7, "agent is a version"),
        ("memory_gib>lots", 11, "memory_gib is a number"),
        ('name="open', 5, 'a " that is not closed cannot stand here'),
        ("name=a; drop", 6, "; cannot stand here"),
        ("name=a\x1b[2J", 6, "the character U+001B cannot stand here"),
        ("label.=x", 0, "no attribute is named label."),
        ("label.Site=x", 0, "no attribute is named label.Site"),
        ("not " * 40 + "name=a", 128, "nested more than 32 deep"),
        ("(" * 40 + "name=a" + ")" * 40, 32, "nested more than 32 deep"),
        ("name=a" + " or name=a" * 500, 4095, "longer than 4096 characters"),
    ],
)
def test_what_cannot_be_read_is_shown_at_its_character(text: str, position: int, words: str):
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert (caught.value.position, words in str(caught.value)) == (position, True), str(caught.value)
    *_, line, caret = str(caught.value).split("\n")
    assert caret.endswith("^") and len(caret) <= len(line) + 1
    assert "\x1b" not in str(caught.value)


names = st.one_of(
    st.sampled_from([name for name, kind in ATTRIBUTES.items() if kind is Kind.TEXT]), st.just("label.a-b")
)
values = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)
tests = st.one_of(
    st.builds(Compare, names, st.sampled_from(["=", "!="]), values),
    st.builds(Compare, st.just("agent"), st.sampled_from(["<", "<=", ">", ">=", "="]), st.sampled_from(["1", "0.2.0"])),
    st.builds(In, names, st.lists(values, min_size=1, max_size=3).map(tuple)),
    st.builds(Has, names),
)
several = lambda inner: st.lists(inner, min_size=2, max_size=3).map(tuple)  # noqa: E731
joined = lambda inner: st.one_of(  # noqa: E731
    st.builds(Not, inner), st.builds(And, several(inner)), st.builds(Or, several(inner))
)
selectors = st.recursive(tests, joined, max_leaves=8)


@given(selectors)
def test_what_is_written_reads_back_as_the_same(selector: Selector):
    assert parse(unparse(selector)) == selector
    assert attributes(parse(unparse(selector))) == attributes(selector)


@given(selectors, st.dictionaries(names, values, max_size=4))
def test_a_contrary_is_a_contrary(selector: Selector, facts: dict[str, str]):
    assert matches(Not(selector), facts) is not matches(selector, facts)


@given(st.text(max_size=60))
@example("\\")
@example('"\\')
@example("name=*" * 9)
def test_any_text_is_read_or_refused_at_a_character_of_it(text: str):
    try:
        parse(text)
    except SelectorError as error:
        assert 0 <= error.position <= len(text)


@given(st.text("*a?[]!", max_size=12), st.text("a?[]!", max_size=12))
def test_only_a_star_is_a_wildcard(value: str, known: str):
    found = matches(Compare("name", "=", value), {"name": known})
    if "*" not in value:
        assert found == (value == known)
    elif found:
        head, _, tail = value.partition("*")
        assert known.startswith(head) and known.endswith(tail.rsplit("*", 1)[-1])
