"""The contract: golden files per version, tolerance of the unknown, and errors that name the field."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.contract import topics
from agent.contract.base import MalformedMessageError, WireModel, canonical_json, sha256_hex, shown
from agent.contract.chunk_index import with_index
from agent.contract.failures import FailureCode
from agent.contract.manifest import (
    ArtifactFile,
    Chat,
    Delta,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Probe,
    Quality,
    SamplingDefaults,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.contract.messages import (
    ArtifactRef,
    Boot,
    ChunkRange,
    Desired,
    Facts,
    Failure,
    HealthReport,
    MetadataAnswer,
    MetadataStatus,
    MetadataWant,
    MetadataWantV1,
    Presence,
    Progress,
    Proof,
    Reported,
    RuntimeFact,
    ServedNames,
    State,
    TransferLimits,
    Want,
    WantV1,
)
from agent.contract.profile import HealthLimits
from agent.contract.stick import SignedReport, StickFile, StickIndex, StickMessage, StickReport

GOLDEN = Path(__file__).parent / "golden"
AT = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
LATER = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
BOOT = Boot(id="0123456789abcdef", number=1764028800000, counter=7)
REF = ArtifactRef(id="phi-onnx_genai-int4-cpu-0123456789ab", digest="ab" * 32)
FILES = (
    ArtifactFile(path="genai_config.json", size=2, sha256=sha256_hex(b"{}"), chunks=((2, sha256_hex(b"{}")),)),
    ArtifactFile(path="sub/empty", size=0, sha256=sha256_hex(b""), chunks=()),
)
MANIFEST = Manifest(
    id=REF.id,
    digest=artifact_digest(REF.id, FILES),
    size=2,
    model=ModelFacts(name="phi", architecture="Phi3ForCausalLM", parameters=9, source_digest="cd" * 32, max_context=64),
    toolchain=Toolchain.ONNX_GENAI,
    versions={"onnxruntime-genai": "0.18.0"},
    recipe={"block_size": 32},
    precision=Precision.INT4,
    target=Target.CPU,
    profile="iot-x86",
    context=64,
    entry=".",
    memory=MemoryNeed(weights_bytes=2, kv_bytes_per_token=4, overhead_bytes=8),
    chat=Chat(template="{{ messages }}"),
    probes=(Probe(prompt="What is the capital of France?", expect=("Paris",)),),
    files=FILES,
)
EXAMPLES: dict[str, WireModel] = {
    "presence": Presence(device="pi-1", online=True, at=AT, agent_version="0.1.0"),
    "facts": Facts(
        device="pi-1", profile="iot-x86", agent_version="0.1.0", system="Linux 6.1", machine="x86_64", cpu="a cpu",
        cpu_count=2, memory_total_bytes=8, memory_available_bytes=4, disk_free_bytes=2, at=AT,
        runtimes=(RuntimeFact(name="mlx", usable=False, reason="not installed"),),
    ),
    "desired": Desired(device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,)),
    "reported": Reported(
        device="pi-1", sequence=7, deployment="d7", state=State.FAILED, desired=REF, at=AT,
        progress=Progress(chunks_total=4, chunks_done=1, bytes_total=99, bytes_done=3),
        proof=Proof(runtime="onnx_genai", load_s=0.5, ttft_ms=26, tpot_ms=16),
        failure=Failure(code=FailureCode.STORE_DISK_FULL, message="needs 9 bytes, 3 are free"),
    ),
    "presence_boot": Presence(device="pi-1", online=True, at=AT, agent_version="0.2.0", boot=BOOT),
    "health_boot": HealthReport(device="pi-1", at=AT, window_s=60, boot=BOOT),
    "health": HealthReport(device="pi-1", at=AT, window_s=300, requests=3, ttft_ms_p50=26.5),
    "desired_names": Desired(
        device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,),
        names=ServedNames(aliases=("chat", "small"), former_s=3600), transfer=TransferLimits(max_bytes_per_s=250_000),
    ),
    "reported_waiting": Reported(
        device="pi-1", sequence=7, deployment="d7", state=State.WAITING_SPACE, desired=REF, at=AT,
        waiting=Failure(code=FailureCode.STORE_DISK_FULL, message="needs 9 bytes, 3 are free"),
    ),
    "reported_share": Reported(
        device="pi-1", sequence=7, deployment="d7", state=State.PROBATION, desired=REF, at=AT,
        proof=Proof(runtime="llamacpp", device="CUDA", load_s=0.5, ttft_ms=26, tpot_ms=16, device_share=0.75),
    ),
    "desired_share": Desired(
        device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,),
        limits=HealthLimits(device_share_min=1.0),
    ),
    "desired_windows": Desired(
        device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,),
        transfer=TransferLimits(windows=("mon-fri 22:00-05:00 Europe/Paris", "sat,sun 00:00-00:00")),
    ),
    "desired_mirrors": Desired(
        device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,),
        transfer=TransferLimits(mirrors=("https://models.example/{digest}/{path}", "http://10.0.0.2:8080/{id}?f={path}")),
    ),
    "desired_metered": Desired(
        device="pi-1", sequence=7, deployment="d7", issued_at=AT, expires_at=LATER, artifacts=(REF,),
        transfer=TransferLimits(metered_bytes=1_000_000),
    ),
    "reported_mirrored": Reported(
        device="pi-1", sequence=7, deployment="d7", state=State.TRANSFERRING, desired=REF, at=AT,
        progress=Progress(chunks_total=9, chunks_done=3, bytes_total=900, bytes_done=300, bytes_mirrored=200),
    ),
    "want": WantV1(device="pi-1", ranges=(ChunkRange(first=0, last=9), ChunkRange(first=12, last=12)), credit=11),
    "metadata_want": MetadataWantV1(device="pi-1", name="3.targets.json", offset=131072),
    "want.v2": Want(artifact="5" * 64, ranges=(ChunkRange(first=0, last=9), ChunkRange(first=12, last=12)), credit=11),
    "metadata_want.v2": MetadataWant(name="3.targets.json", offset=131072),
    "stick_index": StickIndex(
        written_at=AT, expires_at=datetime(2026, 12, 23, tzinfo=UTC), devices={"pi-1": "pi-1-7"},
        files=(StickFile(path="tuf/timestamp.json", size=640),),
    ),
    "stick_report": StickReport(
        device="pi-1", at=AT, messages=(StickMessage(topic="phifleet/v1/devices/pi-1/reported", payload="{}"),)
    ),
    "signed_report": SignedReport(report="e30=", certificate="-----BEGIN", signature="AAAA"),
    "manifest": MANIFEST,
    "manifest_sampling": MANIFEST.model_copy(
        update={"sampling": SamplingDefaults(temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.1)}
    ),
    "manifest_foreign": MANIFEST.model_copy(
        update={
            "foreign": Quality(
                kl_divergence=0.1, kl_divergence_p99=1.0, perplexity=9.0, perplexity_ratio=1.1, same_top_token=0.9,
                tokens=2000, evaluation="phifleet-foreign-1:0123",
            )
        }
    ),
    "manifest_index": with_index(MANIFEST, 0)[0],
    "manifest_deltas": MANIFEST.model_copy(
        update={
            "deltas": (
                Delta(base="phi-onnx_genai-int4-cpu-old", base_digest="ef" * 32, digest="01" * 32, size=9),
                Delta(digest="23" * 32, size=99, whole_bytes=7),
            )
        }
    ),
    "manifest_special": MANIFEST.model_copy(
        update={"chat": Chat(template="{{ messages }}", stop=("<|end|>",), special=("<|end|>", "<|user|>"))}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bytes_on_the_wire_are_those_of_their_version(name: str):
    golden = GOLDEN / (f"{name}.json" if "." in name else f"{name}.v1.json")
    message = EXAMPLES[name]
    assert message.to_json() == golden.read_bytes().rstrip(b"\n"), (
        f"{golden.name}: a change here breaks fleets in the field"
    )
    assert type(message).from_json(golden.read_bytes()) == message


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_later_versions_fields_are_ignored(name: str):
    message = EXAMPLES[name]
    extended = message.to_json()[:-1] + b',"from_the_future":{"a":1}}'
    assert type(message).from_json(extended) == message


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
def test_damaged_payloads_are_refused_with_a_sentence(name: str, data: st.DataObject):
    payload = EXAMPLES[name].to_json()
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(MalformedMessageError, match=type(EXAMPLES[name]).__name__):
        type(EXAMPLES[name]).from_json(payload[:cut])


@given(st.binary(max_size=200))
def test_noise_is_never_more_than_a_malformed_message(payload: bytes):
    for message in EXAMPLES.values():
        try:
            type(message).from_json(payload)
        except MalformedMessageError as error:
            assert "\n" not in str(error)


def test_an_error_names_the_field_and_what_stood_there():
    with pytest.raises(MalformedMessageError, match=r"credit: .*greater than 0.*found 0"):
        Want.from_json(b'{"device":"pi-1","ranges":[{"first":0,"last":1}],"credit":0}')


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/./b", "", "C:\\x", "c:x", "a\\b"])
def test_no_file_of_a_manifest_can_leave_its_folder(path: str):
    with pytest.raises(ValidationError, match="relative path"):
        ArtifactFile(path=path, size=0, sha256=sha256_hex(b""), chunks=())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "00" * 32}, "not the digest of the id and the files"),
        ({"size": 3}, "not the sum"),
        ({"files": (*FILES, ArtifactFile(path="SUB/EMPTY", size=0, sha256=sha256_hex(b""), chunks=()))}, "same path"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, object], words: str):
    with pytest.raises(ValidationError, match=words):
        Manifest.model_validate(MANIFEST.model_dump() | change)


def test_the_digest_is_of_id_and_files():
    measured = MANIFEST.model_dump() | {"probes": (), "speed": None}
    assert Manifest.model_validate(measured).digest == MANIFEST.digest
    assert artifact_digest(REF.id, tuple(reversed(FILES))) == MANIFEST.digest
    assert artifact_digest("the-same-for-a-longer-context", FILES) != MANIFEST.digest


def test_a_manifest_of_the_first_release_is_the_same_bytes_and_draws_greedily():
    signed = (GOLDEN / "manifest.v1.json").read_bytes().rstrip(b"\n")
    old = Manifest.from_json(signed)
    assert b"sampling" not in signed
    assert old.to_json() == signed
    assert (old.sampling or SamplingDefaults()) == SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize(
    "sampling", [{"temperature": -0.1}, {"temperature": 2.1}, {"top_p": 0}, {"top_k": 0}, {"repetition_penalty": 0}]
)
def test_sampling_that_nothing_can_draw_with_is_no_manifest(sampling: dict[str, float]):
    with pytest.raises(ValidationError, match=next(iter(sampling))):
        Manifest.model_validate(MANIFEST.model_dump() | {"sampling": sampling})


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    st.integers(0, 10**9 - 1),
)
def test_topics_are_read_back_as_they_were_written(device: str, digest: str, index: int):
    for build in (topics.presence, topics.facts, topics.desired, topics.reported, topics.health, topics.metadata):
        assert topics.parse_device(build(device)) == (device, build.__name__)
        assert topics.parse_asking(build(device)) is None
    assert topics.parse_asking(topics.want(device)) == topics.parse_asking(topics.metadata_want(device)) == device
    assert topics.parse_want_v1(topics.want_v1(digest)) == digest
    assert topics.parse_chunk(topics.shared_chunk(digest, index)) == (digest, index)
    assert topics.parse_chunk(topics.own_chunk(device, digest, index)) == (digest, index)


@given(st.text())
def test_other_topics_are_nobodys(topic: str):
    assert topics.parse_chunk(topic) is None
    assert topics.parse_want_v1(topic) is None
    assert topics.parse_asking(topic) is None
    assert topics.parse_device(topic) is None


def test_the_properties_of_a_metadata_answer_are_strings_and_come_back():
    answer = MetadataAnswer(status=MetadataStatus.OK, name="1.root.json", offset=0, total=4711)
    assert MetadataAnswer.from_properties(answer.to_properties()) == answer


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("plain text, ü and 木", "plain text, ü and 木"),
        ("two\nlines\tand\r\u2028more", "two lines and  more"),
        ("\x1b[2J\x07\x00", "\ufffd[2J\ufffd\ufffd"),
        ("\u202egnp.exe\u200b", "\ufffdgnp.exe\ufffd"),
        ("\ud800", "\ufffd"),
        ("x" * 500, "x" * 127 + "…"),
    ],
)
def test_text_of_a_device_is_shown_on_one_line_and_never_obeyed(said: str, seen: str):
    assert Presence(device="pi-1", online=True, agent_version=said).agent_version == seen


@given(st.text(max_size=300), st.integers(1, 200))
def test_whatever_is_said_what_is_shown_is_printable_and_bounded(said: str, limit: int):
    found = shown(said, limit)
    assert len(found) <= limit
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in found)
    assert shown(found, limit) == found, "what was cleaned stays as it is"


@pytest.mark.parametrize(
    ("leaf", "field", "value"),
    [
        (Reported, "sequence", 2**63),
        (Reported, "sequence", -1),
        (HealthReport, "requests", 2**53),
        (HealthReport, "worker_restarts", -1),
        (HealthReport, "tpot_ms_p50", 1e300),
        (HealthReport, "temperature_c", 99999.0),
        (Facts, "memory_total_bytes", 10**30),
    ],
)
def test_a_number_beyond_belief_is_no_message(leaf: type[WireModel], field: str, value: float):
    example = next(message for message in EXAMPLES.values() if isinstance(message, leaf))
    with pytest.raises(MalformedMessageError, match=field):
        leaf.from_json(canonical_json(example.model_dump(mode="json") | {field: value}))


def test_a_message_names_its_run_and_one_of_the_first_release_does_not():
    boot = Boot(id="0123456789abcdef", number=3, counter=7)
    said = Presence(device="pi-1", online=True, boot=boot)
    assert Presence.from_json(said.to_json()) == said
    assert b'"boot":{"counter":7,"id":"0123456789abcdef","number":3}' in said.to_json()
    assert b"boot" not in Presence(device="pi-1", online=True).to_json()
