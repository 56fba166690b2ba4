"""The tensors that a Phi's network is made of, and what is wrong with a checkpoint whose tensors are others.

Toolchains fill a tensor that is missing with random numbers and drop one that they do not know, and some say so in a
line of a log at most. So every name and shape is known here, and compared before anything is built.

Names are those of the hub, as transformers saves ``PhiForCausalLM``, ``Phi3ForCausalLM`` and ``PhimoeForCausalLM``.
Two ways of saving are exactly the same network and are put right: matrices that this architecture has as one and the
checkpoint as several (``fusions``), and a prefix before every name (``prefix``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fleet.core.plan_shape import Block, ModelShape

Shape = tuple[int, ...]

#: What wrappers put before every name: PEFT, DataParallel, torch.compile, a text model inside a multimodal one.
PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "language_model.", "model.language_model.")
#: Saved by some versions, computed by all.
_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.bias$|\.masked_bias$")
_ADAPTER = re.compile(r"\.lora_[AB]\.|\.lora_(embedding|magnitude)|\.modules_to_save\.")
_QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_packed|absmax|quant_map)$")
#: Tensors that a message names.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Fusion:
    """One tensor out of several, one below the other along the outputs: the rows of the parts in this order."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a checkpoint's tensors become the network's: ``names`` maps those as stored to those of the hub."""

    names: Mapping[str, str]
    fusions: tuple[Fusion, ...] = ()
    problems: tuple[str, ...] = ()
    #: A head of its own, although the configuration ties it to the embedding: right if both are the same numbers.
    tied_head: str | None = None

    @property
    def as_stored(self) -> bool:
        """Nothing has to be renamed or fused."""
        return not self.fusions and all(stored == name for stored, name in self.names.items())


@dataclass(slots=True)
class _Compared:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def expected(shape: ModelShape, *, attention_bias: bool = False, head_bias: bool = False) -> dict[str, Shape]:
    """Return every tensor of the network, by name; the biases are PhiMoE's, where its configuration says so."""
    found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocabulary_size, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors = _LAYERS[shape.block](shape, attention_bias)
        found |= {prefix + name: size for name, size in tensors}
    found |= dict(_end(shape, head_bias))
    return found


def read(found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, tied: bool) -> Reading:
    """Return how ``found``, as stored, is to be read as ``wanted``.

    Its problems are sentences, each with what to do.
    """
    stored = {name: size for name, size in found.items() if not _COMPUTED.search(name)}
    foreign = _foreign(stored)
    if foreign:
        return Reading({}, problems=(foreign,))
    names = _without_prefix(stored, wanted)
    there = {names[name]: size for name, size in stored.items()}
    if len(there) != len(stored):
        return Reading({}, problems=("two tensors have the same name once their prefixes are taken off",))
    fusions = tuple(_fusions(there, wanted))
    for fusion in fusions:
        parts = [there.pop(part) for part in fusion.parts]
        there[fusion.name] = (sum(part[0] for part in parts), *parts[0][1:])
    head = there.pop("lm_head.weight", None) if tied else None
    problems = tuple(_problems(_compared(there, wanted), wanted, tied=tied))
    own_head = next((name for name, hub in names.items() if hub == "lm_head.weight"), None) if head else None
    return Reading(names, fusions, problems, own_head)


def _foreign(stored: Mapping[str, Shape]) -> str | None:
    adapter = [name for name in stored if _ADAPTER.search(name)]
    if adapter and len(adapter) == len(stored):
        return (
            f"it is an adapter and no model ({_named(adapter)}): merge it into its base with PEFT's "
            "merge_and_unload(), and save the result"
        )
    if adapter:
        return f"an adapter is among its weights ({_named(adapter)}): merge it into the base, or move its file away"
    quantized = [name for name in stored if _QUANTIZED.search(name)]
    if quantized:
        return f"it is quantized already ({_named(quantized)}): take the checkpoint that this was made from"
    return None


def _without_prefix(stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
    """By stored name, the hub's; prefixes are taken off as long as every name has one and some name gains by it."""
    names = {name: name for name in stored}
    while names and not any(name in wanted for name in names.values()):
        prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in names.values())), None)
        if prefix is None:
            break
        names = {stored_name: name.removeprefix(prefix) for stored_name, name in names.items()}
    return names


