"""Documents that the code cites are in the repository, and links between documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("agent", "fleet", "bench") for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])


def test_every_document_that_a_docstring_names_is_there():
    missing = [
        f"{source.relative_to(ROOT)}: {name}"
        for source in SOURCES
        for name in re.findall(r"(?<![/\w])((?:docs/|[A-Z]{4,})[\w/.-]*\.md)\b", source.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file(document: Path):
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (document.parent / target).exists()] == []
