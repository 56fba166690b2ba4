"""A stick from the controller's side: what is written on it, and which reports on it are believed."""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract import topics
from agent.contract.chunk_index import INDEX_FILE, index_content, with_index
from agent.contract.manifest import Manifest
from agent.contract.messages import ArtifactRef, Desired, Facts, Presence, Reported, State
from agent.contract.profile import HealthLimits
from agent.contract.stick import INDEX, INDEXES, REPORT_PREFIX, SignedReport, StickIndex, StickMessage, StickReport
from agent.core.chunks import ChunkTable
from agent.errors import AgentError
from agent.platform.files import PRIVATE, write_atomic
from agent.store.stick import Stick
from agent.trust.keys import key_pem, read_key, request_for, signature_of
from fleet.errors import RepositoryError, StoreError, UsageError
from fleet.home import Home
from fleet.operations.devices import add_device, revoke_device
from fleet.operations.fleet import Fleet
from fleet.operations.stick import read_stick, write_stick
from fleet.profiles_loader import load_profile
from fleet.registry import Actor
from fleet.settings import load
from fleet.store import FolderStore, find
from fleet.trust.ca import Credentials, DeviceCA
from fleet.trust.repository import Repository
from tests.fleet.trust.conftest import verified_digests
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.clock import FakeClock

NOW = datetime.now(UTC).replace(microsecond=0)
ANNA = Actor("anna", NOW)
MONTH = timedelta(days=30)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(load({"home": tmp_path / "fleet"}, None)[0]) as fleet:
        Repository(fleet.home).init()
        DeviceCA(fleet.home).init()
        for device in ("pi-1", "pi-2"):
            add_device(fleet, device, load_profile("iot-x86"), tmp_path / f"{device}.bundle", ANNA)
        yield fleet


@pytest.fixture
def digest(fleet: Fleet) -> str:
    """Of an artifact that is in the store and signed."""
    made = make_artifact(fleet.home.root / "made", {"model.onnx": b"graph", "model.onnx.data": noise(300_000)})
    folder = fleet.home.artifacts / made.id
    folder.mkdir(parents=True)
    (fleet.home.root / "made").rename(folder / "files")
    (folder / "manifest.json").write_bytes(made.to_json())
    manifest = find(FolderStore(fleet.home.artifacts), made.id)
    fleet.repository.publish(manifest)
    fleet.registry.artifacts.record(manifest, ANNA)
    return manifest.digest


def order(fleet: Fleet, digest: str, *devices: str, good_for: timedelta = MONTH, age: timedelta = timedelta(0)) -> None:
    [manifest] = [one for one in fleet.artifacts.list().manifests if one.digest == digest]

    def draft(device: str, sequence: int, deployment: str) -> Desired:
        issued_at = NOW - age
        return Desired(
            device=device, sequence=sequence, deployment=deployment, issued_at=issued_at,
            expires_at=issued_at + good_for, artifacts=(ArtifactRef(id=manifest.id, digest=digest),),
            limits=HealthLimits(),
        )  # fmt: skip

    fleet.registry.deployments.create(list(devices), draft, fleet.repository.sign_desired, ANNA)


def write(fleet: Fleet, folder: Path, *devices: str, lasting: timedelta = MONTH):  # type: ignore[no-untyped-def]
    return write_stick(fleet, fleet.registry.devices.some(devices), folder, lasting, ANNA, lambda *_: None)


# --- writing


def test_everything_that_a_device_asks_for_is_there(fleet: Fleet, digest: str, tmp_path: Path) -> None:
    order(fleet, digest, "pi-1", "pi-2")
    written = write(fleet, tmp_path / "stick", "pi-1", "pi-2")
    assert (written.devices, len(written.artifacts), written.warnings) == (("pi-1", "pi-2"), 1, ())
    stick = Stick(tmp_path / "stick")
    assert {topics.PREFIX not in name for name in (file.path for file in stick.index.files)} == {True}
    assert stick.order("pi-1") != stick.order("pi-2")
    assert stick.metadata("timestamp.json") and stick.metadata("1.root.json")
    assert stick.metadata("../../etc/passwd") is None
    assert stick.chunk(digest, 0) is not None and stick.chunk(digest, 10_000) is None
    with pytest.raises(AgentError, match="no order for pi-3; it has some for pi-1, pi-2"):
        stick.order("pi-3")


