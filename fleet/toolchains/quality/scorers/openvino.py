"""OpenVINO IR: timed in OpenVINO GenAI's pipeline, scored in OpenVINO itself, which gives every token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleet.toolchains.quality.scorers import Opened, Timing

_NAME = "openvino_model.xml"
_DEVICE = "CPU"  # the weights are the same on every device; the build machine need not have the target

_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenVino:
    """The pipeline first; then, in its place, the bare model."""

    def __init__(self, opened: Opened) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self._path = opened.path
        self._pipeline: Any = openvino_genai.LLMPipeline(str(opened.path), _DEVICE)
        self._request: Any = None

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Greedily; times are the pipeline's own metrics."""
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        metrics = self._pipeline.generate(openvino.Tensor(np.asarray([prompt], dtype=np.int64)), config).perf_metrics
        return Timing(metrics.get_ttft().mean, metrics.get_tpot().mean)

    def prepare_logits(self) -> None:
        """Drop the pipeline, compile the model; in float32, where machines with BF16 units would round more."""
        import openvino

        self._pipeline = None
        core = openvino.Core()
        self._request = core.compile_model(str(self._path / _NAME), _DEVICE, _EXACT).create_infer_request()

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """In one pass."""
        import numpy as np

        tokens = np.asarray([ids], dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        known = {name for port in self._request.model_inputs for name in port.get_names()}
        self._request.reset_state()
        self._request.infer({name: value for name, value in inputs.items() if name in known})
        found = self._request.get_tensor("logits").data
        return np.array(found[0, start - 1 : len(ids) - 1], dtype=np.float32)


def load(opened: Opened) -> OpenVino:
    """Open a model folder."""
    return OpenVino(opened)
