"""Addresses of mirrors: what a person writes, why it is none, and what becomes of it for a file."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.contract.manifest import ArtifactFile
from agent.contract.messages import TransferLimits
from agent.contract.mirrors import check_mirror, mirror_url
from agent.contract.profile import Delivery
from agent.settings import AgentSettings
from tests.simulators.artifacts import manifest_of


@pytest.mark.parametrize(
    "text",
    [
        "https://models.example/{digest}/{path}",
        "http://10.0.0.2:8080/{id}/files/{path}",
        "https://[2001:db8::1]/a%20folder/{digest}/{path}?version=3",
        "http://localhost/get?artifact={id}&file={path}",
    ],
)
def test_an_address_that_can_be_used(text: str) -> None:
    assert Delivery(bandwidth_bytes_per_s=1, mirrors=(text,)).mirrors == (text,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no address of a web server"),
        ("models.example/{digest}/{path}", "is no address of a web server"),
        ("ftp://models.example/{digest}/{path}", "is no address of a web server"),
        ("file:///srv/{digest}/{path}", "is no address of a web server"),
        ("https:///{digest}/{path}", "is no address of a web server"),
        ("https://{digest}.example/{path}", "is no address of a web server"),
        ("https://models.example/{digest}", "every file of every artifact needs an address of its own"),
        ("https://models.example/{path}", "every file of every artifact needs an address of its own"),
        ("https://models.example/{digest}/{file}", r"there is no \{file\}; write https://HOST/\{digest\}/\{path\}"),
        ("https://models.example/{digest}/{path}/{}", r"there is no \{\}"),
        ("https://models.example/{digest}/{path}{", "a brace without its other"),
        ("https://models.example/{{digest}}/{path}", "a brace without its other"),
        ("https://anna:secret@models.example/{digest}/{path}", "no password may be in it"),
        ("https://models.example/{digest}/{path}#part", "is never sent to a server"),
        ("https://models.example/{digest}/{path}#", "is never sent to a server"),
        ("https://models.example:99999/{digest}/{path}", "Port out of range"),
        ("https://models.example:0/{digest}/{path}", "0 is no port"),
        ("https://models.example/ä/{digest}/{path}", "write other characters as %XX"),
        ("https://models.example/a b/{digest}/{path}", "write other characters as %XX"),
        ("https://models.example/{digest}/{path}\r\nHost: evil", "write other characters as %XX"),
        ("https://models.example/" + "a" * 1024 + "/{digest}/{path}", "at most 1024 characters"),
    ],
)
def test_one_that_is_none_says_why_wherever_it_stands(text: str, why: str) -> None:
    for kind, more in ((TransferLimits, {}), (Delivery, {"bandwidth_bytes_per_s": 1}), (AgentSettings, {})):
        with pytest.raises(ValidationError, match=f"(?s)mirrors.*{why}"):
            kind(mirrors=(text,), **more)  # type: ignore[call-arg]


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="no password") as error:
        check_mirror("https://anna:hunter2@models.example/{digest}/{path}")
    assert "hunter2" not in str(error.value)


paths = st.lists(
    st.text(st.characters(exclude_characters="/\\:", exclude_categories=("Cs",)), min_size=1), min_size=1, max_size=3
).filter(lambda parts: not {".", ".."} & set(parts))


@given(paths)
def test_no_name_of_a_file_leaves_its_place(parts: list[str]) -> None:
    path = "/".join(parts)
    manifest = manifest_of((ArtifactFile(path=path, size=0, sha256="0" * 64, chunks=()),))
    url = urlsplit(mirror_url("https://models.example/x/{digest}/{path}", manifest, path))
    assert (url.netloc, url.query, url.fragment) == ("models.example", "", "")
    assert unquote(url.path) == f"/x/{manifest.digest}/{path}"
    asked = urlsplit(mirror_url("https://models.example/get?a={id}&file={path}", manifest, path))
    assert parse_qs(asked.query) == {"a": [manifest.id], "file": [path]}