@pytest.fixture
def indexed(fleet: Fleet, digest: str) -> Manifest:
    """The artifact with an index, as if it were large."""
    store = FolderStore(fleet.home.artifacts)
    manifest, index = with_index(find(store, digest), 0)
    (store.folder(manifest.id) / INDEX_FILE).write_bytes(index or b"")
    store.save_manifest(manifest)
    fleet.repository.publish(manifest, index)
    return manifest


def test_an_index_is_carried_beside_its_artifact(fleet: Fleet, indexed: Manifest, tmp_path: Path) -> None:
    order(fleet, indexed.digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1")
    stick, content = Stick(tmp_path / "stick"), index_content(indexed)
    assert content is not None
    packed = stick.chunk(content.digest, 0)
    assert packed == FolderStore(fleet.home.artifacts).index(indexed)
    assert stick.chunk(content.digest, 1) is None and stick.chunk("0" * 64, 0) is None
    table = ChunkTable(indexed, packed)
    for number in range(len(table)):
        assert table.holds(number, stick.chunk(indexed.digest, number) or b"")
    names = [file.path for file in stick.index.files]
    assert not any(name.startswith("tuf/targets/artifacts/") for name in names), "the long manifest stays at home"


def test_an_index_that_is_damaged_on_the_stick_is_told(fleet: Fleet, indexed: Manifest, tmp_path: Path) -> None:
    order(fleet, indexed.digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1")
    [path] = (tmp_path / "stick" / INDEXES).iterdir()
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(AgentError, match=r"the stick's index of artifact .* is damaged: chunk 0 has 4294967295 bytes"):
        Stick(tmp_path / "stick").chunk(indexed.digest, 0)
    path.unlink()
    with pytest.raises(AgentError, match=r"the stick is not whole: indexes/.* has 0 of"):
        Stick(tmp_path / "stick")


def test_who_is_online_never_sees_what_was_signed_for_a_stick(fleet: Fleet, digest: str, tmp_path: Path) -> None:
    """A timestamp that holds a month lets whoever replays it hide newer ones for as long."""
    order(fleet, digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1", lasting=timedelta(days=300))
    carried = json.loads((tmp_path / "stick" / "tuf" / "timestamp.json").read_bytes())["signed"]
    online = json.loads(fleet.repository.read("timestamp.json") or b"")["signed"]
    assert datetime.fromisoformat(carried["expires"]) > NOW + timedelta(days=299)
    assert datetime.fromisoformat(online["expires"]) < NOW + timedelta(days=8)
    assert online["version"] == carried["version"] + 1, "a device that comes back from a stick goes on with it"
    clock = FakeClock()
    clock.set(NOW)
    assert verified_digests(fleet.home, clock, tmp_path / "device") == {digest}


def test_it_ends_with_the_first_signature_that_does_and_says_so(fleet: Fleet, digest: str, tmp_path: Path) -> None:
    order(fleet, digest, "pi-1", good_for=timedelta(days=3))
    written = write(fleet, tmp_path / "stick", "pi-1", lasting=timedelta(days=3000))
    assert written.expires_at == NOW + timedelta(days=3)
    assert len(written.warnings) == 2
    assert "1 order(s) end before the rest of the stick does, the first, of pi-1, on" in written.warnings[0]
    assert "a signature of the fleet ends on" in written.warnings[1]


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda fleet, digest: order(fleet, digest, "pi-1"), r"no order that holds: pi-2; .* `phifleet deploy`"),
        (
            lambda fleet, digest: order(fleet, digest, "pi-1", "pi-2", age=2 * MONTH),
            r"pi-1 \(its order ended on 20",
        ),
        (
            lambda fleet, digest: (order(fleet, digest, "pi-1", "pi-2"), revoke_device(fleet, "pi-2", ANNA)),
            "revoked, and will believe nothing: pi-2",
        ),
    ],
    ids=["without an order", "with an order that has ended", "revoked"],
)
def test_what_cannot_work_is_refused(fleet: Fleet, digest: str, tmp_path: Path, prepare, told) -> None:  # type: ignore[no-untyped-def]
    prepare(fleet, digest)
    with pytest.raises(UsageError, match=told):
        write(fleet, tmp_path / "stick", "pi-1", "pi-2")
    assert not (tmp_path / "stick").exists()


