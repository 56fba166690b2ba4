"""The bytes of a token are its own, also where it is a part of a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.inference import TokenEvent, TokenLogprob
from agent.endpoint.openai.answers import chat_logprobs
from agent.runtimes.engines.token_bytes import TokenBytes, _alphabet, read_pieces


def written(folder: Path, tokenizer: object) -> TokenBytes:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return TokenBytes(folder)


def byte_level(words: dict[str, int], **rest: object) -> dict[str, object]:
    return {"model": {"type": "BPE", "vocab": words}, "decoder": {"type": "ByteLevel"}, **rest}


def test_a_part_of_a_character_has_the_bytes_of_the_vocabulary(tmp_path: Path):
    emoji = "🙂".encode()
    letters = {byte: char for char, byte in _alphabet().items()}
    words = {"".join(letters[byte] for byte in part): at for at, part in enumerate((emoji[:2], emoji[2:], b" a"))}
    known = written(tmp_path, byte_level(words, added_tokens=[{"id": 9, "content": "<|end|>"}]))
    assert known.of(0, "�") == emoji[:2]
    assert known.of(1, "��") == emoji[2:]
    assert known.of(9, "�") == b"<|end|>"
    assert known.of(2, " a") is None, "the text says it already"
    assert known.of(77, "�") is None


def test_sentence_pieces(tmp_path: Path):
    decoder = {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}
    known = written(tmp_path, {"model": {"vocab": {"<0xF0>": 0, "▁Paris": 1}}, "decoder": decoder})
    assert known.of(0, "�") == b"\xf0"
    assert known.of(1, "�") == b" Paris"


def test_unigram_lists_and_sequences_of_decoders(tmp_path: Path):
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}
    known = written(tmp_path, {"model": {"vocab": [["Ġa", -1.0], ["b", -2.0]]}, "decoder": decoder})
    assert (known.of(0, "�"), known.of(1, "�")) == (b" a", b"b")


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"model": 1}', '{"model": {"vocab": 7}}', '{"model": {"vocab": ["a"]}}', b"\xff"]
)
def test_without_a_readable_vocabulary_the_bytes_are_unknown(tmp_path: Path, content: str | bytes | None):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_pieces(file) == {}
    assert TokenBytes(tmp_path).of(0, "�") is None


@given(st.text(min_size=1).filter(lambda text: "�" not in text), st.data())
def test_the_bytes_of_all_tokens_make_the_text(text: str, data: st.DataObject):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)))))
    parts = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    out = b""
    for part in parts:
        shown = part.decode("utf-8", "replace")
        own = TokenLogprob(shown, -0.5, 0, None if shown.encode() == part else part)
        entry = chat_logprobs(TokenEvent("r", "", 1, own), 0)
        assert entry is not None
        out += bytes(entry["bytes"])
    assert out == raw


def test_bytes_that_nobody_knows_are_null():
    entry = chat_logprobs(TokenEvent("r", "", 1, TokenLogprob("�", -0.5)), 0)
    assert entry is not None and entry["bytes"] is None
