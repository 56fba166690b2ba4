"""A bill of materials of one artifact: CycloneDX 1.6 with a model card (ML-BOM).

Source: https://cyclonedx.org/docs/1.6/json/. The CycloneDX library for Python has no model cards, so the document is
written here; the tests hold it to that library's strict validator.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from agent.contract.base import sha256_hex
from agent.contract.manifest import Manifest, Quality
from fleet.core.licenses import UNKNOWN, spdx

#: Two-sided, of a normal distribution.
_Z_95 = 1.96
#: Namespace of the serial numbers, so that a document of the same artifact has the same one.
_NAMESPACE = uuid.UUID("6f0d6b0a-52f5-5d0c-9b6e-0d1c7a6f1f5e")


def bill_of_materials(manifest: Manifest) -> bytes:
    """Return the document as JSON. The same manifest gives the same bytes; it holds no time."""
    model = manifest.model
    base = f"checkpoint:{model.source_digest}"
    artifact = f"artifact:{manifest.digest}"
    packages = [_package(name, version) for name, version in sorted(manifest.versions.items())]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(_NAMESPACE, sha256_hex(manifest.to_json())).urn,
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": packages},
            "component": _artifact(manifest, artifact, base),
        },
        "components": [_checkpoint(manifest, base)],
        "dependencies": [{"ref": artifact, "dependsOn": [base]}, {"ref": base, "dependsOn": []}],
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _artifact(manifest: Manifest, ref: str, base: str) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": manifest.id,
        "version": manifest.digest,
        "description": (
            f"{manifest.model.name}, weights in {manifest.precision}, by {manifest.toolchain} for {manifest.target}"
        ),
        **_licenses(manifest),
        "pedigree": {
            "ancestors": [_checkpoint(manifest, f"{base}:ancestor")],
            "notes": "quantized; the options are the properties whose names begin with phifleet:recipe",
        },
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": manifest.model.architecture,
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
                **_datasets(manifest),
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics(manifest)},
        },
        "components": [
            {
                "type": "file",
                "bom-ref": f"{ref}/{file.path}",
                "name": file.path,
                "hashes": [{"alg": "SHA-256", "content": file.sha256}],
                "properties": [{"name": "phifleet:bytes", "value": str(file.size)}],
            }
            for file in manifest.files
        ],
        "properties": _properties(manifest),
    }


def _checkpoint(manifest: Manifest, ref: str) -> dict[str, Any]:
    model = manifest.model
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": model.name,
        "version": model.source_digest,
        "description": f"{model.architecture}, {model.parameters} weights, made for {model.max_context} tokens",
        **_licenses(manifest),
        "properties": [
            {"name": "phifleet:parameters", "value": str(model.parameters)},
            {"name": "phifleet:max-context", "value": str(model.max_context)},
            {"name": "phifleet:source-digest", "value": model.source_digest},
        ],
    }


def _licenses(manifest: Manifest) -> dict[str, Any]:
    """Return SPDX's expression where it is one, else the name; nothing where it is not known."""
    name = manifest.model.license
    if name == UNKNOWN:
        return {}
    expression = spdx(name)
    if expression is None:
        return {"licenses": [{"license": {"name": name}}]}
    if " " in expression or expression.startswith("LicenseRef-"):
        return {"licenses": [{"expression": expression}]}
    return {"licenses": [{"license": {"id": expression}}]}


def _package(name: str, version: str) -> dict[str, Any]:
    return {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name.lower()}@{version}"}


def _datasets(manifest: Manifest) -> dict[str, Any]:
    named: list[tuple[str, str]] = []
    named += [(one.evaluation, "what the loss was measured on") for one in (manifest.quality, manifest.foreign) if one]
    if calibration := manifest.recipe.get("calibration"):
        named.append((str(calibration), "what the quantization was calibrated on"))
    if not named:
        return {}
    return {"datasets": [{"type": "dataset", "name": name, "description": text} for name, text in named]}


def metrics(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what was measured, as CycloneDX has it: values are texts, intervals are of 95%."""
    found: list[dict[str, Any]] = [{"type": "bytes", "value": str(manifest.size)}]
    for quality in (manifest.quality, manifest.foreign):
        if quality is not None:
            found += [_metric(quality, name) for name in Quality.model_fields if f"{name}_se" in Quality.model_fields]
    if (speed := manifest.speed) is not None:
        found += [
            {"type": name, "value": f"{value:.6g}", "slice": speed.machine}
            for name, value in (
                ("ttft_ms", speed.ttft_ms), ("tpot_ms", speed.tpot_ms), ("peak_memory_bytes", speed.peak_memory_bytes),
            )
        ]  # fmt: skip
    return found


def _metric(quality: Quality, name: str) -> dict[str, Any]:
    value, error = getattr(quality, name), getattr(quality, f"{name}_se")
    found: dict[str, Any] = {
        "type": name,
        "value": f"{value:.6g}",
        "slice": f"{quality.evaluation}, {quality.tokens} tokens",
    }
    if error:
        bounds = (value - _Z_95 * error, value + _Z_95 * error)
        found["confidenceInterval"] = {"lowerBound": f"{bounds[0]:.6g}", "upperBound": f"{bounds[1]:.6g}"}
    return found


def _properties(manifest: Manifest) -> list[dict[str, str]]:
    values: dict[str, Any] = {
        "digest": manifest.digest,
        "toolchain": manifest.toolchain,
        "precision": manifest.precision,
        "target": manifest.target,
        "profile": manifest.profile,
        "context": manifest.context,
        "entry": manifest.entry,
        "memory-bytes-at-context": manifest.memory.at_context(manifest.context),
    }
    values |= {f"recipe:{name}": value for name, value in sorted(manifest.recipe.items())}
    return [{"name": f"phifleet:{name}", "value": as_text(value)} for name, value in values.items()]


def as_text(value: Any) -> str:
    """An option of a recipe as people and documents have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
