from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.runtimes.engines.generation import common_prefix
from agent.runtimes.engines.text import JsonStream, Pieces, PieceStream, StopStrings, Utf8Stream

_letters = st.text("ab\n<é", max_size=30)
_stops = st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=4)


def _pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def _first_stop(text: str, stops: list[str]) -> str:
    """By definition: the text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(word) for word in stops if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)]
    return text


@given(_letters, _stops, st.lists(st.integers(0, 100), max_size=8))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = StopStrings(stops)
    shown = "".join(stream.feed(piece) for piece in _pieces(text, cuts)) + stream.flush()
    assert shown == _first_stop(text, stops)
    assert (stream.matched is not None) == (shown != text)


@given(st.text(max_size=20), st.lists(st.integers(0, 100), max_size=8))
def test_bytes_come_out_as_the_text_they_are(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    data = text.encode()
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    stream = Utf8Stream()
    shown = [stream.feed(data[start:end]) for start, end in pairwise(edges)]
    assert "".join(shown) + stream.flush() == text
    assert not any("�" in piece for piece in shown) or "�" in text


def test_a_character_cut_off_at_the_end_is_shown_as_replaced() -> None:
    stream = Utf8Stream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.flush() == "�"


def _decode(tokens: Sequence[int]) -> str:
    """As byte-level tokenizers do it."""
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text("aé😀 b", max_size=40))
def test_tokens_of_single_bytes_come_out_as_whole_characters(text: str) -> None:
    stream = PieceStream(Pieces(_decode, ord("a")))
    shown = [stream.feed(byte) for byte in text.encode()]
    assert "".join(shown) + stream.flush() == text
    assert not any("�" in piece for piece in shown)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_neither_stop_the_stream_nor_lose_what_is_text(data: bytes) -> None:
    stream = PieceStream(Pieces(_decode, ord("a")))
    shown = "".join(stream.feed(byte) for byte in data) + stream.flush()
    assert [char for char in shown if char.isascii()] == [chr(byte) for byte in data if byte < 128]


def test_a_leading_space_is_shown_where_the_tokenizer_shows_it() -> None:
    words = ["a", " The", " cat"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).removeprefix(" ")

    stream = PieceStream(Pieces(decode, 0))
    assert [stream.feed(1), stream.feed(2)] == ["The", " cat"]


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_the_common_beginning(left: list[int], right: list[int]) -> None:
    size = common_prefix(left, right)
    assert left[:size] == right[:size]
    assert size == min(len(left), len(right)) or left[size] != right[size]


class Said:
    """A stream whose tokens are numbers of its pieces; the last piece comes when it is flushed."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def feed(self, token: int, /) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.pieces[-1]


@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 5))
def test_control_characters_in_strings_are_written_as_json_has_them(texts: list[str], size: int) -> None:
    """As an engine writes them that escapes quotes and backslashes, and nothing else."""
    raw = "{\n" + ",\t".join(f'"{n}": ' + _raw(text) for n, text in enumerate(texts)) + "\n}"
    pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
    stream = JsonStream(Said(pieces))
    text = "".join(stream.feed(token) for token in range(len(pieces) - 1)) + stream.flush()
    assert json.loads(text) == {str(n): text for n, text in enumerate(texts)}
    assert text.startswith("{\n"), "between values it stays as it was"


def _raw(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
