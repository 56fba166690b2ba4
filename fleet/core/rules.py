"""The planner's linter: what cannot work is refused before minutes are spent on it.

Each rule is one function in one table. A rule gets the model, the recipe with its options, and the context, and
returns why the recipe is refused, or None. Rules about the device's class and hardware get the profile too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import DeviceClass, DeviceProfile, Recipe
from fleet.core.licenses import not_admitted
from fleet.core.plan_shape import Block, ModelShape

_QUANTIZED = (Precision.INT4, Precision.INT8)
_HALVES = (Precision.FP16, Precision.BF16)
#: Weights that share a scale, as MLX's kernels have them.
MLX_GROUPS: tuple[int, ...] = (32, 64, 128)
#: Weights of a row that share a scale; -1 is all of them.
OPENVINO_GROUPS: tuple[int, ...] = (-1, 32, 64, 96, 128, 192, 256)
NPU_GROUPS: tuple[int, ...] = (-1, 128)
#: Of int4 weights in Qualcomm's kernels.
QNN_BLOCK = 64
#: Tokens. A static graph computes its whole context for every token, whether or not it is there.
QNN_CONTEXT = 16384


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be judged. ``profile`` None: the model and the recipe alone, as the support matrix does."""

    shape: ModelShape
    recipe: Recipe
    context: int
    profile: DeviceProfile | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def option(self, name: str, default: Any) -> Any:
        """Return an option of the recipe, or the toolchain's default."""
        return self.options.get(name, self.recipe.options.get(name, default))

    def is_(self, toolchain: Toolchain, *targets: Target) -> bool:
        """Return whether the recipe is this toolchain's, for one of these targets if any are named."""
        return self.recipe.toolchain is toolchain and (not targets or self.recipe.target in targets)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which rule, why in words, and where that is known from."""

    rule: str
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table."""

    name: str
    refuses: str
    source: str
    check: Callable[[Case], str | None]


def refusals(case: Case) -> tuple[Refusal, ...]:
    """Return every rule that refuses the case, in the table's order; none: it is legal."""
    found = ((rule, rule.check(case)) for rule in RULES)
    return tuple(Refusal(rule.name, reason, rule.source) for rule, reason in found if reason)


#: What each toolchain makes for each target.
BUILDS: Mapping[Toolchain, Mapping[Target, tuple[Precision, ...]]] = {
    Toolchain.ONNX_GENAI: {
        Target.CPU: (Precision.INT4, Precision.INT8, Precision.FP32),
        # Not FP32: the builder of 0.18 takes packed attention there, and gives it neither weights nor a KV cache:
        # a graph that ONNX Runtime does not load.
        Target.CUDA: (Precision.INT4, Precision.INT8, Precision.FP16, Precision.BF16),
        Target.DML: (Precision.INT4, Precision.FP16),
        Target.WEBGPU: (Precision.INT4, Precision.FP16),
    },
    Toolchain.OPENVINO: {
        Target.CPU: (Precision.INT4, Precision.INT8, Precision.FP16, Precision.FP32),
        Target.GPU: (Precision.INT4, Precision.INT8, Precision.FP16, Precision.FP32),
        Target.NPU: (Precision.INT4,),
    },
    Toolchain.LLAMACPP: dict.fromkeys((Target.CPU, Target.CUDA, Target.METAL), tuple(Precision)),
    Toolchain.MLX: dict.fromkeys((Target.CPU, Target.METAL), tuple(Precision)),
    Toolchain.ONNX_QNN: {Target.QNN: (Precision.INT4, Precision.INT8)},
}


def toolchains_for(target: Target) -> tuple[Toolchain, ...]:
    """Return those that build for a target."""
    return tuple(toolchain for toolchain, targets in BUILDS.items() if target in targets)


def _fp16_onnx_on_cpu(case: Case) -> str | None:
    if case.is_(Toolchain.ONNX_GENAI, Target.CPU) and case.recipe.precision in _HALVES:
        return (
            "ONNX Runtime GenAI has no half-precision kernels for CPUs (25 times slower than FP32); take INT8 or FP32"
        )
    return None


def _openvino_npu_recipe(case: Case) -> str | None:
    if not case.is_(Toolchain.OPENVINO, Target.NPU) or case.recipe.precision is not Precision.INT4:
        return None
    wrong = []
    if not case.option("symmetric", True):
        wrong.append("symmetric must be true")
    if case.option("ratio", 1.0) != 1.0:
        wrong.append("ratio must be 1.0")
    if case.option("group_size", 128) not in NPU_GROUPS:
        wrong.append("group_size must be -1 or 128")
    return f"the NPU's compiler fails after minutes: {', '.join(wrong)}" if wrong else None


def _openvino_gguf(case: Case) -> str | None:
    if case.is_(Toolchain.OPENVINO) and case.option("format", "ir") == "gguf":
        return "OpenVINO's GGUF reader knows Llama and Qwen, no Phi; build IR, or take llamacpp"
    return None


def _mlx_awq(case: Case) -> str | None:
    if case.is_(Toolchain.MLX) and (case.option("awq", False) or case.option("method", "") == "awq"):
        return "MLX's AWQ has no map of Phi-3's layers; leave it out"
    return None


