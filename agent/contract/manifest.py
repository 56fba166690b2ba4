"""The artifact manifest: what is signed, and so what a device may believe about a model.

A manifest is a TUF target. It names every file, every chunk of every file by SHA-256, and what was measured
when the artifact was built: size, loss, speed and memory.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from agent.contract.base import (
    ArtifactId,
    Bytes,
    Digest,
    GrownModel,
    RelativePath,
    WireModel,
    canonical_json,
    sha256_hex,
)

#: AWS IoT Core's payload limit; no chunk and no metadata segment is larger.
MAX_CHUNK_BYTES = 128 * 1024
#: Of an index: the chunk's size as 4 bytes, big-endian, and its SHA-256.
INDEX_RECORD_BYTES = 36
#: Whole records, and at most a chunk; the last piece may be shorter.
INDEX_PIECE_BYTES = MAX_CHUNK_BYTES // INDEX_RECORD_BYTES * INDEX_RECORD_BYTES
#: Enough for 480 GB in chunks of 64 KiB.
MAX_INDEX_BYTES = 256 * 1024 * 1024


class Toolchain(StrEnum):
    """Who made the artifact; each has a runtime of its own on the device."""

    ONNX_GENAI = "onnx_genai"
    OPENVINO = "openvino"
    LLAMACPP = "llamacpp"
    MLX = "mlx"
    ONNX_QNN = "onnx_qnn"


#: The runtime on the device that loads what a toolchain makes, by its name in ``Facts.runtimes``.
RUNTIME_OF = {
    Toolchain.ONNX_GENAI: "onnx_genai",
    Toolchain.OPENVINO: "openvino_genai",
    Toolchain.LLAMACPP: "llamacpp",
    Toolchain.MLX: "mlx",
    Toolchain.ONNX_QNN: "onnx_qnn",
}


class Precision(StrEnum):
    """Of the weights."""

    INT4 = "int4"
    INT8 = "int8"
    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"


class Target(StrEnum):
    """The device that the artifact was built for."""

    CPU = "cpu"
    CUDA = "cuda"
    DML = "dml"
    WEBGPU = "webgpu"
    QNN = "qnn"
    GPU = "gpu"
    NPU = "npu"
    METAL = "metal"


class ArtifactFile(WireModel):
    """A file of the artifact. On the wire ``chunks`` is a list of ``[size, sha256]`` pairs, in order.

    It is empty where the manifest has an index.
    """

    path: RelativePath
    size: Bytes
    sha256: Digest
    chunks: tuple[tuple[Annotated[int, Field(gt=0, le=MAX_CHUNK_BYTES)], Digest], ...]

    @model_validator(mode="after")
    def _chunks_cover_the_file(self) -> Self:
        if self.chunks and sum(size for size, _ in self.chunks) != self.size:
            raise ValueError(f"{self.path}: the chunks' sizes do not add up to {self.size} bytes")
        return self


class ArtifactIndex(WireModel):
    """The list of all chunks, as bytes that are fetched as chunks are: see ``agent.contract.chunk_index``."""

    sha256: Annotated[Digest, Field(description="of the whole index, and its name on the wire")]
    size: Annotated[int, Field(gt=0, le=MAX_INDEX_BYTES, multiple_of=INDEX_RECORD_BYTES, description="bytes")]
    pieces: Annotated[tuple[Digest, ...], Field(description=f"of each {INDEX_PIECE_BYTES} bytes")]

    @model_validator(mode="after")
    def _pieces_cover_it(self) -> Self:
        if len(self.pieces) != -(-self.size // INDEX_PIECE_BYTES):
            raise ValueError(f"{len(self.pieces)} pieces of {INDEX_PIECE_BYTES} bytes are not {self.size} bytes")
        return self


class Delta(WireModel):
    """The artifact told against another one: see ``agent.contract.delta``. Its piece n tells chunk n.

    Without a base it is told against zeros: the pieces are the compressed chunks, which serve any device.
    """

    base: Annotated[ArtifactId | None, Field(description="the artifact that the device must have")] = None
    base_digest: Digest | None = None
    digest: Annotated[Digest, Field(description="of the pieces one after the other, and their name on the wire")]
    size: Annotated[Bytes, Field(description="of all pieces together")]
    whole_bytes: Annotated[Bytes, Field(description="of the chunks that no piece tells, and that come whole")] = 0

    @property
    def name(self) -> str:
        """What it is told against, for people."""
        return f"from {self.base}" if self.base else "compressed"

    @model_validator(mode="after")
    def _base_has_both_names(self) -> Self:
        if (self.base is None) != (self.base_digest is None):
            raise ValueError("base and base_digest belong together")
        return self

    @property
    def wire_bytes(self) -> int:
        """What a device fetches that has the base and nothing else of the artifact."""
        return self.size + self.whole_bytes


class ModelFacts(WireModel):
    """The checkpoint that was quantized."""

    name: str
    architecture: Annotated[str, Field(description="as config.json names it, e.g. Phi3ForCausalLM")]
    parameters: Annotated[int, Field(gt=0, description="count of weights")]
    source_digest: Digest
    license: str = "unknown"
    max_context: Annotated[int, Field(gt=0, description="tokens the checkpoint was made for")]


class Quality(WireModel):
    """Loss against the FP32 reference, teacher-forced, measured in the artifact's own runtime."""

    kl_divergence: Annotated[float, Field(description="mean, nats per token")]
    kl_divergence_se: float = 0.0
    kl_divergence_p99: float
    kl_divergence_p99_se: float = 0.0
    perplexity: float
    perplexity_se: float = 0.0
    perplexity_ratio: Annotated[float, Field(description="to the reference's perplexity")]
    perplexity_ratio_se: float = 0.0
    same_top_token: Annotated[float, Field(ge=0, le=1, description="share of tokens")]
    same_top_token_se: float = 0.0
    tokens: Annotated[int, Field(gt=0, description="tokens scored")]
    evaluation: Annotated[str, Field(description="name and digest of the text scored")]


