from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import UsageError
from fleet.toolchains.quality.calibration import DATA
from fleet.toolchains.quality.evaluation import (
    MAX_PIECES,
    MIN_PIECES,
    MIN_TEXT_TOKENS,
    PIECE_TOKENS,
    bundled,
    foreign,
    from_text,
    pieces,
)


def test_the_bundled_prompts_are_of_four_kinds_and_their_digest_is_known() -> None:
    found = bundled()
    assert len(found.prompts) == len(set(found.prompts)) >= 32
    assert any("Python" in prompt for prompt in found.prompts)
    assert any("三" in prompt for prompt in found.prompts)
    # Manifests name it: a changed prompt is another evaluation, with another version and so another label.
    assert found.digest == "baafe7bc86d0eceb605009943683b2ca9cfdec8d9793fb0cfb8ff6dcb32b21fe"
    assert found.label == "phifleet-eval-1:baafe7bc86d0eceb"


def test_what_is_scored_is_not_what_calibrations_see() -> None:
    seen = "\n".join(path.read_text(encoding="utf-8") for path in DATA.iterdir())
    assert len(seen) > 60_000
    assert not [prompt for prompt in bundled().prompts if json.dumps(prompt)[1:-1] in seen or prompt in seen]
    lines = [line for passage in foreign().passages for line in passage.splitlines() if len(line) > 40]
    assert len(lines) > 80 and not [line for line in lines if line in seen]


def test_the_foreign_passages_are_of_many_kinds_and_their_digest_is_known() -> None:
    found = foreign()
    assert len(found.passages) == 10 and all(len(one) > 700 for one in found.passages)
    # Manifests name it: a changed passage is another evaluation, with another version and so another label.
    assert found.label == "phifleet-foreign-1:34292c596759427e"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"\x7fELF\x00\x01", "binary"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
    ],
)
def test_a_text_that_is_none_is_refused_by_name(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=said) as caught:
        from_text(path)
    assert "mine.txt" in str(caught.value)


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        from_text(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        from_text(tmp_path)


def test_a_text_is_known_by_name_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffWörter, viele.".encode())
    found = from_text(path)
    assert found.text == "Wörter, viele."
    assert found.label.startswith("text-mine.txt:")


@given(st.integers(MIN_TEXT_TOKENS, 40_000))
def test_pieces_are_whole_disjoint_and_few(count: int) -> None:
    found = pieces(range(count))
    assert MIN_PIECES <= len(found) <= MAX_PIECES
    assert {len(ids) for ids, _ in found} == {min(PIECE_TOKENS, count // MIN_PIECES)}
    assert all(start == len(ids) // 2 for ids, start in found)
    firsts = [ids[0] for ids, _ in found]
    assert sorted(set(firsts)) == firsts


@given(st.integers(0, MIN_TEXT_TOKENS - 1))
def test_too_short_a_text_is_refused_with_the_figures(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} tokens.*at least {MIN_TEXT_TOKENS}"):
        pieces(range(count))