def _fusions(there: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Iterator[Fusion]:
    for name, size in wanted.items():
        if name in there:
            continue
        for whole, parts in _PARTS.items():
            if not name.endswith(whole):
                continue
            names = tuple(name.removesuffix(whole) + part for part in parts)
            shapes = [there.get(part) for part in names]
            if all(shapes) and _stacked([part for part in shapes if part]) == size:
                yield Fusion(name, names)


_PARTS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def _stacked(shapes: Sequence[Shape]) -> Shape | None:
    if len({shape[1:] for shape in shapes}) != 1:
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _compared(there: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> _Compared:
    compared = _Compared()
    for name, size in wanted.items():
        if name not in there:
            compared.missing.append(name)
        elif there[name] != size:
            compared.wrong.append(f"{name} is {_shape(there[name])} and should be {_shape(size)}")
    compared.unexpected = [name for name in there if name not in wanted]
    return compared


def _problems(compared: _Compared, wanted: Mapping[str, Shape], *, tied: bool) -> Iterator[str]:
    missing, unexpected = compared.missing, compared.unexpected
    if missing == ["lm_head.weight"] and not tied:
        yield (
            "lm_head.weight is missing, and config.json does not tie the head to the embedding: fetch the whole "
            "checkpoint, or set tie_word_embeddings to true if it was trained so"
        )
    elif missing:
        why = _why_missing(missing, unexpected)
        yield f"{len(missing)} of its {len(wanted)} tensors are missing: {_named(missing)}{why}"
    if unexpected:
        yield (
            f"{len(unexpected)} tensors are not of this network: {_named(unexpected)}; "
            "config.json and the weights are of two models, or something lies beside the checkpoint"
        )
    if compared.wrong:
        more = f", and {len(compared.wrong) - NAMED} more" if len(compared.wrong) > NAMED else ""
        yield f"config.json does not describe these weights: {'; '.join(compared.wrong[:NAMED])}{more}"


def _why_missing(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if any("q_proj" in name or "gate_proj" in name for name in unexpected):
        return "; q, k, v or gate, up are apart, and do not add up to one matrix of the size in config.json"
    layers = {match[1] for name in missing if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) > 1:
        return "; a part of the files is missing: fetch the whole checkpoint"
    return "; fetch the whole checkpoint"


def _named(names: Sequence[str]) -> str:
    listed = ", ".join(sorted(names, key=_natural)[:NAMED])
    return f"{listed} and {len(names) - NAMED} more" if len(names) > NAMED else listed


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _phi3(shape: ModelShape, _bias: bool) -> Iterator[tuple[str, Shape]]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "input_layernorm.weight", (shape.hidden,)
    yield "post_attention_layernorm.weight", (shape.hidden,)
    yield "self_attn.qkv_proj.weight", (queries + 2 * keys, shape.hidden)
    yield "self_attn.o_proj.weight", (shape.hidden, queries)
    yield "mlp.gate_up_proj.weight", (2 * shape.intermediate, shape.hidden)
    yield "mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def _phi2(shape: ModelShape, _bias: bool) -> Iterator[tuple[str, Shape]]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.dense": (shape.hidden, queries),
        "mlp.fc1": (shape.intermediate, shape.hidden),
        "mlp.fc2": (shape.hidden, shape.intermediate),
    }
    yield from _norm("input_layernorm", shape.hidden)
    for name, size in sizes.items():
        yield f"{name}.weight", size
        yield f"{name}.bias", size[:1]


def _phimoe(shape: ModelShape, bias: bool) -> Iterator[tuple[str, Shape]]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {"q_proj": (queries, shape.hidden), "k_proj": (keys, shape.hidden), "v_proj": (keys, shape.hidden)}
    yield from _norm("input_layernorm", shape.hidden)
    yield from _norm("post_attention_layernorm", shape.hidden)
    for name, size in {**sizes, "o_proj": (shape.hidden, queries)}.items():
        yield f"self_attn.{name}.weight", size
        if bias:
            yield f"self_attn.{name}.bias", size[:1]
    yield "block_sparse_moe.gate.weight", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        prefix = f"block_sparse_moe.experts.{expert}."
        yield f"{prefix}w1.weight", (shape.intermediate, shape.hidden)
        yield f"{prefix}w2.weight", (shape.hidden, shape.intermediate)
        yield f"{prefix}w3.weight", (shape.intermediate, shape.hidden)


def _norm(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


_LAYERS = {Block.PHI2: _phi2, Block.PHI3: _phi3, Block.PHIMOE: _phimoe}


def _end(shape: ModelShape, head_bias: bool) -> Iterator[tuple[str, Shape]]:
    match shape.block:
        case Block.PHI3:
            yield "model.norm.weight", (shape.hidden,)
        case Block.PHIMOE:
            yield from _norm("model.norm", shape.hidden)
        case Block.PHI2:
            yield from _norm("model.final_layernorm", shape.hidden)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary_size, shape.hidden)
    if shape.block is Block.PHI2 or head_bias:
        yield "lm_head.bias", (shape.vocabulary_size,)