class BuildSpeed(WireModel):
    """Measured on the machine that built the artifact; a device measures its own."""

    machine: str
    ttft_ms: float
    tpot_ms: float
    peak_memory_bytes: Bytes


class MemoryNeed(WireModel):
    """What loading takes: ``weights + kv_bytes_per_token * context + overhead``, in bytes."""

    weights_bytes: Bytes
    kv_bytes_per_token: Bytes
    overhead_bytes: Bytes

    def at_context(self, tokens: int) -> int:
        """Return the bytes needed with a context of ``tokens``."""
        return self.weights_bytes + self.kv_bytes_per_token * tokens + self.overhead_bytes


class Chat(GrownModel):
    """How messages become a prompt: a Jinja2 chat template, as the checkpoint's tokenizer has it."""

    template: Annotated[str, Field(max_length=65536)]
    bos_token: str = ""
    eos_token: str = ""
    stop: tuple[str, ...] = ()
    special: Annotated[
        tuple[Annotated[str, Field(min_length=2, max_length=128)], ...],
        Field(max_length=4096, description="what the tokenizer reads as a control token, wherever it stands in a text"),
    ] = ()

    _later: ClassVar[frozenset[str]] = frozenset({"special"})


class SamplingDefaults(WireModel):
    """How the checkpoint's authors want tokens to be drawn where a request does not say; from generation_config.json.

    None: not stated, so the parameter is off. An artifact that was built before manifests had this draws greedily.
    """

    temperature: Annotated[float, Field(ge=0, le=2, description="0 is greedy: the likeliest token")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(gt=0, description="tokens")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None


class Probe(WireModel):
    """A signed prompt that the model must answer on the device before it may serve."""

    prompt: Annotated[str, Field(min_length=1, description="the user's message, put through the chat template")]
    max_tokens: Annotated[int, Field(gt=0, le=256)] = 24
    expect: Annotated[tuple[str, ...], Field(description="the answer must hold one of these; empty: any text")] = ()


class Manifest(GrownModel):
    """Everything about one artifact. ``digest`` is over id and files, so measuring again does not change it."""

    version: int = 1
    id: ArtifactId
    digest: Digest
    size: Bytes
    model: ModelFacts
    toolchain: Toolchain
    versions: Annotated[dict[str, str], Field(description="packages that built it")]
    recipe: Annotated[dict[str, Any], Field(description="every option given to the toolchain")]
    precision: Precision
    target: Target
    profile: str
    context: Annotated[int, Field(gt=0, description="tokens to load it with")]
    entry: Annotated[str, Field(description="what the runtime opens, relative to the artifact; '.' is the folder")]
    memory: MemoryNeed
    chat: Chat
    sampling: Annotated[
        SamplingDefaults | None, Field(description="absent in manifests of 0.1.0: greedy, and nothing else")
    ] = None
    probes: tuple[Probe, ...] = ()
    quality: Quality | None = None
    foreign: Annotated[Quality | None, Field(description="the loss on plain text that no model wrote")] = None
    speed: BuildSpeed | None = None
    files: Annotated[tuple[ArtifactFile, ...], Field(min_length=1)]
    index: Annotated[ArtifactIndex | None, Field(description="of a large artifact, whose files list no chunks")] = None
    deltas: Annotated[tuple[Delta, ...], Field(max_length=16, description="fewer bytes for a device that has one")] = ()

    _later: ClassVar[frozenset[str]] = frozenset({"sampling", "foreign", "index", "deltas"})

    @property
    def chunk_count(self) -> int:
        """How many chunks all files have together."""
        return self.index.size // INDEX_RECORD_BYTES if self.index else sum(len(file.chunks) for file in self.files)

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """What holds for a sampling parameter that a request leaves out; one that is not in it is off."""
        return (self.sampling or SamplingDefaults()).model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _digest_and_size_are_of_the_files(self) -> Self:
        paths = [file.path for file in self.files]
        if len({path.casefold() for path in paths}) != len(paths):
            raise ValueError("two files have the same path")
        if self.digest != artifact_digest(self.id, self.files):
            raise ValueError("digest is not the digest of the id and the files listed")
        if self.size != sum(file.size for file in self.files):
            raise ValueError("size is not the sum of the files' sizes")
        return self

    @model_validator(mode="after")
    def _chunks_are_listed_once(self) -> Self:
        for file in self.files:
            if self.index is not None and file.chunks:
                raise ValueError(f"{file.path} lists chunks, and so does the index")
            if self.index is None and file.size and not file.chunks:
                raise ValueError(f"{file.path} has {file.size} bytes and lists no chunks, nor is there an index")
        return self


def artifact_digest(name: str, files: tuple[ArtifactFile, ...]) -> str:
    """Return SHA-256 over the canonical ``[id, [[path, size, sha256], ...]]``, sorted by path.

    The id is in it because the same files may be two artifacts, for two contexts or targets, and wherever an artifact
    is stored, signed or ordered, its digest is its key.
    """
    listed = sorted([file.path, file.size, file.sha256] for file in files)
    return sha256_hex(canonical_json([name, listed]))


def manifest_target(digest: str) -> str:
    """Return the TUF target path of an artifact's manifest that lists every chunk itself: agents 0.1 know no other."""
    return f"artifacts/{digest}.json"


def indexed_target(digest: str) -> str:
    """Return the TUF target path of an artifact's manifest that has an index, where there is one."""
    return f"indexed/{digest}.json"