def _phimoe_onnx(case: Case) -> str | None:
    if case.shape.block is not Block.PHIMOE or not case.is_(Toolchain.ONNX_GENAI):
        return None
    if case.recipe.target is Target.CUDA and case.recipe.precision is Precision.INT4:
        return "the ONNX builder makes PhiMoE with transformers 4 alone: with 5 it refuses its LongRoPE; take openvino"
    return "the ONNX builder makes PhiMoE for CUDA at INT4 alone; take openvino"


def _phimoe_mixer(case: Case) -> str | None:
    if case.shape.block is Block.PHIMOE and case.recipe.toolchain in (Toolchain.LLAMACPP, Toolchain.MLX):
        return (
            f"{case.recipe.toolchain} weighs the two experts by a softmax, the model by its sparse mixer; take openvino"
        )
    return None


def _class_policy(case: Case) -> str | None:
    if case.profile is None or case.profile.device_class not in (DeviceClass.MOBILE, DeviceClass.IOT):
        return None
    if case.recipe.precision is Precision.INT4:
        return None
    return f"{case.profile.device_class} devices get INT4; {case.recipe.precision} is for AI PCs and above"


#: Where no runtime has 4-bit kernels, by what the profile says of the hardware.
_NO_INT4 = {
    (Toolchain.ONNX_GENAI, "armv7l"): "ONNX Runtime GenAI has no build for 32-bit ARM",
    (Toolchain.OPENVINO, "armv7l"): "OpenVINO GenAI has no build for 32-bit ARM",
    (Toolchain.MLX, "armv7l"): "MLX has no build for 32-bit ARM",
    (Toolchain.LLAMACPP, "armv7l"): "llama.cpp's fast 4-bit kernels for ARM want 64-bit registers",
}


def _int4_hardware(case: Case) -> str | None:
    if case.profile is None or case.recipe.precision is not Precision.INT4:
        return None
    why = _NO_INT4.get((case.recipe.toolchain, case.profile.arch))
    return f"the hardware ({case.profile.arch}) has no INT4 here: {why}" if why else None


def _toolchain_target(case: Case) -> str | None:
    recipe = case.recipe
    targets = BUILDS[recipe.toolchain]
    if recipe.target not in targets:
        if recipe.target is Target.QNN:
            return "the toolchain for QNN is onnx_qnn"
        return f"{recipe.toolchain} does not build for {recipe.target}; it builds for {', '.join(targets)}"
    if recipe.precision not in targets[recipe.target]:
        there = ", ".join(targets[recipe.target])
        return f"{recipe.toolchain} does not build {recipe.precision} for {recipe.target}; it builds {there}"
    return None


def _longrope_mlx(case: Case) -> str | None:
    if case.is_(Toolchain.MLX) and case.shape.longrope and case.context > case.shape.original_context:
        return (
            f"MLX ignores LongRoPE's short factors, so short prompts are wrong in a context of {case.context}; "
            f"lower the profile's context to {case.shape.original_context}, where the short ones are baked in"
        )
    return None


def _longrope_llamacpp(case: Case) -> str | None:
    if case.is_(Toolchain.LLAMACPP) and case.shape.longrope and case.context > case.shape.original_context:
        return (f"llama.cpp chooses LongRoPE's factors by the context allocated, so short prompts are wrong in one of "
                f"{case.context}; lower the profile's context to {case.shape.original_context}")  # fmt: skip
    return None


def _no_window(case: Case) -> str | None:
    if case.is_(Toolchain.LLAMACPP):
        return "llama.cpp has switched it off"
    if case.is_(Toolchain.MLX):
        return "MLX's phi3 has none"
    if case.is_(Toolchain.ONNX_GENAI, Target.DML, Target.WEBGPU):
        return f"the ONNX builder leaves it out for {case.recipe.target}"
    return None


def _sliding_window(case: Case) -> str | None:
    window, why = case.shape.sliding_window, _no_window(case)
    if window is None or case.context <= window or why is None:
        return None
    return (f"the model attends to a window of {window} tokens, and {why}: it differs past them; lower the profile's "
            f"context to {window}, or take openvino, or onnx_genai for the CPU or CUDA")  # fmt: skip


def _group_fits(case: Case) -> str | None:
    if case.is_(Toolchain.MLX) and case.recipe.precision in _QUANTIZED:
        group, offered = case.option("group_size", 64), MLX_GROUPS
    elif case.is_(Toolchain.OPENVINO) and case.recipe.precision is Precision.INT4:
        offered = NPU_GROUPS if case.recipe.target is Target.NPU else OPENVINO_GROUPS
        group = case.option("group_size", -1)  # without one, it takes what fits
    elif case.is_(Toolchain.ONNX_QNN) and case.recipe.precision is Precision.INT4:
        group, offered = QNN_BLOCK, (QNN_BLOCK,)
    else:
        return None
    if group not in offered:
        return None  # the toolchain says what it can be
    return case.shape.misfit(group, offered)