def test_a_stick_that_is_written_again_is_none_until_it_is_whole(fleet: Fleet, digest: str, tmp_path: Path) -> None:
    order(fleet, digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1")
    [file] = [one for one in fleet.home.artifacts.rglob("files/*") if one.is_file()][:1]
    file.write_bytes(b"not what was built")
    next((tmp_path / "stick" / "artifacts" / digest).iterdir()).unlink()
    with pytest.raises(StoreError):
        write(fleet, tmp_path / "stick", "pi-1")
    with pytest.raises(AgentError, match="was not written to its end"):
        Stick(tmp_path / "stick")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)), path=st.text(max_size=40))
def test_whatever_an_index_holds_it_is_told_in_a_sentence(tmp_path: Path, data: bytes, path: str) -> None:
    hostile = json.dumps({
        "written_at": "2026-11-27T00:00:00Z", "expires_at": "2026-11-28T00:00:00Z", "devices": {},
        "files": [{"path": path, "size": 3}],
    }).encode()  # fmt: skip
    for content in (data, hostile):
        (tmp_path / INDEX).write_bytes(content)
        try:
            Stick(tmp_path)
        except AgentError as error:
            assert str(tmp_path) in str(error) or "the stick is not whole" in str(error)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "orders/../../outside", "a\0b"])
