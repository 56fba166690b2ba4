from __future__ import annotations

import importlib.util
import io
import json
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.contract.bundle import Bundle
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import Failure, HealthReport, Progress, Reported, State
from fleet.cli import main as entry
from fleet.core.deployments import Stage
from fleet.core.fit import incompatibilities
from fleet.operations.deploy import ordered
from fleet.registry import Received, Recorder
from fleet.registry.models import DeploymentRow
from fleet.trust.ca import DeviceCA
from tests.fleet.cli.conftest import Phifleet
from tests.fleet.world import PROFILE, World, controller_runs, put_artifact, topic_of


def hear(world: World, *messages: object) -> None:
    """As the controller writes down what devices say."""
    heard = [Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in messages]  # type: ignore[attr-defined]
    Recorder(world.registry).record(heard)


def fits(world: World, manifest: Manifest) -> bool:
    return incompatibilities(manifest, world.profile, None) == ()


def queued(world: World) -> DeploymentRow:
    """The first order that waits to be published, with its envelope."""
    claim = world.registry.outbox.claim("test", datetime.now(UTC), 10)[0]
    assert claim.deployment is not None
    return world.registry.deployments.get(claim.deployment)


# The command as a whole


def test_help_lists_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "fleet", "--help"], capture_output=True, text=True, check=True).stdout
    for name, (_, text) in entry.COMMANDS.items():
        assert name in shown and text.split()[0] in shown


