"""`phifleet init` and `phifleet trust`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fleet.cli import trust as commands
from fleet.cli.context import Context
from fleet.errors import FleetError
from fleet.home import Home
from fleet.trust.ca import DeviceCA
from fleet.trust.repository import Repository
from tests.simulators.repository import make_manifest


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context.load({"home": tmp_path / "fleet"}, None)


def call(context: Context, *arguments: str) -> Result:
    command = commands.init if arguments[0] == "init" else commands.trust
    return CliRunner().invoke(command, arguments[1:], obj=context, catch_exceptions=True)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(result: Result) -> str:
    assert isinstance(result.exception, FleetError), result.output
    return str(result.exception)


def test_init_says_where_things_are_and_what_to_do(context: Context) -> None:
    output = done(call(context, "init"))
    assert str(context.home.keys) in output
    assert "move the files root-*.pem onto media of their own" in output
    assert Repository(context.home).exists
    assert DeviceCA(context.home).exists


def test_init_completes_what_is_missing(context: Context) -> None:
    Repository(context.home).init()
    done(call(context, "init"))
    assert DeviceCA(context.home).exists
    assert "holds a repository already" in refused(call(context, "init"))


def test_init_refuses_what_cannot_be(context: Context) -> None:
    assert "--timestamp-days must be more than 0" in refused(call(context, "init", "--timestamp-days", "0"))
    assert "must be from 1 to the 1 root keys" in refused(call(context, "init", "--root-keys", "1"))
    assert not Repository(context.home).exists


def test_status_of_a_home_without_a_repository(context: Context) -> None:
    assert "run `phifleet init`" in refused(call(context, "trust", "status"))


def test_status(context: Context) -> None:
    done(call(context, "init", "--timestamp-days", "2"))
    rows = {row["role"]: row for row in json.loads(done(call(context, "trust", "status", "--json")))}
    assert rows["root"]["threshold"] == 2
    assert len(rows["root"]["keys"]) == 3
    assert rows["director"]["expires"] is None
    assert "timestamp" in done(call(context, "trust", "status"))


def test_rotate_renew_and_refresh(context: Context) -> None:
    done(call(context, "init"))
    assert "timestamp is now held by" in done(call(context, "trust", "rotate", "timestamp"))
    assert "deploy them again" in done(call(context, "trust", "rotate", "director"))
    assert "root is now version 3" in done(call(context, "trust", "renew", "root"))
    assert "nothing is due" in done(call(context, "trust", "refresh"))
    assert "has no key 'zz'" in refused(call(context, "trust", "rotate", "root", "--key", "zz"))


def test_rotate_to_a_vault_wants_both_halves_of_the_answer(context: Context, tmp_path: Path) -> None:
    done(call(context, "init"))
    assert "go together" in refused(call(context, "trust", "rotate", "targets", "--uri", "awskms:alias/x"))
    pem = tmp_path / "key.pem"
    pem.write_bytes(b"nonsense")
    arguments = ("trust", "rotate", "director", "--uri", "awskms:alias/x", "--public-key", str(pem))
    assert "is no public key in PEM" in refused(call(context, *arguments))
    pem.write_bytes(
        Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    done(call(context, *arguments))
    assert "awskms:alias/x" in Repository(context.home).status()[-1].keys.values()


def test_offline_root_keys(context: Context, tmp_path: Path) -> None:
    done(call(context, "init"))
    medium = tmp_path / "medium"
    medium.mkdir()
    for path in context.home.keys.glob("root-*.pem"):
        path.rename(medium / path.name)
    assert "root needs 2 keys" in refused(call(context, "trust", "rotate", "snapshot"))
    done(call(context, "trust", "rotate", "snapshot", "--offline-keys", str(medium)))


def test_withdraw_and_revoke(context: Context) -> None:
    done(call(context, "init"))
    manifest = make_manifest()
    Repository(context.home).publish(manifest)
    assert "of 0 digests" in refused(call(context, "trust", "withdraw", "zz"))
    why = ("--reason", "answers in the wrong language")
    assert manifest.digest in done(call(context, "trust", "withdraw", manifest.digest[:8], *why))
    assert Repository(context.home).published() == ()
    # Withdrawn it stays, also when it is said again; only `reinstate` lets it be published once more.
    assert manifest.digest in done(call(context, "trust", "withdraw", manifest.digest[:8]))
    assert manifest.digest in done(call(context, "trust", "reinstate", manifest.digest[:8]))
    assert "of 0 digests" in refused(call(context, "trust", "reinstate", manifest.digest[:8]))
    assert "no certificate of it is in force" in refused(call(context, "trust", "revoke", "pi-1"))
    DeviceCA(context.home).enrol("pi-1")
    assert "revoked pi-1: 1 certificate" in done(call(context, "trust", "revoke", "pi-1"))


def test_issue_for_the_broker_and_the_controller(context: Context, tmp_path: Path) -> None:
    done(call(context, "init"))
    done(call(context, "trust", "issue-broker", "localhost", "127.0.0.1", "--out", str(tmp_path / "pem")))
    assert "good until" in done(call(context, "trust", "issue-controller", "--out", str(tmp_path / "pem")))
    names = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pem").iterdir()}
    assert names == {
        "broker.pem": 0o644,
        "broker-key.pem": 0o600,
        "controller.pem": 0o644,
        "controller-key.pem": 0o600,
        "ca.pem": 0o644,
    }
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(call(context, "trust", "issue-controller", "--out", str(tmp_path / "file")))


def test_home_is_where_the_context_says(context: Context, tmp_path: Path) -> None:
    assert context.home == Home(tmp_path / "fleet")
