"""A model to quantize: what it is, whether it is whole, and how it is spoken to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from agent.contract.base import canonical_json, explain, sha256_hex
from agent.contract.manifest import Chat, ModelFacts
from fleet.core.phi_variants import find_variant
from fleet.core.plan_shape import ModelFile, NetworkConfig, architecture_of
from fleet.errors import ModelError
from fleet.toolchains.progress import Progress, ProgressCallback, silent
from fleet.toolchains.safetensors_scan import Tensor, first_not_finite, read_tensors

#: ``architectures`` of config.json. The last four are read by some toolchains only; the planner knows which.
PHI_ARCHITECTURES = (
    "PhiForCausalLM", "Phi3ForCausalLM", "PhimoeForCausalLM", "PhiMoEForCausalLM",
    "Phi3SmallForCausalLM", "Phi3VForCausalLM", "Phi4MMForCausalLM", "Phi4MultimodalForCausalLM",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: Beside the weights, whatever changes what a toolchain writes.
_OTHER_INPUTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
#: From the card of microsoft/phi-2, whose tokenizer has no template.
_PHI_2_TEMPLATE = (
    "{% for message in messages %}{{ ('Output: ' if message['role'] == 'assistant' else 'Instruct: ')"
    " + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"
)
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

_AnyFile = TypeVar("_AnyFile", bound=ModelFile)
_TokenId = Annotated[int, Field(ge=0)]


class _Index(ModelFile):
    """model.safetensors.index.json: which shard has a tensor. Shards lie beside it, where every toolchain looks."""

    weight_map: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}\.safetensors$")]], Field(min_length=1)
    ]


class _Token(ModelFile):
    content: str


class _AddedToken(_Token):
    id: _TokenId


class _Tokenizer(ModelFile):
    """tokenizer.json, but for its words."""

    added_tokens: list[_AddedToken] | None = None


class _NamedTemplate(ModelFile):
    name: str
    template: str


class _TokenizerConfig(ModelFile):
    """tokenizer_config.json; of it, chat_template.json has the template alone."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    added_tokens_decoder: dict[Annotated[_TokenId, Field(strict=False)], str | _Token] | None = None


class _Generation(ModelFile):
    """generation_config.json."""

    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the network, as far as sizes and memory follow from it. ``head_size`` in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied_embeddings: bool
    experts: int = 0

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of every layer for one token of context."""
        return 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole. ``weights_bytes`` as stored; ``config`` is config.json."""

    path: Path
    config: dict[str, Any]
    facts: ModelFacts
    shape: Shape
    chat: Chat
    weights_bytes: int

    @property
    def name(self) -> str:
        """In artifact ids: lower case letters, digits, dots, dashes."""
        return self.facts.name


def inspect(path: Path, *, name: str | None = None, progress: ProgressCallback = silent) -> Checkpoint:
    """Read and check the checkpoint in the folder ``path``; ``name`` replaces the name that it has.

    Every weight is looked at, once.

    Raises:
        ModelError: missing, no Phi, without tokenizer, truncated, or with weights that are no numbers.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint's folder" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}; pass a folder with config.json and *.safetensors, or a hub id")
    config = read_json(path / "config.json", needed=True)
    architecture = _check_architecture(path, config)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path}: has no tokenizer ({', '.join(_TOKENIZERS)}); fetch the whole checkpoint")
    network = NetworkConfig.parse(config, str(path / "config.json"))
    shards = {shard: read_tensors(shard) for shard in _shards(path)}
    _check_numbers(shards, progress)
    tensors = [tensor for found in shards.values() for tensor in found]
    parameters = sum(tensor.count for tensor in tensors)
    if not parameters:
        raise ModelError(f"{path}: its *.safetensors hold no weights; fetch the whole checkpoint")
    facts = ModelFacts(
        name=slug(name or _own_name(config) or path.resolve().name),
        architecture=architecture,
        parameters=parameters,
        source_digest=_source_digest(path, list(shards), progress),
        license=_license(path),
        max_context=network.max_position_embeddings,
    )
    stored = sum(tensor.end - tensor.begin for tensor in tensors)
    return Checkpoint(path, config, facts, _shape(network, tensors), _chat(path, architecture), stored)


def resolve_model(model: str | Path, *, progress: ProgressCallback = silent) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id such as ``microsoft/Phi-4-mini-instruct``, downloaded when needed.

    Raises:
        ModelError: as ``inspect``; or the id cannot be had.
    """
    path = local_path(model)
    if not path.exists() and (variant := find_variant(str(model))) and str(model) not in variant.hub_ids:
        raise ModelError(f"{model} is no folder here; on the hub it is {' or '.join(variant.hub_ids)}")
    if path.exists() or not isinstance(model, str) or not _HUB_ID.match(model) or model.startswith("."):
        return inspect(path, progress=progress)
    progress(Progress(f"downloading {model}"))
    return inspect(_download(model), name=model.rpartition("/")[2], progress=progress)


def local_path(model: str | Path) -> Path:
    """``model`` as a path, with ``~`` and ``~user`` resolved.

    Raises:
        ModelError: nobody here has that name.
    """
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise ModelError(
            f"{model}: {Path(model).parts[0]} is nobody's home here; pass the folder's full path"
        ) from None


