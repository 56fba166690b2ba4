"""Enrolment by token at the device, against a real API over TLS: whom it tells its token, and what it keeps."""

from __future__ import annotations

import base64
import http.server
import io
import json
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from agent.__main__ import cli, main
from agent.contract.enrolment import PREFIX, EnrolmentToken
from agent.contract.exit_codes import ExitCode
from agent.errors import ConfigError, UnavailableError
from agent.trust import enrolment, identity
from agent.trust.enrolment import Asking, enrol_by_token
from fleet.home import Home
from fleet.operations.enrolment import TokenOptions, make_token
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.settings import FleetSettings
from fleet.trust.ca import DeviceCA
from fleet.trust.clock import utc_now
from tests.fleet.api.test_server import listening
from tests.fleet.world import World, make_world
from tests.simulators.clock import FakeClock

PROFILE = "raspberry-pi-5"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A fleet whose API has a certificate of its own authority."""
    folder = tmp_path_factory.mktemp("fleet")
    made = make_world(folder / "home", clock=FakeClock(utc_now()))
    certify(made.home, folder)
    yield made
    made.registry.close()


def certify(home: Home, folder: Path) -> None:
    ca = DeviceCA(home)
    ca.init()
    credentials = ca.server_certificate(["localhost", "127.0.0.1"])
    (folder / "api.pem").write_text(credentials.certificate)
    (folder / "api-key.pem").write_text(credentials.private_key)
    (folder / "ca.pem").write_text(credentials.ca)


def settings_of(folder: Path) -> dict[str, Any]:
    return {
        "api_cert": folder / "api.pem",
        "api_key": folder / "api-key.pem",
        "broker": "mqtts://broker.example:8883",
        "broker_ca": folder / "ca.pem",
    }


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with listening(world, **settings_of(world.home.root.parent)) as server:
        yield server.url


def token_of(world: World, **options: Any) -> EnrolmentToken:
    with Fleet(FleetSettings(home=world.home.root, **settings_of(world.home.root.parent))) as fleet:
        return make_token(fleet, PROFILE, None, TokenOptions(**options), Actor("test", utc_now()))[1]


def never(*_: Any) -> None:
    pytest.fail("nobody has to be waited for")


def test_a_machine_becomes_a_device(world: World, url: str, tmp_path: Path) -> None:
    token = token_of(world)
    assert token.ca is not None
    result = CliRunner().invoke(
        cli,
        ["enrol", "--url", url, "--token", "-", "--id", "dev-1", "--state-dir", str(tmp_path)],
        input=f"{token}\n",
    )
    assert result.exit_code == 0, result.output
    assert "enrolled as dev-1 (raspberry-pi-5); broker mqtts://broker.example:8883" in result.output
    who = identity.load(tmp_path)
    assert who.certificate is not None and who.private_key is not None and who.broker_ca is not None
    certificate = x509.load_pem_x509_certificate(who.certificate.read_bytes())
    key = load_pem_private_key(who.private_key.read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    assert stat.S_IMODE(who.private_key.stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "identity").iterdir()) == [
        "broker-ca.pem",
        "bundle.json",
        "client-key.pem",
        "client.pem",
        "controller.json",
    ]


def test_an_enrolment_that_was_interrupted_is_gone_on_with(world: World, url: str, tmp_path: Path) -> None:
    """The answer was lost, or the power: the same key asks again, and the token of one use is enough."""
    asking = Asking(url, token_of(world), "dev-2")
    first = enrol_by_token(asking, tmp_path, never, never)
    second = enrol_by_token(asking, tmp_path, never, never)
    assert first.private_key == second.private_key
    with pytest.raises(ConfigError, match="as often as it may be"):
        enrol_by_token(Asking(url, asking.token, "dev-3"), tmp_path / "other", never, never)


def test_it_waits_for_the_operator_and_says_so_once(world: World, url: str, tmp_path: Path) -> None:
    told: list[str] = []

    def sleep(_seconds: float) -> None:
        if told.count("slept") == 2:
            world.registry.enrolments.decide("dev-4", True, Actor("test", utc_now()))
        told.append("slept")

    asking = Asking(url, token_of(world, approval=True), "dev-4")
    bundle = enrol_by_token(asking, tmp_path, lambda: told.append("told"), sleep)
    assert told == ["told", "slept", "slept", "slept"]
    assert bundle.device == "dev-4"


def test_the_token_goes_to_nobody_but_its_controller(world: World, tmp_path: Path) -> None:
    """Somebody answers in the controller's place, with a certificate of an authority of his own."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    certify(Home(folder / "home"), folder)
    heard: list[bytes] = []
    ca = (folder / "ca.pem").read_text()
    with pretending(json.dumps({"certificate": ca}).encode(), folder, heard) as url:
        token = token_of(world)
        with pytest.raises(ConfigError, match="is not the controller that the token is for") as caught:
            enrol_by_token(Asking(url, token, "dev-5"), tmp_path, never, never)
    assert token.secret not in str(caught.value)
    assert heard and all(b"POST" not in one and token.secret.encode() not in one for one in heard)


