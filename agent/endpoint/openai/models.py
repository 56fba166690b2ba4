"""What serves, as the API shows it. Pure."""

from __future__ import annotations

from typing import Any

from agent.contract.manifest import Manifest
from agent.contract.templates import Place, knowledge
from agent.core.inference import ModelInfo
from agent.core.names import Names
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.sampling import effective_defaults


def check_model(asked: str, info: ModelInfo, names: Names) -> None:
    """A model may be asked for by its name, by its artifact, or by what else its order says.

    Raises:
        ApiError: 404, naming what is there.
    """
    if asked not in (info.name, info.artifact) and asked not in names:
        also = f", also as {', '.join(map(repr, names.aliases))}" if names.aliases else ""
        raise ApiError(
            404,
            f"the model {asked[:128]!r} does not exist here: this device serves {info.name!r}{also}",
            param="model",
            code="model_not_found",
        )


def model_object(info: ModelInfo, created: int, name: str | None = None) -> dict[str, Any]:
    """Return an entry of ``/v1/models``; ``created`` in seconds since 1970, ``root`` the model that ``name`` means."""
    return {
        "id": name or info.name,
        "root": info.name,
        "object": "model",
        "created": created,
        "owned_by": "phifleet",
        "artifact": info.artifact,
        "digest": info.digest,
        "runtime": info.runtime,
        "context": info.context,
        "sampling_defaults": effective_defaults(info),
    }


def loaded_facts(info: ModelInfo) -> dict[str, Any]:
    """Return what was measured here when it was loaded, and what it can do."""
    can = info.capabilities
    return {
        "model": info.name,
        "artifact": info.artifact,
        "digest": info.digest,
        "runtime": info.runtime,
        "device": info.device,
        "context": info.context,
        "load_s": info.load_s,
        "memory_bytes": info.memory_bytes,
        "capabilities": {
            "parameters": sorted(can.parameters),
            "guidance": sorted(can.guidance),
            "prefix_reuse": can.prefix_reuse,
            "max_sequences": can.max_sequences,
        },
        "sampling_defaults": effective_defaults(info),
        "facts": info.facts,
    }


def signed_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what is under the signature."""
    return {
        "quantization": {
            "toolchain": manifest.toolchain,
            "precision": manifest.precision,
            "target": manifest.target,
            "size_bytes": manifest.size,
        },
        "quality": manifest.quality.model_dump(mode="json") if manifest.quality else None,
        "source": manifest.model.model_dump(mode="json"),
        "profile": manifest.profile,
        "versions": manifest.versions,
        "chat": {**_chat_facts(manifest), "stop": list(manifest.chat.stop)},
    }


def _chat_facts(manifest: Manifest) -> dict[str, Any]:
    """What the template shows; the rest is said in the user's turn (``agent.endpoint.openai.chat``)."""
    knows = knowledge(manifest.chat)
    return {
        "tools_in_template": knows.tools is not Place.NOWHERE,
        "roles": {"system": knows.system, "later_system": knows.later_system, "tool": knows.tool},
    }
