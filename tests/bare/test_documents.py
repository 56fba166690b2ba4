"""Every command that README and operations.md name is run by `make test-bare`, or says why it is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.bare.documents import DOCUMENTS, ROOT, Block, fenced, shell_blocks
from tests.bare.machine import USERS

#: Languages of blocks that hold no commands. A block without a language could hide some.
NO_COMMANDS = {"text", "mermaid", "python", "toml", "xml", "json"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_run_or_says_why_not(document: Path):
    for block in fenced(document):
        assert block.language == "sh" or block.language in NO_COMMANDS, f"{block}: language {block.language!r}"
        assert block.user in USERS, f"{block}: nobody is called {block.user}"
        assert not block.not_run or len(block.not_run.split()) >= 3, f"{block}: {block.not_run!r} is no reason"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_comment_about_a_block_stands_right_before_it_in_the_form_that_is_read(document: Path):
    lines = document.read_text(encoding="utf-8").splitlines()
    read = sum(bool(block.not_run) or block.user != "operator" for block in fenced(document))
    written = sum(line.startswith(("<!-- as", "<!-- not run", "<!--as", "<!--not")) for line in lines)
    assert read == written


@pytest.mark.parametrize("block", [block for path in DOCUMENTS for block in shell_blocks(path)], ids=str)
def test_a_block_is_correct_bash(block: Block):
    done = subprocess.run(["bash", "-n"], input=block.text, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_document_names_the_package_as_if_it_were_on_an_index():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    for path in documents:
        if path.name != "CHANGELOG.md":
            text = path.read_text(encoding="utf-8")
            assert "install 'phifleet" not in text and "install phifleet" not in text, path


def test_blocks_are_found_with_who_runs_them_and_why_nobody_does(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\na\n```\n\n<!-- as: admin -->\n```sh\nb\nc\n```\n\n<!-- not run: needs a moon -->\n```sh\nd\n```\n\n"
        "<!-- as: admin -->\n\n```sh\ne\n```\n```text\nf\n```\n"
    )
    found = [(block.line, block.text, block.user, block.not_run) for block in shell_blocks(page)]
    assert found == [
        (1, "a", "operator", ""),
        (6, "b\nc", "admin", ""),
        (12, "d", "operator", "needs a moon"),
        (18, "e", "operator", ""),
    ]