def test_nor_to_one_who_shows_the_right_authority_and_has_no_certificate_of_it(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    certify(Home(folder / "home"), folder)
    heard: list[bytes] = []
    ca = (world.home.root.parent / "ca.pem").read_text()  # anybody can have it
    with (
        pretending(json.dumps({"certificate": ca}).encode(), folder, heard) as url,
        pytest.raises(UnavailableError, match="its certificate is refused"),
    ):
        enrol_by_token(Asking(url, token_of(world), "dev-5"), tmp_path, never, never)
    assert all(b"POST" not in one for one in heard)


@contextmanager
def pretending(answer: bytes, folder: Path, heard: list[bytes], status: int = 200) -> Iterator[str]:
    """A server that answers everything alike, and notes what it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heard.append(self.requestline.encode() + b"\n" + body)
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", "https://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if folder.joinpath("api.pem").exists():
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "api.pem", folder / "api-key.pem")
        server.socket, scheme = context.wrap_socket(server.socket, server_side=True), "https"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (200, b"<html>hello</html>", "its answer is no JSON object"),
        (200, b"[]", "its answer is no JSON object"),
        (200, b"{}", "it says neither that this machine waits nor that it is enrolled"),
        (200, b'{"state": "enrolled", "bundle": 7}', "its bundle is none"),
        (200, b'{"state": "enrolled", "bundle": {"device": "dev-6"}}', "its bundle is damaged: .*profile: is missing"),
        (404, b"not here", "status 404"),
        (302, b"", "status 302"),
        (502, b'{"title": "Bad Gateway"}', "status 502"),
    ],
)
def test_answers_that_no_controller_gives(tmp_path: Path, status: int, answer: bytes, why: str) -> None:
    with pretending(answer, tmp_path / "none", [], status) as url, pytest.raises(UnavailableError, match=why):
        enrol_by_token(Asking(url, EnrolmentToken("s"), "dev-6"), tmp_path, never, never)


def test_a_controllers_own_fault_is_none_of_the_device(tmp_path: Path) -> None:
    problem = json.dumps({"code": "database", "detail": "the database cannot be used"}).encode()
    with (
        pretending(problem, tmp_path / "none", [], 503) as url,
        pytest.raises(UnavailableError, match="the database cannot be used"),
    ):
        enrol_by_token(Asking(url, EnrolmentToken("s"), "dev-6"), tmp_path, never, never)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="cannot be asked: Connection refused"):
            enrol_by_token(Asking(url, EnrolmentToken("s"), "dev-6"), tmp_path, never, never)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://controller.example:8700", "sent in the clear; use https"),
        ("ftp://controller.example", "write https://HOST:PORT"),
        ("controller.example:8700", "write https://HOST:PORT"),
        ("https://user:secret@controller.example", "write https://HOST:PORT"),
        ("https://controller.example:99999", "is not a URL"),
        ("https://[::1", "is not a URL"),
    ],
)
def test_urls_that_are_not_asked(url: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        enrol_by_token(Asking(url, EnrolmentToken("s"), "dev-6"), tmp_path, never, never)
    assert not list(tmp_path.iterdir()), "nothing is written for a mistyped URL"


def test_a_key_that_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "identity").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"the key .* cannot be"):
        enrol_by_token(Asking("http://127.0.0.1:1", EnrolmentToken("s"), "dev-6"), tmp_path, never, never)
    (tmp_path / "identity").unlink()
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "enrolment-key.pem").write_text("damaged")
    with pytest.raises(UnavailableError, match="remove it and enrol again"):
        enrol_by_token(Asking("http://127.0.0.1:1", EnrolmentToken("s"), "dev-6"), tmp_path, never, never)


@given(st.text(min_size=1), st.one_of(st.none(), st.text()))
def test_a_token_is_read_back_as_it_was_written(secret: str, ca: str | None) -> None:
    token = EnrolmentToken(secret, ca)
    assert EnrolmentToken.parse(f" {token}\n") == token


@given(
    st.one_of(
        st.text(),
        st.binary().map(lambda raw: PREFIX + base64.urlsafe_b64encode(raw).decode()),
        st.text().map(PREFIX.__add__),
    )
)
def test_what_is_no_token_is_said_and_never_quoted(text: str) -> None:
    try:
        found = EnrolmentToken.parse(text)
    except ValueError as error:
        assert "token" in str(error)
        assert len(text) < 8 or text not in str(error)
    else:
        assert EnrolmentToken.parse(str(found)) == found


@pytest.mark.parametrize(
    "document", ['{"secret": 7, "ca": null}', '{"secret": "s", "ca": 7}', '{"ca": null}', "[]", "7"]
)
def test_a_token_whose_parts_are_of_another_kind_is_damaged(document: str) -> None:
    encoded = base64.urlsafe_b64encode(document.encode()).decode().rstrip("=")
    with pytest.raises(ValueError, match="the enrolment token is damaged"):
        EnrolmentToken.parse(PREFIX + encoded)


def test_the_host_name_is_the_devices_id_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, expected in (
        ("Kitchen_Cam.local", "kitchen-cam"),
        ("pi-7", "pi-7"),
        ("--", ""),
        ("\u00fcber", "ber"),
        ("a" * 80, "a" * 63),
    ):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert enrolment.default_device() == expected


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--bundle FILE, or --url URL and --token TOKEN"),
        (["--bundle", "b.json", "--token", "t"], "--bundle FILE, or --url URL and --token TOKEN"),
        (["--bundle", "b.json", "--id", "x"], "go with --token"),
        (["--token", "t"], "--token goes with --url"),
        (["--token", "t", "--url", "https://x"], "an enrolment token begins with"),
        (["--token", str(EnrolmentToken("s")), "--url", "https://x", "--id", "No!"], "'No!' is no device id"),
    ],
)
def test_what_was_typed_wrong_is_said(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("sys.argv", ["phifleet-agent", "enrol", *arguments, "--state-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.USAGE
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_enrolled_as_another_is_left_as_it_is(world: World, url: str, tmp_path: Path) -> None:
    identity.enrol(enrol_by_token(Asking(url, token_of(world), "dev-7"), tmp_path, never, never), tmp_path)
    with pytest.raises(ConfigError, match="is enrolled as dev-7 already: to enrol as dev-8, add --replace"):
        identity.refuse_unless_free(tmp_path, "dev-8", replace=False)
    identity.refuse_unless_free(tmp_path, "dev-7", replace=False)
    identity.refuse_unless_free(tmp_path, "dev-8", replace=True)