def _qnn_network(case: Case) -> str | None:
    if case.is_(Toolchain.ONNX_QNN) and case.shape.block is not Block.PHI3:
        return f"onnx_qnn writes the graphs of Phi-3's network, not of {case.shape.architecture}; take the CPU"
    return None


def _qnn_context(case: Case) -> str | None:
    if case.is_(Toolchain.ONNX_QNN) and case.context > QNN_CONTEXT:
        return (f"a static graph computes all of its context for every token, and {case.context} are too many; lower "
                f"the profile's context to {QNN_CONTEXT}, or to what people need")  # fmt: skip
    return None


def _multimodal(case: Case) -> str | None:
    if case.shape.multimodal:
        return (f"{case.shape.architecture} holds vision or speech too, and no toolchain here takes its text part out; "
                "take the text model of its family")  # fmt: skip
    return None


def _license_admitted(case: Case) -> str | None:
    return None if case.profile is None else not_admitted(case.shape.license, case.profile.admission.licenses)


def _accelerator_there(case: Case) -> str | None:
    if case.profile is None or case.recipe.target in (Target.CPU, *case.profile.accelerators):
        return None
    return f"profile {case.profile.name} has no {case.recipe.target}"


RULES: tuple[Rule, ...] = (
    Rule(
        "class-policy",
        "more than INT4 for mobile and IoT devices",
        "the project's policy: mobile and IoT INT4, AI PCs up to FP32",
        _class_policy,
    ),
    Rule(
        "licence",
        "a model under a licence that the profile does not admit",
        "the profile's admission.licenses",
        _license_admitted,
    ),
    Rule("accelerator", "a target that the profile does not have", "the profile's accelerators", _accelerator_there),
    Rule(
        "fp16-onnx-cpu",
        "half precision in ONNX on a CPU: 25 times slower than FP32",
        "onnxruntime-genai issue 1098; measured",
        _fp16_onnx_on_cpu,
    ),
    Rule("toolchain-target", "what the toolchain does not build", "the toolchains' own lists", _toolchain_target),
    Rule(
        "int4-hardware",
        "INT4 where no runtime has kernels for the hardware",
        "the runtimes' published builds",
        _int4_hardware,
    ),
    Rule(
        "openvino-npu",
        "INT4 for an NPU that is not symmetric, ratio 1.0, group -1 or 128: its compiler fails after minutes",
        "OpenVINO GenAI on NPU, supported precisions",
        _openvino_npu_recipe,
    ),
    Rule(
        "openvino-gguf",
        "a GGUF of a Phi in OpenVINO, whose reader knows Llama and Qwen",
        "OpenVINO GenAI's GGUF reader, supported architectures",
        _openvino_gguf,
    ),
    Rule(
        "mlx-awq", "AWQ in MLX, which has no map of Phi's layers", "mlx-lm, quant/awq.py: AWQ_MODEL_CONFIGS", _mlx_awq
    ),
    Rule(
        "phimoe-onnx",
        "PhiMoE in ONNX: CUDA INT4 alone, and there the builder fails with transformers 5",
        "onnxruntime-genai 0.18, models/builder.py: PhiMoEForCausalLM; tried",
        _phimoe_onnx,
    ),
    Rule(
        "phimoe-mixer",
        "PhiMoE where experts are weighed by a softmax in place of its sparse mixer",
        "mlx-lm, models/phimoe.py; measured on both, logits off by 4.6",
        _phimoe_mixer,
    ),
    Rule(
        "multimodal",
        "checkpoints with vision or speech: transformers 5 does not load those that bring code of their own, and the "
        "ONNX builder has no branch for the one that it does load",
        "transformers 5, AutoConfig: phi3_v and phi4mm; onnxruntime-genai 0.18, models/builder.py",
        _multimodal,
    ),
    Rule(
        "longrope-mlx",
        "LongRoPE in MLX beyond the original context",
        "mlx-lm, models/rope_utils.py: SuScaledRoPE; measured, logits off by 0.41",
        _longrope_mlx,
    ),
    Rule(
        "longrope-llamacpp",
        "LongRoPE in llama.cpp beyond the original context: short prompts get the long factors",
        "llama.cpp issue 24823; measured, logits off by 5",
        _longrope_llamacpp,
    ),
    Rule(
        "sliding-window",
        "a context longer than the model's window where the runtime has none",
        "llama.cpp pull request 13676; mlx-lm, models/phi3.py; onnxruntime-genai 0.18, builders/base.py: "
        "uses_windowed_kv_cache; measured, logits off by 2.7, and by 5.2 in ONNX",
        _sliding_window,
    ),
    Rule(
        "qnn-network",
        "networks other than Phi-3's as static graphs",
        "fleet/toolchains/qnn/network.py",
        _qnn_network,
    ),
    Rule(
        "qnn-context",
        "static graphs that attend to more than 16384 tokens",
        "the cost of a token, which grows with the context and not with what is there",
        _qnn_context,
    ),
    Rule(
        "group-size",
        "groups that do not divide a row: MLX and QNN refuse them, NNCF takes another size and does not say which",
        "mlx.core.quantize; nncf 3.4, weight_compression/algorithm.py: _handle_adjust_group_size_fallback",
        _group_fits,
    ),
)
