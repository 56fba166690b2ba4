"""A model card: README.md with the head that model hubs read, from what the signed manifest says and nothing else.

Source of the head: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from typing import Any

from agent.contract.manifest import Manifest, Precision, Toolchain
from fleet.core.licenses import UNKNOWN
from fleet.export.bom import as_text

#: What a hub calls the library that loads the files; one that it does not know is left out.
_LIBRARY = {
    Toolchain.ONNX_GENAI: "onnx", Toolchain.OPENVINO: "openvino", Toolchain.LLAMACPP: "gguf", Toolchain.MLX: "mlx",
    Toolchain.ONNX_QNN: "onnx",
}  # fmt: skip
_BITS = {Precision.INT4: "4-bit", Precision.INT8: "8-bit"}
#: Characters that Markdown or HTML would read as more than text.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~&])")


def model_card(manifest: Manifest) -> bytes:
    """Return the card as UTF-8. The same manifest gives the same bytes."""
    model = manifest.model
    lines = [
        *_head(manifest),
        f"# {_plain(manifest.id)}",
        "",
        f"{_plain(model.name)} ({_plain(model.architecture)}, {model.parameters / 1e6:,.1f} million weights), "
        f"quantized by phifleet with {manifest.toolchain} to {manifest.precision} for {manifest.target}.",
        "",
        *_table(("", ""), _what(manifest)),
        "",
        "## What quantization cost",
        "",
        *_quality(manifest),
        "",
        "## Speed on the machine that built it",
        "",
        *_speed(manifest),
        "",
        "## How it was made",
        "",
        *_table(("option", "value"), [(name, as_text(value)) for name, value in sorted(manifest.recipe.items())]),
        "",
        *_table(("package", "version"), sorted(manifest.versions.items())),
        "",
        "## Files",
        "",
        *_table(("file", "bytes", "SHA-256"), [(one.path, str(one.size), one.sha256) for one in manifest.files]),
        "",
    ]
    return "\n".join(lines).encode()


def _head(manifest: Manifest) -> list[str]:
    """Return YAML between two lines of dashes. A JSON text is a YAML text, so values need no other escapes."""
    tags = ["phi", "phifleet", str(manifest.precision), str(manifest.target)]
    if bits := _BITS.get(manifest.precision):
        tags.append(bits)
    values: dict[str, Any] = {
        "license": manifest.model.license if manifest.model.license != UNKNOWN else None,
        "base_model": manifest.model.name,
        "base_model_relation": "quantized",
        "library_name": _LIBRARY[manifest.toolchain],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None), "---", ""]


def _what(manifest: Manifest) -> list[tuple[str, str]]:
    memory = manifest.memory.at_context(manifest.context)
    return [
        ("digest", manifest.digest),
        ("size", f"{manifest.size / 1e6:.1f} MB"),
        ("licence of the checkpoint", manifest.model.license),
        ("digest of the checkpoint", manifest.model.source_digest),
        ("context", f"{manifest.context} tokens"),
        ("memory at that context, planned", f"{memory / 2**20:.0f} MiB"),
        ("device profile", manifest.profile),
        ("runtime opens", manifest.entry),
    ]


def _quality(manifest: Manifest) -> list[str]:
    quality = manifest.quality
    if quality is None:
        return ["It was not measured."]
    rows = [
        ("mean KL divergence, nats a token", f"{quality.kl_divergence:.4f} ± {quality.kl_divergence_se:.4f}"),
        ("99th percentile", f"{quality.kl_divergence_p99:.3f} ± {quality.kl_divergence_p99_se:.3f}"),
        ("perplexity", f"{quality.perplexity:.3f} ± {quality.perplexity_se:.3f}"),
        ("to the reference's", f"{quality.perplexity_ratio:.4f} ± {quality.perplexity_ratio_se:.4f}"),
        ("same likeliest token", f"{quality.same_top_token:.2%} ± {quality.same_top_token_se:.2%}"),
    ]
    text = (
        f"{quality.tokens} tokens of {_plain(quality.evaluation)}, against the checkpoint in FP32, in the artifact's "
        "own runtime."
    )
    if (foreign := manifest.foreign) is not None:
        figures = f"{foreign.kl_divergence:.4f} ± {foreign.kl_divergence_se:.4f}"
        rows.append((f"mean KL divergence on foreign text ({foreign.tokens} tokens)", figures))
    return [text, "", *_table(("measure", "value ± standard error"), rows)]


def _speed(manifest: Manifest) -> list[str]:
    speed = manifest.speed
    if speed is None:
        return ["It was not measured."]
    rows = [
        ("time to the first token", f"{speed.ttft_ms:.1f} ms"),
        ("time per token", f"{speed.tpot_ms:.2f} ms"),
        ("peak memory", f"{speed.peak_memory_bytes / 2**20:.0f} MiB"),
    ]
    return [f"{_plain(speed.machine)}.", "", *_table(("measure", "value"), rows)]


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    line = "|" + "|".join(" --- " for _ in head) + "|"
    return [
        "| " + " | ".join(head) + " |",
        line,
        *("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows),
    ]


def _plain(text: str) -> str:
    """``text`` so that a reader of Markdown shows it as it is, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
