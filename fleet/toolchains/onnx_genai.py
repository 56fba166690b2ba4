"""ONNX through the model builder of ONNX Runtime GenAI, offline."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.errors import BuildError, ProfileError
from fleet.toolchains.base import Converted, ConvertJob, SpeakJob
from fleet.toolchains.checkpoint import Checkpoint
from fleet.toolchains.phi3_writer import write_json
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.source import mirror
from fleet.toolchains.watching import Watch, watching

#: What the builder can make, by execution provider; FP16 on CPU is not supported by the runtime (its issue 1098).
_BUILDS = {
    Target.CPU: (Precision.INT4, Precision.INT8, Precision.FP32),
    Target.CUDA: (Precision.INT4, Precision.INT8, Precision.FP16, Precision.BF16, Precision.FP32),
    Target.DML: (Precision.INT4, Precision.FP16),
    Target.WEBGPU: (Precision.INT4, Precision.FP16),
}
_QUANTIZED = (Precision.INT4, Precision.INT8)


class OnnxGenai:
    """INT4, INT8 and FP32 for the CPU; INT4 and FP16 for GPUs, which building does not need."""

    name: ClassVar[Toolchain] = Toolchain.ONNX_GENAI
    extra: ClassVar[str] = "quantize-onnx"
    packages: ClassVar[tuple[str, ...]] = (
        "onnxruntime-genai",
        "onnxruntime",
        "onnx",
        "onnx-ir",
        "torch",
        "transformers",
    )
    overhead_bytes: ClassVar[int] = 192 * 1024 * 1024

    def resolve(self, recipe: Recipe, model: Checkpoint) -> dict[str, Any]:
        """Options of the builder for quantized precisions; none otherwise."""
        if recipe.precision not in _BUILDS.get(recipe.target, ()):
            raise ProfileError(f"onnx_genai does not build {recipe.precision} for {recipe.target}")
        options: dict[str, Any] = {}
        if recipe.precision in _QUANTIZED:
            # Accuracy level 4: activations in INT8 too, what the builder takes on a CPU; 0 leaves it to the device.
            level = 4 if recipe.target is Target.CPU else 0
            options = {"algorithm": "default", "block_size": 32, "symmetric": True, "accuracy_level": level}
        if unknown := sorted(set(recipe.options) - set(options)):
            raise ProfileError(f"onnx_genai {recipe.precision} has no option {', '.join(unknown)}; "
                               f"it has {', '.join(options) or 'none'}")  # fmt: skip
        return options | recipe.options

    def peak_memory_bytes(self, recipe: Recipe, model: Checkpoint) -> int:
        """Weights in float32 as loaded, and what is written, beside the libraries."""
        return 4 * model.facts.parameters * 3 + 2**30

    def convert(self, job: ConvertJob, progress: ProgressCallback) -> Converted:
        """Run the builder, and take out what differs from build to build."""
        progress(Progress("loading the toolchain"))
        source = mirror(job.source, job.scratch / "source")
        layers = int(json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
        watches = (
            Watch(re.compile(r"^Reading layer (\d+)"), "reading layers", layers),
            Watch(re.compile(r"complete quantization of /model/layers\.(\d+)/"), "quantizing", layers),
            Watch(re.compile(r"^Saving ONNX"), "writing"),
        )
        with watching(watches, progress):
            _run_builder(job, source)
        progress(Progress("finishing"))
        _unstamp(job.out / "model.onnx")
        _limit_context(job.out / "genai_config.json", job.context)
        return Converted(entry=".", kv_element_bytes=_kv_element_bytes(job.out / "model.onnx"))

    def speak(self, job: SpeakJob) -> str:
        """Greedy, on the CPU."""
        import onnxruntime_genai as og

        model = og.Model(str(job.folder / job.entry))
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(job.prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=min(job.context, len(ids) + job.max_tokens))
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        made: list[int] = []
        while not generator.is_done() and len(made) < job.max_tokens:
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return str(tokenizer.decode(made))


def _run_builder(job: ConvertJob, source: Path) -> None:
    from onnxruntime_genai.models import builder

    pairs = {}
    if job.options:
        pairs = {
            "algo_config": job.options["algorithm"],
            "block_size": job.options["block_size"],
            "is_symmetric": str(job.options["symmetric"]).lower(),
            "accuracy_level": job.options["accuracy_level"],
        }
    arguments = ("", str(source), str(job.out), str(job.precision), str(job.target), str(job.scratch / "cache"))
    extra = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in pairs.items()])
    builder.create_model(*arguments, **extra)


def _unstamp(model: Path) -> None:
    """The builder stamps the git commit of the folder it is installed in: keep its version alone.

    Serialised deterministically; the weights are in a file beside it and stay as they are.
    """
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    proto.producer_version = version("onnxruntime-genai")
    data = proto.SerializeToString(deterministic=True)
    model.write_bytes(data)


def _limit_context(path: Path, context: int) -> None:
    """The runtime reserves the KV cache for ``max_length`` at once where it shares past and present."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"]["max_length"] = min(context, config["model"]["context_length"])
    write_json(path, config)


def _kv_element_bytes(model: Path) -> float:
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    sizes = {onnx.TensorProto.FLOAT: 4.0, onnx.TensorProto.FLOAT16: 2.0, onnx.TensorProto.BFLOAT16: 2.0}
    for value in proto.graph.input:
        if value.name.startswith("past_key_values"):
            return sizes.get(value.type.tensor_type.elem_type, 1.0)
    raise BuildError(f"{model}: the builder wrote a model without a KV cache")
