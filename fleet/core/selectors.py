"""Which devices are meant: a small language over their facts.

    profile=pi-5 and label.site in (lyon, "rue 4") and agent>=0.2 and not served=phi-4-mini

    selector   = conjunction { "or" conjunction }
    conjunction = term { "and" term }
    term       = "not" term | "(" selector ")" | "has" attribute | attribute test
    test       = ("=" | "!=" | "<" | "<=" | ">" | ">=") value | ["not"] "in" "(" value { "," value } ")"
    value      = a word of letters, digits and ._:/@+-*, or a text in double quotes with \\" and \\\\

``=`` and ``!=`` take ``*`` in a word for any characters. Attributes are those of ``ATTRIBUTES``, and ``label.NAME``.
A device that lacks an attribute has none of its values: ``label.site!=lyon`` holds for a device without that label.
``<`` and its like compare versions (``agent``) and numbers; a device that lacks the attribute is not among them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from fleet.errors import UsageError

MAX_LENGTH = 4096
MAX_DEPTH = 32

_LABEL = re.compile(r"label\.[a-z0-9][a-z0-9_.-]{0,62}")
_TOKEN = re.compile(
    r"""\s*(?:(?P<op><=|>=|!=|=|<|>|\(|\)|,)|"(?P<text>(?:[^"\\\x00-\x1f]|\\["\\])*)"|(?P<word>[\w.:/@+*-]+))"""
)
_PLAIN = re.compile(r"[\w.:/@+*-]+")
_KEYWORDS = frozenset({"and", "or", "not", "in", "has"})


class Kind(StrEnum):
    """How values of an attribute are compared."""

    TEXT = "text"
    VERSION = "version"
    NUMBER = "number"


#: What may be asked of a device, beside its labels.
ATTRIBUTES: Mapping[str, Kind] = MappingProxyType(
    {
        "name": Kind.TEXT,
        "profile": Kind.TEXT,
        "agent": Kind.VERSION,
        "served": Kind.TEXT,
        "artifact": Kind.TEXT,
        "state": Kind.TEXT,
        "presence": Kind.TEXT,
        "machine": Kind.TEXT,
        "runtime": Kind.TEXT,
        "memory_gib": Kind.NUMBER,
        "cpus": Kind.NUMBER,
    }
)

Facts = Mapping[str, str | float | None]
"""Of one device, by attribute; ``label.NAME`` for its labels. What is not known is not there, or None."""


class SelectorError(UsageError):
    """A selector cannot be read; the text shows where. ``position`` counts characters from 0."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        shown = "".join(char if char.isprintable() else " " for char in text)
        start = max(0, position - 60)
        line = shown[start : position + 60]
        super().__init__(f"selector: {problem}\n  {line}\n  {' ' * (position - start)}^")
        self.position, self.problem = position, problem


@dataclass(frozen=True, slots=True)
class Compare:
    """``attribute operator value``."""

    attribute: str
    operator: str
    value: str


@dataclass(frozen=True, slots=True)
class In:
    """The attribute is one of these."""

    attribute: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Has:
    """The attribute is known."""

    attribute: str


@dataclass(frozen=True, slots=True)
class Not:
    """The contrary."""

    term: Selector


@dataclass(frozen=True, slots=True)
class And:
    """All of them."""

    terms: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """One of them at least."""

    terms: tuple[Selector, ...]


Selector = Compare | In | Has | Not | And | Or


def parse(text: str) -> Selector:
    """Read a selector.

    Raises:
        SelectorError: it is none; names the character, and what could stand there.
    """
    if len(text) > MAX_LENGTH:
        raise SelectorError(text[:MAX_LENGTH], MAX_LENGTH - 1, f"it is longer than {MAX_LENGTH} characters")
    parser = _Parser(text)
    selector = parser.selector(0)
    parser.expect_end()
    return selector


def unparse(selector: Selector) -> str:
    """Return the selector as text, which reads back as the same."""
    match selector:
        case Compare(attribute, operator, value):
            return f"{attribute}{operator}{_quoted(value)}"
        case In(attribute, values):
            return f"{attribute} in ({', '.join(_quoted(value) for value in values)})"
        case Has(attribute):
            return f"has {attribute}"
        case Not(term):
            return f"not {_enclosed(term)}"
        case And(terms):
            return " and ".join(_enclosed(term) for term in terms)
        case Or(terms):
            return " or ".join(_enclosed(term) for term in terms)


def attributes(selector: Selector) -> frozenset[str]:
    """Return what it reads: a device has to be looked at again only when one of these changes."""
    match selector:
        case Compare(attribute) | In(attribute) | Has(attribute):
            return frozenset({attribute})
        case Not(term):
            return attributes(term)
        case And(terms) | Or(terms):
            return frozenset().union(*(attributes(term) for term in terms))


def matches(selector: Selector, facts: Facts) -> bool:
    """Return whether a device is meant."""
    match selector:
        case Compare(attribute, operator, value):
            return _compare(attribute, operator, value, facts.get(attribute))
        case In(attribute, values):
            known = facts.get(attribute)
            return known is not None and any(_same(attribute, value, known) for value in values)
        case Has(attribute):
            return facts.get(attribute) is not None
        case Not(term):
            return not matches(term, facts)
        case And(terms):
            return all(matches(term, facts) for term in terms)
        case Or(terms):
            return any(matches(term, facts) for term in terms)


def kind_of(attribute: str) -> Kind:
    """Return how its values are compared; labels are text."""
    return ATTRIBUTES.get(attribute, Kind.TEXT)


