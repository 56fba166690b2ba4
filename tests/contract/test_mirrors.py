"""Addresses of mirrors: what a person writes, why it is none, and what becomes of it for a file."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.contract.manifest import ArtifactFile
from agent.contract.messages import TransferLimits
from agent.contract.mirrors import check_mirror, mirror_url
from agent.contract.profile import Delivery
from agent.errors import ConfigError
from agent.settings import AgentSettings, load
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
        ("https://a..b/{digest}/{path}", "is no address of a web server"),
        (f"https://{'a' * 64}.example/{{digest}}/{{path}}", "is no address of a web server"),
        (f"https://{'a.' * 150}example/{{digest}}/{{path}}", "is no address of a web server"),
        ("https://-a.example/{digest}/{path}", "is no address of a web server"),
        ("https://models.example/{digest}", "every file of every artifact needs its own"),
        ("https://models.example/{path}", "every file of every artifact needs its own"),
        (
            "https://models.example/{digest}/{file}",
            r"is none of \{digest\}, \{id\} and \{path\}; write https://HOST/\{digest\}/\{path\}",
        ),
        ("https://models.example/{digest}/{path}/{}", "a field in braces that is none of"),
        ("https://models.example/{digest}/{path}{", "a brace without its other"),
        ("https://models.example/{{digest}}/{path}", "a brace without its other"),
        ("https://anna:secret@models.example/{digest}/{path}", "has a password in it"),
        ("https://models.example/{digest}/{path}#part", "what follows is never sent to a server"),
        ("https://models.example/{digest}/{path}#", "what follows is never sent to a server"),
        ("https://models.example:99999/{digest}/{path}", "has a port that is none"),
        ("https://models.example:0/{digest}/{path}", "has port 0"),
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


@pytest.mark.parametrize(
    "text",
    [
        "https://anna:hunter2@models.example/{digest}/{path}",
        "https://anna:hunter2ä@models.example/{digest}/{path}",
        "anna:hunter2@models.example/{digest}/{path}",
        "https://anna:hunter2@models.example/{digest}",
        "https://models.example:hunter2/{digest}/{path}",
        "https://models.example/{hunter2}/{path}",
    ],
)
def test_a_password_is_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^(has|is) ") as error:
        check_mirror(text)
    file = tmp_path / "agent.toml"
    file.write_text(f"mirrors = [{json.dumps(text)}]\n")
    with pytest.raises(ConfigError, match="mirrors") as told:
        load({}, file)
    assert "hunter2" not in f"{error.value} {told.value}"


paths = st.lists(
    st.text(st.characters(exclude_characters="/\\:\0", exclude_categories=("Cs",)), min_size=1), min_size=1, max_size=3
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