def test_an_index_names_nothing_outside(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside").write_bytes(b"abc")
    folder = tmp_path / "stick"
    folder.mkdir()
    index = {"written_at": "2026-11-27T00:00:00Z", "expires_at": "2026-11-28T00:00:00Z", "devices": {}}
    (folder / INDEX).write_text(json.dumps({**index, "files": [{"path": path, "size": 3}]}))
    with pytest.raises(AgentError, match="is damaged"):
        Stick(folder)


@pytest.fixture
def fat(monkeypatch: pytest.MonkeyPatch) -> None:
    """chmod on a stick as Linux has it on FAT, mounted with umask=022: nobody loses the right to read or to run."""
    real = Path.chmod

    def chmod(self: Path, mode: int, *, follow_symlinks: bool = True) -> None:
        if "stick" in self.parts and mode & 0o555 != 0o555:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        real(self, mode, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "chmod", chmod)


@pytest.mark.usefixtures("fat")
def test_a_file_system_without_modes_holds_a_stick(digest: str, fleet: Fleet, tmp_path: Path) -> None:
    order(fleet, digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1")
    assert Stick(tmp_path / "stick").order("pi-1")
    write_atomic(tmp_path / "stick" / "reports" / "pi-1.json", b"{}")  # as the device's command does
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "stick" / "secret", b"key", PRIVATE)
    assert not (tmp_path / "stick" / "secret").exists(), "what nobody else may read is never readable for a moment"


# --- reading


def said(device: str, *, state: State = State.COMMITTED, at: datetime = NOW) -> StickReport:
    reported = Reported(device=device, sequence=1, deployment="d", state=state, at=at)
    facts = Facts(
        device=device, profile="iot-x86", agent_version="0.2", system="Linux", machine="x86_64", cpu="c", cpu_count=2,
        memory_total_bytes=8, memory_available_bytes=4, disk_free_bytes=2, at=at,
    )  # fmt: skip
    messages = ((topics.reported(device), reported), (topics.facts(device), facts))
    return StickReport(
        device=device,
        at=at,
        messages=tuple(StickMessage(topic=to, payload=one.to_json().decode()) for to, one in messages),
    )


def signed(report: StickReport, own: Credentials, prefix: bytes = REPORT_PREFIX) -> SignedReport:
    data = report.to_json()
    signature = signature_of(read_key(own.private_key.encode()), prefix + data)
    return SignedReport(
        report=base64.b64encode(data).decode(),
        certificate=own.certificate,
        signature=base64.b64encode(signature).decode(),
    )


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    (folder / "reports" / f"{name}.json").write_bytes(content)


def test_a_report_changes_what_is_known_of_its_device(fleet: Fleet, tmp_path: Path) -> None:
    put(tmp_path, "pi-1", signed(said("pi-1"), fleet.ca.enrol("pi-1")).to_json())
    [read] = read_stick(fleet, tmp_path, ANNA)
    assert read.refused is None and read.reported is not None and read.reported.state is State.COMMITTED
    row = fleet.registry.devices.get("pi-1")
    assert (row.reported or {})["state"] == "committed" and (row.facts or {})["cpu"] == "c"
    assert not row.online


@pytest.mark.parametrize(
    "make",
    [
        ed25519.Ed25519PrivateKey.generate,
        lambda: rsa.generate_private_key(65537, 2048),
        lambda: ec.generate_private_key(ec.SECP384R1()),
    ],
    ids=["ed25519", "rsa", "p-384"],
)
def test_a_report_is_signed_by_whatever_key_a_device_has(fleet: Fleet, tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    key = make()
    own = fleet.ca.certify("pi-1", request_for(key, "pi-1"))
    mine = Credentials(own.certificate, key_pem(key), own.ca, own.expires)
    put(tmp_path, "pi-1", signed(said("pi-1"), mine).to_json())
    assert read_stick(fleet, tmp_path, ANNA)[0].refused is None
    put(tmp_path, "pi-1", signed(said("pi-1"), mine, b"").to_json())
    assert "the signature is wrong" in (read_stick(fleet, tmp_path, ANNA)[0].refused or "")


def test_what_is_not_signed_cannot_be_carried(fleet: Fleet, digest: str) -> None:
    with pytest.raises(RepositoryError, match=r"artifacts/abab.* is not published"):
        fleet.repository.lasting(MONTH, ["ab" * 32])
    [manifest] = (fleet.home.tuf / "targets" / "artifacts").glob(f"*{digest}.json")
    manifest.unlink()
    with pytest.raises(RepositoryError, match=r"is damaged: targets/artifacts/.* is missing; restore it"):
        fleet.repository.lasting(MONTH, [digest])


def test_a_clock_that_is_ahead_dates_nothing_in_the_future(fleet: Fleet, tmp_path: Path) -> None:
    put(tmp_path, "pi-1", signed(said("pi-1", at=NOW + MONTH), fleet.ca.enrol("pi-1")).to_json())
    assert read_stick(fleet, tmp_path, ANNA)[0].refused is None
    seen = fleet.registry.devices.get("pi-1").last_seen
    assert seen is not None and seen.replace(tzinfo=UTC) <= NOW


def _of_another_fleet(fleet: Fleet) -> SignedReport:
    other = DeviceCA(Home(fleet.home.root / "other"))
    other.init()
    return signed(said("pi-1"), other.enrol("pi-1"))


def _changed(fleet: Fleet) -> SignedReport:
    one = signed(said("pi-1"), fleet.ca.enrol("pi-1"))
    forged = base64.b64encode(said("pi-1", state=State.FAILED).to_json()).decode()
    return one.model_copy(update={"report": forged})


def _revoked(fleet: Fleet) -> SignedReport:
    one = signed(said("pi-1"), fleet.ca.enrol("pi-1"))
    revoke_device(fleet, "pi-1", ANNA)
    return one


#: How a report is made, and what is told of it.
FORGERIES: dict[str, tuple[Callable[[Fleet], SignedReport], str]] = {
    "signed by another device": (lambda fleet: signed(said("pi-1"), fleet.ca.enrol("pi-2")), "and signed by pi-2"),
    "signed in another fleet": (_of_another_fleet, "the signature is wrong, or its certificate is of another fleet"),
    "changed after it was signed": (_changed, "the signature is wrong"),
    "a signature of something else": (
        lambda fleet: signed(said("pi-1"), fleet.ca.enrol("pi-1"), b""),
        "the signature is wrong",
    ),
    "of a device that was revoked": (_revoked, "pi-1 was revoked"),
    "of a device that was never added": (
        lambda fleet: signed(said("pi-9"), fleet.ca.enrol("pi-9")),
        "pi-9",
    ),
    "with a certificate that is none": (
        lambda fleet: signed(said("pi-1"), fleet.ca.enrol("pi-1")).model_copy(update={"certificate": "PEM"}),
        "its certificate cannot be used",
    ),
    "without a signature": (
        lambda _: SignedReport(report=base64.b64encode(said("pi-1").to_json()).decode()),
        "pi-1 has no certificate, so that anybody may have written it; --unsigned takes it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_report_changes_nothing_and_no_other_is_lost(fleet: Fleet, tmp_path: Path, name: str) -> None:
    make, told = FORGERIES[name]
    put(tmp_path, "pi-1", make(fleet).to_json())
    put(tmp_path, "pi-2", signed(said("pi-2"), fleet.ca.enrol("pi-2")).to_json())
    forged, good = read_stick(fleet, tmp_path, ANNA)
    assert forged.refused is not None and told in forged.refused
    assert fleet.registry.devices.get("pi-1").reported is None
    assert good.refused is None and fleet.registry.devices.get("pi-2").reported is not None


def test_an_unsigned_report_is_taken_where_the_operator_says_so(fleet: Fleet, tmp_path: Path) -> None:
    make, _ = FORGERIES["without a signature"]
    put(tmp_path, "pi-1", make(fleet).to_json())
    assert read_stick(fleet, tmp_path, ANNA, unsigned=True)[0].refused is None


def test_a_device_speaks_of_itself_alone_and_is_not_there(fleet: Fleet, tmp_path: Path) -> None:
    mine, other = said("pi-1"), said("pi-2")
    presence = StickMessage(
        topic=topics.presence("pi-1"), payload=Presence(device="pi-1", online=True, at=NOW).to_json().decode()
    )
    both = mine.model_copy(update={"messages": (*mine.messages, *other.messages, presence)})
    put(tmp_path, "pi-1", signed(both, fleet.ca.enrol("pi-1")).to_json())
    read_stick(fleet, tmp_path, ANNA)
    assert fleet.registry.devices.get("pi-2").reported is None
    assert not fleet.registry.devices.get("pi-1").online


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=300), st.text(max_size=200).map(lambda text: json.dumps({"report": text}).encode())
    )
)
def test_whatever_a_report_holds_it_is_refused_in_a_sentence(fleet: Fleet, tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "pi-1", content)
    assert read_stick(fleet, tmp_path, ANNA)[0].refused


def test_a_stick_without_reports_is_told(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no reports"):
        read_stick(fleet, tmp_path, ANNA)


def test_an_index_outlives_later_fields(fleet: Fleet, digest: str, tmp_path: Path) -> None:
    order(fleet, digest, "pi-1")
    write(fleet, tmp_path / "stick", "pi-1")
    path = tmp_path / "stick" / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    assert StickIndex.from_json(path.read_bytes()).version == 1
    assert Stick(tmp_path / "stick").order("pi-1")
