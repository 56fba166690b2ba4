"""A model to quantize: what it is, whether it is whole, and how it is spoken to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.contract.base import canonical_json, sha256_hex
from agent.contract.manifest import Chat, ModelFacts
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
    config = _read_json(path / "config.json", needed=True)
    architecture = _check_architecture(path, config)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path}: has no tokenizer ({', '.join(_TOKENIZERS)}); fetch the whole checkpoint")
    shards = {shard: read_tensors(shard) for shard in _shards(path)}
    _check_numbers(shards, progress)
    tensors = [tensor for found in shards.values() for tensor in found]
    facts = ModelFacts(
        name=slug(name or _own_name(config) or path.resolve().name),
        architecture=architecture,
        parameters=sum(tensor.count for tensor in tensors),
        source_digest=_source_digest(path, list(shards), progress),
        license=_license(path),
        max_context=int(config.get("max_position_embeddings", 2048)),
    )
    stored = sum(tensor.end - tensor.begin for tensor in tensors)
    return Checkpoint(path, config, facts, _shape(path, config, tensors), _chat(path, architecture), stored)


def resolve_model(model: str | Path, *, progress: ProgressCallback = silent) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id such as ``microsoft/Phi-4-mini-instruct``, downloaded when needed.

    Raises:
        ModelError: as ``inspect``; or the id cannot be had.
    """
    path = Path(model).expanduser()
    if path.exists() or not isinstance(model, str) or not _HUB_ID.match(model) or model.startswith("."):
        return inspect(path, progress=progress)
    progress(Progress(f"downloading {model}"))
    return inspect(_download(model), name=model.rpartition("/")[2], progress=progress)


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


def _read_json(path: Path, *, needed: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            raise ModelError(f"{path} does not exist; a checkpoint's folder holds {path.name} and *.safetensors")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _check_architecture(path: Path, config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    found = str(architectures[0]) if architectures else f"unnamed, model_type {config.get('model_type')!r}"
    if found not in PHI_ARCHITECTURES:
        raise ModelError(f"{path}: is no Phi: its architecture is {found}; phifleet quantizes "
                         f"{', '.join(PHI_ARCHITECTURES[:3])} and their kin")  # fmt: skip
    return found


def _own_name(config: dict[str, Any]) -> str:
    return str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set((_read_json(index).get("weight_map") or {}).values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent or not names:
            listed = ", ".join(absent) or "no files at all"
            raise ModelError(f"{index}: names {listed}, absent from the folder; fetch the whole checkpoint")
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


def _shape(path: Path, config: dict[str, Any], tensors: list[Tensor]) -> Shape:
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied_embeddings=not any(tensor.name.startswith("lm_head") for tensor in tensors),
            experts=int(config.get("num_local_experts") or 0),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path / 'config.json'}: lacks or garbles a size of the network: {error}") from None


def _chat(path: Path, architecture: str) -> Chat:
    config = _read_json(path / "tokenizer_config.json")
    template = _template(path, config)
    if not template and architecture == "PhiForCausalLM":
        template = _PHI_2_TEMPLATE
    if not template:
        raise ModelError(f"{path}: its tokenizer has no chat template; add chat_template.jinja, "
                         "or chat_template in tokenizer_config.json")  # fmt: skip
    special = _special_tokens(path, config)
    eos = _token(config.get("eos_token"))
    ids = _read_json(path / "generation_config.json").get("eos_token_id")
    ends = [special[i] for i in (ids if isinstance(ids, list) else [ids]) if i in special]
    ends += [token for token in _TURN_ENDS if token in special.values() and token in template]
    stop = tuple(dict.fromkeys(token for token in [eos, *ends] if token))
    return Chat(template=template, bos_token=_token(config.get("bos_token")), eos_token=eos, stop=stop)


def _template(path: Path, config: dict[str, Any]) -> str:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template") or ""
    if isinstance(found, list):
        found = next((one["template"] for one in found if one.get("name") == "default"), "")
    return str(found)


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _special_tokens(path: Path, config: dict[str, Any]) -> dict[int, str]:
    found = {int(i): _token(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for token in _read_json(path / "tokenizer.json").get("added_tokens") or []:
        found[int(token["id"])] = str(token["content"])
    return found
