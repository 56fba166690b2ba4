"""ONNX Runtime GenAI artifacts, the recommended format of Phi at the edge, on CPU, CUDA, DirectML and WebGPU.

On the CPU the graph is run by ONNX Runtime itself with continuous batching (``onnx_batch``); everywhere else, and for
graphs that it is not for, by ONNX Runtime GenAI's generators (``onnx_generator``). The tokenizer is the latter's.
"""

from __future__ import annotations

from agent.core.inference import PARAMETERS, Capabilities
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.guidance import Guides
from agent.runtimes.engines.onnx_batch import BatchEngine
from agent.runtimes.engines.onnx_cache import RowCache, suits
from agent.runtimes.engines.onnx_files import OnnxFiles
from agent.runtimes.engines.onnx_generator import PROVIDERS, GeneratorEngine
from agent.runtimes.protocol.engine import Check, Engine, LoadOptions, ModelSource


class OnnxGenaiRuntime:
    """See the module."""

    name = "onnx_genai"
    features = Capabilities(PARAMETERS, Guides.KINDS, prefix_reuse=True)

    def check(self) -> Check:
        """Import it. ``is_qnn_available`` and its like always say yes, so only CUDA and DirectML are asked."""
        import onnxruntime  # noqa: F401 - both must be importable
        import onnxruntime_genai as og

        devices = ["CPU"]
        if og.is_cuda_available():
            devices.append("CUDA")
        if og.is_dml_available():
            devices.append("DML")
        return Check(str(og.__version__), tuple(devices))

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load the folder that holds ``genai_config.json``; ``extra["engine"]`` may ask for the generators."""
        if options.device not in PROVIDERS:
            raise RuntimeLoadError(f"onnx_genai knows no device {options.device}; it has {', '.join(PROVIDERS)}")
        import onnxruntime_genai as og

        files = OnnxFiles(og, source)
        wanted = options.extra.get("engine", "batch")
        context = min(options.context, files.max_context)
        if wanted == "batch" and options.device == "CPU" and suits(files, context):
            cache = RowCache(files, options.max_sequences, context, options.threads, placed=options.placed)
            return BatchEngine(files, cache, options)
        return GeneratorEngine(og, files, options)


RUNTIME = OnnxGenaiRuntime()
