from __future__ import annotations

from pathlib import Path

import pytest

from agent.core.ports import Link
from agent.errors import LinkError
from agent.link import LinkSettings, MqttLink
from agent.link.settings import parse_url, tls_context


@pytest.mark.parametrize(
    ("url", "text", "tls"),
    [
        ("mqtt://broker", "mqtt://broker:1883", False),
        ("mqtts://broker", "mqtts://broker:8883", True),
        ("mqtt://10.0.0.1:1900/", "mqtt://10.0.0.1:1900", False),
        ("mqtt://[::1]:1900", "mqtt://[::1]:1900", False),
        ("mqtt://user:p%40ss@broker:1", "mqtt://broker:1", False),
    ],
)
def test_url_is_taken_apart_and_printed_without_a_password(url: str, text: str, tls: bool) -> None:
    address = parse_url(url)
    assert (str(address), address.tls) == (text, tls)
    assert "p@ss" not in repr(address)


def test_password_in_the_url_is_decoded() -> None:
    address = parse_url("mqtt://us%3Aer:p%40ss@broker")
    assert (address.username, address.password) == ("us:er", "p@ss")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("broker:1883", "mqtt://host:port"),
        ("http://broker", "'http'"),
        ("mqtt://", "names no host"),
        ("mqtt://broker:99999", "mqtt://host:port"),
        ("mqtt://broker:x", "mqtt://host:port"),
        ("mqtt://broker/topic", "/topic"),
        ("", "mqtt://host:port"),
    ],
)
def test_wrong_url_says_what_to_write(url: str, words: str) -> None:
    with pytest.raises(LinkError, match="broker URL") as caught:
        MqttLink(LinkSettings(url, "device"))
    assert words in str(caught.value)


def test_missing_certificates_are_named(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    with pytest.raises(LinkError, match=r"ca\.pem"):
        tls_context(LinkSettings("mqtts://broker", "device", ca_file=ca))
    with pytest.raises(LinkError, match=r"device\.pem"):
        tls_context(LinkSettings("mqtts://broker", "device", cert_file=tmp_path / "device.pem"))
    ca.write_text("no certificate")
    with pytest.raises(LinkError, match=r"ca\.pem"):
        MqttLink(LinkSettings("mqtts://broker", "device", ca_file=ca))


def test_password_is_not_in_the_settings_text() -> None:
    assert "secret" not in repr(LinkSettings("mqtt://broker", "device", password="secret"))


def test_link_is_the_port() -> None:
    link: Link = MqttLink(LinkSettings("mqtt://broker", "device"))
    assert not link.connected