def _compare(attribute: str, operator: str, value: str, known: str | float | None) -> bool:
    if operator == "=":
        return known is not None and _same(attribute, value, known)
    if operator == "!=":
        return known is None or not _same(attribute, value, known)
    if known is None:
        return False
    left, right = _ordered(attribute, known), _ordered(attribute, value)
    if left is None or right is None:
        return False
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[operator]


def _same(attribute: str, value: str, known: str | float) -> bool:
    if kind_of(attribute) is Kind.TEXT:
        return fnmatch.fnmatchcase(str(known), _glob(value)) if "*" in value else str(known) == value
    left, right = _ordered(attribute, known), _ordered(attribute, value)
    return left is not None and left == right


def _glob(value: str) -> str:
    """With ``*`` alone as a wildcard."""
    return value.replace("[", "[[]").replace("?", "[?]")


def _ordered(attribute: str, value: str | float) -> tuple[float, ...] | None:
    """Return what values are ordered by; None for what is no number or version."""
    if kind_of(attribute) is Kind.NUMBER:
        try:
            return (float(value),)
        except ValueError:
            return None
    parts = re.findall(r"\d{1,15}", str(value).split("+")[0])
    if not parts:
        return None
    numbers = [float(part) for part in parts]
    while numbers and numbers[-1] == 0:  # 0.2 is 0.2.0
        numbers.pop()
    return tuple(numbers)


def _quoted(value: str) -> str:
    if _PLAIN.fullmatch(value) and value not in _KEYWORDS:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _enclosed(term: Selector) -> str:
    return f"({unparse(term)})" if isinstance(term, And | Or) else unparse(term)


@dataclass(frozen=True, slots=True)
class _Token:
    position: int
    kind: str
    text: str


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split(text))
        self._next = 0

    def _split(self, text: str) -> Sequence[_Token]:
        found, position = [], 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                start = position + len(text[position:]) - len(text[position:].lstrip())
                raise SelectorError(text, start, f"{self._shown(text[start])} cannot stand here")
            found.append(_Token(match.start(match.lastgroup), match.lastgroup, match[match.lastgroup]))
            position = match.end()
        return found

    @staticmethod
    def _shown(char: str) -> str:
        if char == '"':
            return 'a " that is not closed'
        return char if char.isprintable() else f"the character U+{ord(char):04X}"

    def selector(self, depth: int) -> Selector:
        terms = [self._conjunction(depth)]
        while self._take("or"):
            terms.append(self._conjunction(depth))
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def _conjunction(self, depth: int) -> Selector:
        terms = [self._term(depth)]
        while self._take("and"):
            terms.append(self._term(depth))
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def _term(self, depth: int) -> Selector:
        if depth >= MAX_DEPTH:
            raise self._wrong(f"it is nested more than {MAX_DEPTH} deep")
        if self._take("not"):
            return Not(self._term(depth + 1))
        if self._take("("):
            inner = self.selector(depth + 1)
            self._expect(")")
            return inner
        if self._take("has"):
            return Has(self._attribute())
        return self._test(self._attribute())

    def _test(self, attribute: str) -> Selector:
        negated = self._take("not")
        if self._take("in"):
            among = In(attribute, self._values(attribute))
            return Not(among) if negated else among
        if negated:
            raise self._wrong("after `not` comes `in`")
        for operator in ("=", "!=", "<=", ">=", "<", ">"):
            if self._take(operator):
                break
        else:
            raise self._wrong(f"after {attribute} comes =, !=, <, <=, >, >=, in or not in")
        if operator not in ("=", "!=") and kind_of(attribute) is Kind.TEXT:
            raise self._wrong(f"{attribute} is text, and has no order; use = or in")
        return Compare(attribute, operator, self._value(attribute))

    def _values(self, attribute: str) -> tuple[str, ...]:
        self._expect("(")
        values = [self._value(attribute)]
        while self._take(","):
            values.append(self._value(attribute))
        self._expect(")")
        return tuple(values)

    def _value(self, attribute: str) -> str:
        token = self._peek()
        if token is None or token.kind == "op" or (token.kind == "word" and token.text in _KEYWORDS):
            raise self._wrong("a value is missing; put one that is a keyword or has blanks into double quotes")
        value = token.text if token.kind == "word" else re.sub(r"\\(.)", r"\1", token.text)
        if kind_of(attribute) is not Kind.TEXT and _ordered(attribute, value) is None:
            raise self._wrong(f"{attribute} is a {kind_of(attribute)}")
        self._next += 1
        return value

    def _attribute(self) -> str:
        token = self._peek()
        if token is None or token.kind != "word" or token.text in _KEYWORDS:
            raise self._wrong(f"an attribute is missing: label.NAME, {', '.join(ATTRIBUTES)}")
        if token.text not in ATTRIBUTES and not _LABEL.fullmatch(token.text):
            near = difflib.get_close_matches(token.text, ATTRIBUTES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are label.NAME, {', '.join(ATTRIBUTES)}"
            raise self._wrong(f"no attribute is named {token.text}; {hint}")
        self._next += 1
        return token.text

    def expect_end(self) -> None:
        if self._peek() is not None:
            raise self._wrong("here comes `and`, `or`, or nothing")

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._wrong(f"{text} is missing")

    def _take(self, text: str) -> bool:
        token = self._peek()
        if token is None or token.kind == "text" or token.text != text:
            return False
        self._next += 1
        return True

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _wrong(self, problem: str) -> SelectorError:
        token = self._peek()
        position = len(self._text.rstrip()) if token is None else token.position
        if token is not None and token.kind == "text":
            position -= 1  # of its quotation mark
        return SelectorError(self._text, position, problem)