def test_status_imports_no_toolchain_and_no_broker(world: World) -> None:
    heavy = "torch,transformers,onnxruntime_genai,iotcore,tuf,aiohttp"
    code = (
        "import sys; from fleet.cli.main import run; code = run(['--home', sys.argv[1], 'status', '--json']);"
        f"sys.exit(code or int(any(name in sys.modules for name in '{heavy}'.split(','))))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(world.home.root)], check=False).returncode == 0


def test_version(phifleet: Phifleet) -> None:
    assert phifleet("--version").out.startswith("phifleet 0.")


def test_a_command_that_there_is_not_names_the_nearest(phifleet: Phifleet) -> None:
    result = phifleet("stauts")
    assert result.code == 2 and "Did you mean status?" in result.err


def test_every_command_that_is_listed_can_be_imported(phifleet: Phifleet) -> None:
    for name, (place, _) in entry.COMMANDS.items():
        if importlib.util.find_spec(place.split(":")[0]) is None:
            assert phifleet(name, "--help").err.strip().endswith("is not part of this version")
            continue
        result = phifleet(name, "--help")
        assert result.code == 0 and "Usage: phifleet" in result.out, name


def test_an_interrupt_ends_with_130_and_no_trace(phifleet: Phifleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.cli, "main", interrupted)
    result = phifleet("status")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("device", "add", "pi-1", "--profile", PROFILE, "--bundle", "b.json"), 2, "phifleet init"),
        (("serve",), 2, "phifleet init"),
        (("deploy", "x", "--device", "pi-1"), 2, "no device is named pi-1; there are: none"),
        (("device", "show", "pi-1"), 2, "no device is named pi-1"),
        (("device", "remove", "pi-1", "--yes"), 2, "no device is named pi-1"),
        (("status", "pi-1"), 2, "no device is named pi-1"),
        (("serve", "--broker", "http://x"), 2, "flag: broker: must be embedded, mqtt://host:port"),
        (("serve", "--database", "mysql://x"), 2, "phifleet init"),
        (("--config", "/nowhere.toml", "status"), 2, "configuration file /nowhere.toml does not exist"),
    ],
)
def test_bad_input_is_one_line_with_what_to_do(
    phifleet: Phifleet, request: pytest.FixtureRequest, arguments: tuple[str, ...], code: int, message: str
) -> None:
    if "phifleet init" not in message:
        request.getfixturevalue("world")
    result = phifleet(*arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert message in result.err


def test_what_the_system_refuses_is_one_line_with_the_path(
    phifleet: Phifleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")

    def refused(*_: object, **__: object) -> None:
        (file / "folder").mkdir()

    monkeypatch.setattr(entry.cli, "main", refused)
    result = phifleet("status")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {file / 'folder'}: Not a directory\n"


def test_a_sample_model_in_a_folder_that_cannot_be_made_is_one_line(phifleet: Phifleet, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    result = phifleet("sample-model", str(tmp_path / "file" / "model"))
    assert result.code != 0 and str(tmp_path / "file") in result.err.splitlines()[-1]
    assert result.err.splitlines()[-1].startswith("error: ")


# Devices


def test_a_device_is_added_with_a_bundle_that_only_its_owner_may_read(
    phifleet: Phifleet, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "pi-1.json"
    assert phifleet("device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(path)).code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bundle = Bundle.from_json(path.read_bytes())
    assert (bundle.device, bundle.profile, bundle.broker) == ("pi-1", PROFILE, "mqtt://127.0.0.1:18830")
    assert bundle.root.encode() == world.repository.root_bytes()
    assert bundle.private_key is None
    listed = json.loads(phifleet("device", "list", "--json").out)
    assert [(row["device"], row["profile"], row["online"]) for row in listed] == [("pi-1", PROFILE, False)]
    assert "pi-1" in phifleet("device", "list").out


def test_a_bundle_on_standard_output_is_the_bundle_alone(phifleet: Phifleet, world: World) -> None:
    added = phifleet("device", "add", "pi-1", "--profile", PROFILE, "--bundle", "-")
    assert added.code == 0
    assert Bundle.from_json(added.out.encode()).device == "pi-1"
    assert "added pi-1" in added.err and "broker mqtt://127.0.0.1:18830" in added.err
    again = phifleet("device", "bundle", "pi-1", "--bundle", "-")
    assert Bundle.from_json(again.out.encode()).device == "pi-1"


@pytest.mark.parametrize(
    ("broker", "warned"),
    [
        ("mqtt://127.0.0.1:1883", True),
        ("mqtt://127.8.8.8:1883", True),
        ("mqtt://localhost:1883", True),
        ("mqtt://LOCALHOST:1883", True),
        ("mqtt://[::1]:1883", True),
        ("mqtt://broker.example:1883", False),
        ("mqtt://[2001:db8::1]:1883", False),
        ("mqtt://localhost.example:1883", False),
    ],
)
def test_a_bundle_whose_broker_only_this_machine_reaches_is_warned_of(
    phifleet: Phifleet, world: World, tmp_path: Path, broker: str, warned: bool
) -> None:
    path = tmp_path / "pi-1.json"
    added = phifleet("device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(path), "--broker", broker)
    assert added.code == 0 and f"broker {broker}" in added.out, "the operator sees what the device will connect to"
    assert ("warning: no other machine can connect" in added.err) is warned
    path.unlink()
    again = phifleet("device", "bundle", "pi-1", "--bundle", str(path), "--broker", broker)
    assert f"broker {broker}" in again.out
    assert ("warning: no other machine can connect" in again.err) is warned


def test_a_device_of_an_encrypted_broker_gets_a_certificate_that_removal_revokes(
    phifleet: Phifleet, world: World, tmp_path: Path
) -> None:
    DeviceCA(world.home).init()
    path, ca = tmp_path / "b.json", tmp_path / "ca.pem"
    ca.write_text(DeviceCA(world.home).ca_pem())
    config = tmp_path / "fleet.toml"
    config.write_text(f'broker = "mqtts://broker:8883"\nbroker_ca = "{ca}"\n')
    add = ("device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(path))
    assert phifleet("--config", str(config), *add).code == 0
    bundle = Bundle.from_json(path.read_bytes())
    assert bundle.broker_ca == ca.read_text()
    assert bundle.certificate is not None and bundle.private_key is not None
    removed = phifleet("device", "remove", "pi-1", "--yes")
    assert removed.code == 0 and "crl.pem" in removed.out
    assert json.loads(phifleet("device", "list", "--json").out) == []


def test_neither_bundle_nor_id_is_ever_used_twice(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text("mine")
    taken = phifleet("device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(path))
    assert taken.code == 2 and "never overwritten" in taken.err and path.read_text() == "mine"
    world.add("pi-1")
    other = tmp_path / "c.json"
    twice = phifleet("device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(other))
    assert twice.code == 2 and "there already" in twice.err and not other.exists()


@pytest.mark.parametrize("name", ["Pi", "pi_1", "-pi", "a" * 64, "../x", "pi/1", "+", "fleet.controller"])
def test_a_device_id_that_could_not_be_in_a_topic_is_refused(
    phifleet: Phifleet, world: World, tmp_path: Path, name: str
) -> None:
    result = phifleet("device", "add", "--profile", PROFILE, "--bundle", str(tmp_path / "b"), "--", name)
    assert result.code == 2 and "no device id" in result.err
    assert not (tmp_path / "b").exists()


def test_an_unknown_profile_names_the_nearest(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    result = phifleet("device", "add", "pi-1", "--profile", "iot-x68", "--bundle", str(tmp_path / "b"))
    assert result.code == 4 and "iot-x86" in result.err


def test_a_profile_from_a_file_goes_with_the_device(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "profiles" / "iot-x86.toml").read_text()
    file = tmp_path / "mine.toml"
    file.write_text(text.replace('name = "iot-x86"', 'name = "mine"'))
    assert phifleet("device", "add", "pi-1", "--profile", str(file), "--bundle", str(tmp_path / "b")).code == 0
    file.unlink()
    assert phifleet("deploy", "sample", "--device", "pi-1").code == 0


def test_show_tells_everything_as_json(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    (order,) = world.deploy("pi-1")
    hear(world, world.presence("pi-1"), world.facts("pi-1"), world.reported(order, State.PROVING))
    controller_runs(world)
    shown = json.loads(phifleet("device", "show", "pi-1", "--json").out)
    assert shown["online"] is True
    assert shown["facts"]["machine"] == "x86_64"
    assert [row["state"] for row in shown["deployments"]] == ["proving"]
    assert "x86_64" in phifleet("device", "show", "pi-1").out


def test_removal_asks_first(phifleet: Phifleet, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("pi-1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = phifleet("device", "remove", "pi-1")
    assert result.code == 130
    assert len(world.registry.devices.all()) == 1


@pytest.mark.parametrize("command", [("add", "pi-2", "--profile", PROFILE), ("bundle", "pi-1")])
def test_a_bundle_in_a_folder_that_is_not_there_is_refused(
    phifleet: Phifleet, world: World, tmp_path: Path, command: tuple[str, ...]
) -> None:
    world.add("pi-1")
    path = tmp_path / "mnt" / "stick" / "b.json"
    result = phifleet("device", *command, "--bundle", str(path))
    assert result.code == 2 and f"the folder {path.parent} does not exist" in result.err
    assert not path.parent.parent.exists()
    assert [row.id for row in world.registry.devices.all()] == ["pi-1"]


def test_the_bundle_of_a_device_is_issued_again_with_a_new_certificate(
    phifleet: Phifleet, world: World, tmp_path: Path
) -> None:
    DeviceCA(world.home).init()
    config = tmp_path / "fleet.toml"
    config.write_text('broker = "mqtts://broker:8883"\n')
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert (
        phifleet("--config", str(config), "device", "add", "pi-1", "--profile", PROFILE, "--bundle", str(first)).code
        == 0
    )
    again = ("--config", str(config), "device", "bundle", "pi-1", "--bundle", str(second))
    result = phifleet(*again)
    assert result.code == 0 and "new certificate" in result.out
    old, new = (Bundle.from_json(path.read_bytes()) for path in (first, second))
    assert (new.device, new.profile, new.broker, new.root) == (old.device, old.profile, old.broker, old.root)
    assert new.certificate and new.certificate != old.certificate and new.private_key != old.private_key
    assert stat.S_IMODE(second.stat().st_mode) == 0o600
    assert ("device.bundle", "pi-1") in [(row.action, row.subject) for row in world.registry.audit.trail()]
    twice = phifleet(*again)
    assert twice.code == 2 and "never overwritten" in twice.err
    unknown = phifleet("device", "bundle", "pi-9", "--bundle", str(tmp_path / "c"))
    assert unknown.code == 2 and "no device is named pi-9" in unknown.err


# Deployments


def test_deploy_publishes_signs_and_records(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1", "pi-2")
    result = phifleet("deploy", world.manifest.id[:12], "--profile", PROFILE, "--probation", "5", "--json")
    assert result.code == 0, result.err
    assert [(row["device"], row["sequence"], row["state"]) for row in json.loads(result.out)] == [
        ("pi-1", 1, "queued"),
        ("pi-2", 1, "queued"),
    ]
    assert world.repository.published() == (world.manifest.digest,)
    desired = ordered(queued(world).envelope)
    assert (desired.device, desired.sequence, desired.probation_s) == ("pi-1", 1, 5)
    assert desired.artifacts[0].digest == world.manifest.digest
    assert desired.transfer.window_bytes == world.profile.delivery.window_bytes
    audit = [(row.action, row.subject) for row in world.registry.audit.trail()]
    assert ("artifact.publish", world.manifest.id) in audit and len(
        [a for a, _ in audit if a == "deployment.create"]
    ) == 2


def test_aliases_are_part_of_the_order(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1", "pi-2")
    assert phifleet("deploy", world.manifest.id, "--device", "pi-1", "--alias", "helper", "--alias", "chat").code == 0
    order = ordered(queued(world).envelope)
    assert order.names is not None and order.names.aliases == ("helper", "chat")
    assert phifleet("deploy", world.manifest.id, "--device", "pi-2").code == 0
    usual = ordered(world.registry.deployments.get(world.registry.deployments.newest()["pi-2"].id).envelope)
    assert usual.names is not None and usual.names.aliases == ("chat",)
    refused = phifleet("deploy", world.manifest.id, "--device", "pi-1", "--alias", "Not good")
    assert (refused.code, "these aliases cannot be" in refused.err) == (2, True)


def test_a_window_is_part_of_the_order_and_the_deadline_counts_from_its_opening(
    phifleet: Phifleet, world: World
) -> None:
    world.add("pi-1")
    opens = datetime.now(UTC) + timedelta(hours=10)
    window = ("--not-before", opens.isoformat(), "--not-after", (opens + timedelta(hours=1)).isoformat())
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", *window)
    assert result.code == 0, result.err
    desired = ordered(queued(world).envelope)
    assert desired.window.not_before == opens
    assert 33.9 * 3600 < desired.deadline_s <= 34 * 3600


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--not-before", "tonight"), "'tonight' is no date and time like 2026-12-24T02:00"),
        (("--not-before", "2100-01-01T00:00"), "when the order has expired"),
        (("--not-after", "2020-01-01T00:00Z"), "before it opens or before now"),
    ],
)
def test_a_window_that_cannot_be_is_refused(
    phifleet: Phifleet, world: World, options: tuple[str, str], says: str
) -> None:
    world.add("pi-1")
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", *options)
    assert result.code == 2
    assert says in result.err
    assert world.registry.deployments.newest() == {}
    assert world.repository.published() == (), "nothing was signed for an order that could not be"


def test_each_order_to_a_device_has_a_larger_sequence(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    for sequence in (1, 2, 3):
        phifleet("deploy", world.manifest.digest, "--device", "pi-1")
        assert world.registry.deployments.newest()["pi-1"].sequence == sequence
    assert [row.stage for row in world.registry.deployments.history("pi-1")] == ["queued", "superseded", "superseded"]


def test_an_artifact_that_does_not_fit_is_refused_with_every_reason(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    wrong = put_artifact(world.home, b"cuda", target="cuda")
    hear(world, world.facts("pi-1", disk_free_bytes=1))
    result = phifleet("deploy", wrong.id, "--device", "pi-1")
    assert result.code == 2
    assert f"pi-1: {wrong.id}: it was built for cuda" in result.err and "MiB free" in result.err
    assert world.repository.published() == () and world.registry.deployments.newest() == {}
    forced = phifleet("deploy", wrong.id, "--device", "pi-1", "--force", "trying the new card")
    assert forced.code == 0
    (entry,) = [row for row in world.registry.audit.trail() if row.action == "deployment.force"]
    assert entry.details is not None and entry.details["reason"] == "trying the new card"


def test_none_is_ordered_when_one_of_many_does_not_fit(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1", "pi-2")
    hear(world, world.facts("pi-2", disk_free_bytes=1))
    assert phifleet("deploy", world.manifest.id, "--profile", PROFILE).code == 2
    assert world.registry.deployments.newest() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampel-onnx_genai", "did you mean sample-onnx_genai-int4"),
        ("sample", "several artifacts begin with sample"),
        ("zzzzzzzz", "there are: sample-onnx_genai-int4"),
    ],
)
def test_an_artifact_that_is_not_one_names_those_that_are_near(
    phifleet: Phifleet, world: World, text: str, message: str
) -> None:
    world.add("pi-1")
    put_artifact(world.home, b"another")
    result = phifleet("deploy", text, "--device", "pi-1")
    assert result.code == 2 and message in result.err


def test_deploy_needs_to_be_told_where(phifleet: Phifleet, world: World) -> None:
    assert "--device ID" in phifleet("deploy", world.manifest.id).err
    assert "no device has the profile" in phifleet("deploy", world.manifest.id, "--profile", "x86-server").err


def test_of_several_variants_each_device_is_ordered_those_that_fit_it(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    other = put_artifact(world.home, b"openvino", toolchain="openvino")
    wrong = put_artifact(world.home, b"cuda", target="cuda")
    result = phifleet("deploy", wrong.id, other.id, world.manifest.id, "--device", "pi-1")
    assert result.code == 0, result.err
    row = queued(world)
    expected = [one.digest for one in (other, world.manifest) if fits(world, one)]
    assert [ref.digest for ref in ordered(row.envelope).artifacts] == expected
    assert world.manifest.digest in expected and wrong.digest not in expected
    assert wrong.digest not in world.repository.published(), "nothing that no device may have is signed"


def test_variants_are_of_one_model(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    model = world.manifest.model.model_copy(update={"name": "another"})
    other = put_artifact(world.home, b"other", id="another-onnx", model=model)
    result = phifleet("deploy", world.manifest.id, other.id, "--device", "pi-1")
    assert result.code == 2 and "must be of one model" in result.err
    assert world.repository.published() == ()


def test_waiting_ends_in_time_and_says_what_is_missing(
    phifleet: Phifleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.cli.deploy.UNPUBLISHED_HINT_S", 0.1)
    world.add("pi-1")
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", "--wait", "--timeout", "1")
    assert result.code == 9
    assert "is `phifleet serve` running" in result.err
    assert result.err.splitlines()[-1].startswith("error: 1 of 1 not committed: pi-1: queued")


def test_an_order_that_a_paused_device_holds_is_shown_as_such(
    phifleet: Phifleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("pi-1")
    none = Reported(device="pi-1", state=State.IDLE, paused=True, at=world.clock.now())
    hear(world, world.presence("pi-1"), none)
    controller_runs(world)
    shown = phifleet("status", "--once").out
    assert "pi-1: paused by the person at the device" in shown
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", "--wait", "--timeout", "1")
    assert result.code == 9
    assert "pi-1: held: the person at the device paused it" in result.err
    assert "pi-1: queued (held: the person at the device paused it)" in result.err.splitlines()[-1]
    (row,) = phifleet("status", "--once").out.splitlines()[2:3]
    assert row.split()[:3] == ["pi-1", "online", "paused"]
    assert json.loads(phifleet("status", "--json").out)["devices"][0]["paused"] is True


def settle(world: World, phifleet: Phifleet, monkeypatch: pytest.MonkeyPatch, state: State, **fields: object) -> None:
    """The device answers between two looks of --wait."""

    def answer(_: float) -> None:
        order = world.registry.deployments.newest()["pi-1"]
        hear(world, world.reported(order, state, **fields))

    monkeypatch.setattr("fleet.operations.deploy.time.sleep", answer)


def test_wait_ends_with_0_when_all_have_committed(
    phifleet: Phifleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("pi-1")
    settle(world, phifleet, monkeypatch, State.COMMITTED, digest=world.manifest.digest, runtime="onnx_genai")
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", "--wait", "--json")
    assert result.code == 0
    (row,) = json.loads(result.out)
    assert (row["state"], row["digest"]) == ("committed", world.manifest.digest)


def test_wait_ends_with_9_and_the_reason_when_one_has_not(
    phifleet: Phifleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("pi-1")
    failure = Failure(code=FailureCode.PROBE_FAILED, message="said London")
    settle(world, phifleet, monkeypatch, State.ROLLED_BACK, failure=failure)
    result = phifleet("deploy", world.manifest.id, "--device", "pi-1", "--wait")
    assert result.code == 9
    assert "pi-1: rolled_back (probe.failed: said London)" in result.err


# Status


def test_status_shows_presence_state_progress_speed_and_failure(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1", "pi-2", "pi-3")
    (first, second) = world.deploy("pi-1", "pi-2")
    progress = Progress(bytes_total=100 * 2**20, bytes_done=50 * 2**20, bytes_received=40 * 2**20, seconds=2)
    failure = Failure(code=FailureCode.STORE_DISK_FULL, message="needs 86 MiB")
    hear(
        world,
        world.presence("pi-1"),
        world.reported(first, State.TRANSFERRING, progress=progress),
        world.reported(second, State.FAILED, failure=failure),
    )
    controller_runs(world)
    shown = phifleet("status", "--once").out
    assert "50% of 100.0 MiB, 20.0 MiB/s" in shown
    assert "online" in shown and "offline" in shown and "store.disk_full: needs 86 MiB" in shown
    document = json.loads(phifleet("status", "--json").out)
    states = {row["device"]: row["deployment"] and row["deployment"]["state"] for row in document["devices"]}
    assert states == {"pi-1": Stage.TRANSFERRING, "pi-2": Stage.FAILED, "pi-3": None}
    assert [row["device"] for row in json.loads(phifleet("status", "pi-2", "--json").out)["devices"]] == ["pi-2"]


def health(world: World, device: str) -> HealthReport:
    return HealthReport(device=device, at=world.clock.now(), window_s=60, requests=5, tokens_per_s=74.0)


def test_the_past_is_never_shown_as_the_present(phifleet: Phifleet, world: World) -> None:
    """With the controller and the agent killed, what is known is old, and says so."""
    world.add("pi-1")
    hear(world, world.presence("pi-1"), health(world, "pi-1"))
    controller_runs(world, datetime.now(UTC) - timedelta(hours=3))
    shown = phifleet("status", "--once").out
    assert "controller: not running; it was heard of last 3 h ago" in shown
    assert "stale" in shown
    assert "online" not in shown
    document = json.loads(phifleet("status", "--json").out)
    assert document["controller_running"] is False
    (device,) = document["devices"]
    assert (device["presence"], device["online"], device["health_stale"]) == ("unknown", False, True)
    assert device["health_age_s"] > 0


def test_a_running_controller_whose_broker_is_away_says_so(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    assert "none has ever run on this database" in phifleet("status", "--once").out
    controller_runs(world)
    assert "controller: running on here (process 1)" in phifleet("status", "--once").out


def test_a_revoked_device_says_so_everywhere_and_is_ordered_nothing(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1", "pi-2")
    world.deploy("pi-1")
    done = phifleet("device", "revoke", "pi-1", "--yes")
    assert done.code == 0 and "revoked pi-1" in done.out
    assert "revoked since" in phifleet("status", "--once").out
    listed = phifleet("device", "list").out
    assert next(line for line in listed.splitlines() if "pi-1" in line).split()[2] == "revoked"
    assert json.loads(phifleet("device", "show", "pi-1", "--json").out)["revoked_at"]
    assert "pi-1 is revoked since" in phifleet("device", "show", "pi-1").out
    refused = phifleet("deploy", world.manifest.id, "--device", "pi-1")
    assert refused.code == 2 and "revoked since" in refused.err
    # The others of its kind are not held up by it.
    assert phifleet("deploy", world.manifest.id, "--profile", PROFILE).out.startswith("pi-2: ordered")
    assert phifleet("device", "revoke", "nobody", "--yes").code == 2


def test_what_was_withdrawn_is_not_published_by_the_next_order(phifleet: Phifleet, world: World) -> None:
    world.add("pi-1")
    assert phifleet("deploy", world.manifest.id, "--device", "pi-1").code == 0
    assert phifleet("trust", "withdraw", world.manifest.digest[:10], "--reason", "answers wrongly").code == 0
    refused = phifleet("deploy", world.manifest.id, "--device", "pi-1")
    assert refused.code == 2
    assert "was withdrawn on" in refused.err and "answers wrongly" in refused.err
    assert f"trust reinstate {world.manifest.digest[:12]}" in refused.err
    assert world.repository.published() == ()
    assert phifleet("trust", "reinstate", world.manifest.digest[:12]).code == 0
    assert phifleet("deploy", world.manifest.id, "--device", "pi-1").code == 0


READING = [
    ("status", "--once"),
    ("status", "--json"),
    ("device", "list"),
    ("device", "show", "pi-1"),
    ("artifacts", "list"),
    ("artifacts", "compare"),
    ("deploy", "sample", "--device", "pi-1"),
    ("trust", "status"),
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_mistyped_home_is_an_error_and_nothing_is_made(phifleet: Phifleet, command: tuple[str, ...]) -> None:
    result = phifleet(*command)
    assert result.code != 0
    assert str(phifleet.home) in result.err and "phifleet init" in result.err
    assert not phifleet.home.exists()


def test_a_database_that_holds_no_fleet_is_left_as_it_is(
    phifleet: Phifleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIFLEET_DATABASE", f"sqlite:///{tmp_path / 'none.db'}")
    result = phifleet("status", "--once")
    assert result.code == 8 and "none.db" in result.err
    assert not (tmp_path / "none.db").exists()


def test_global_options_are_taken_after_the_command_too(phifleet: Phifleet, world: World, tmp_path: Path) -> None:
    world.add("pi-1")
    capture = phifleet.capture
    assert entry.run(["device", "list", "--home", str(phifleet.home), "--log-level=error"]) == 0
    assert "pi-1" in capture.readouterr().out


def test_status_of_an_empty_fleet_says_what_to_do(phifleet: Phifleet, world: World) -> None:
    assert "phifleet device add" in phifleet("status", "--once").out