def slug(name: str) -> str:
    """``name`` as it stands in an artifact id."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._")[:60] or "model"


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ModuleNotFoundError:
        raise ModelError(f"{hub_id} is no folder, and huggingface_hub, which would download it, is not installed; "
                         "install phifleet[quantize-onnx]") from None  # fmt: skip
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"there is neither a folder nor a hub model named {hub_id}; check the spelling") from None
    except Exception as error:  # the hub client raises its transport's errors
        raise ModelError(
            f"{hub_id} is no folder here, and cannot be downloaded ({type(error).__name__}: is there a network?). "
            f"On a machine that has one, run `hf download {hub_id} --local-dir DIR`, copy DIR here and pass "
            "--model DIR; "
            "`phifleet sample-model DIR` makes a small speaking model without any hub"
        ) from None


def read_json(path: Path, *, needed: bool = False) -> dict[str, Any]:
    """The object in ``path``; an empty one where there is no such file and it is not ``needed``.

    Raises:
        ModelError: absent, unreadable, or no JSON object.
    """
    if not path.is_file():
        if needed:
            raise ModelError(f"{path} does not exist; a checkpoint's folder holds {path.name} and *.safetensors")
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; fetch it again")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as UTF-8 text: {error}; fetch it again") from None


def _read(model: type[_AnyFile], path: Path) -> _AnyFile:
    return model.parse(read_json(path), str(path))


def _check_architecture(path: Path, config: dict[str, Any]) -> str:
    found = architecture_of(config)
    if found not in PHI_ARCHITECTURES:
        raise ModelError(f"{path / 'config.json'}: is no Phi: its architecture is {found}; phifleet quantizes "
                         f"{', '.join(PHI_ARCHITECTURES[:3])} and their kin")  # fmt: skip
    return found


def _own_name(config: dict[str, Any]) -> str:
    return str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read(_Index, index).weight_map.values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise ModelError(f"{index}: names {', '.join(absent)}, absent from the folder; fetch the whole checkpoint")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        older = " (there are PyTorch .bin files; save it again as safetensors)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"{path}: has no *.safetensors{older}")
    return found


def _check_numbers(shards: dict[Path, tuple[Tensor, ...]], progress: ProgressCallback) -> None:
    for done, (shard, tensors) in enumerate(shards.items()):
        progress(Progress("checking the weights", done / len(shards)))
        if bad := first_not_finite(shard, tensors):
            raise ModelError(f"{shard}: tensor {bad} holds NaN or infinite weights; the checkpoint is damaged")


def _source_digest(path: Path, shards: list[Path], progress: ProgressCallback) -> str:
    inputs = [path / name for name in _OTHER_INPUTS if (path / name).is_file()] + shards
    entries = []
    for done, file in enumerate(inputs):
        progress(Progress("hashing the checkpoint", done / len(inputs)))
        with file.open("rb") as opened:
            entries.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return sha256_hex(canonical_json(sorted(entries)))


def _license(path: Path) -> str:
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:4096] if card.is_file() else ""
    match = re.search(r"^license:\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else "unknown"


def _shape(network: NetworkConfig, tensors: list[Tensor]) -> Shape:
    return Shape(
        layers=network.num_hidden_layers,
        hidden=network.hidden_size,
        intermediate=network.intermediate_size,
        heads=network.num_attention_heads,
        kv_heads=network.kv_heads,
        head_size=network.head_size,
        vocabulary=network.vocab_size,
        tied_embeddings=not any(tensor.name.startswith("lm_head") for tensor in tensors),
        experts=network.num_local_experts or 0,
    )


def _chat(path: Path, architecture: str) -> Chat:
    config = _read(_TokenizerConfig, path / "tokenizer_config.json")
    file, template = _template(path, config)
    if not template and architecture == "PhiForCausalLM":
        template = _PHI_2_TEMPLATE
    if not template:
        raise ModelError(f"{path}: its tokenizer has no chat template; add chat_template.jinja, "
                         "or chat_template in tokenizer_config.json")  # fmt: skip
    special = _special_tokens(path, config)
    eos = _text(config.eos_token)
    ids = _read(_Generation, path / "generation_config.json").eos_token_id
    ends = [special[i] for i in (ids if isinstance(ids, list) else [ids]) if i in special]
    ends += [token for token in _TURN_ENDS if token in special.values() and token in template]
    stop = tuple(dict.fromkeys(token for token in [eos, *ends] if token))
    try:
        return Chat(template=template, bos_token=_text(config.bos_token), eos_token=eos, stop=stop)
    except ValidationError as error:
        raise ModelError(f"{file}: the chat cannot be delivered: {explain(error)}; shorten it") from None


def _template(path: Path, config: _TokenizerConfig) -> tuple[Path, str]:
    """The file that has the chat template, and the template, empty where there is none."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file, _read_text(file)
    file = path / "tokenizer_config.json"
    if not (found := config.chat_template):
        file = path / "chat_template.json"
        found = _read(_TokenizerConfig, file).chat_template or ""
    if isinstance(found, list):
        found = next((one.template for one in found if one.name == "default"), "")
    return file, found


def _text(token: str | _Token | None) -> str:
    return token.content if isinstance(token, _Token) else token or ""


def _special_tokens(path: Path, config: _TokenizerConfig) -> dict[int, str]:
    found = {i: _text(token) for i, token in (config.added_tokens_decoder or {}).items()}
    added = _read(_Tokenizer, path / "tokenizer.json").added_tokens or []
    return found | {token.id: token.content for token in added}
