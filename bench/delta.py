"""What an update takes after a fine-tune: a LoRA adapter is trained on the sample, merged, and quantized again.

The adapter is of rank 16 on all linear layers, trained on this repository's documents. The peer is Zstandard with the
old file as its dictionary (`zstd --patch-from`), on the largest file. Minutes, most of them training.

    python -m bench.delta [--steps 60]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agent.contract.manifest import Manifest, Precision, Target, Toolchain  # noqa: E402 - after the path
from agent.contract.profile import Recipe  # noqa: E402
from bench.figures import Figure, table  # noqa: E402
from fleet.errors import UsageError  # noqa: E402
from fleet.home import Home  # noqa: E402
from fleet.profiles_loader import load_profile  # noqa: E402
from fleet.store import FolderStore  # noqa: E402
from fleet.store.deltas import make_delta  # noqa: E402
from fleet.toolchains.build.build import build  # noqa: E402
from fleet.toolchains.checkpoint.checkpoint import resolve_model  # noqa: E402
from fleet.toolchains.checkpoint.sample_model import make_sample  # noqa: E402

RANK, ALPHA, BATCH, LENGTH, RATE = 16, 32, 4, 256, 2e-4
TOOLCHAINS = (Toolchain.LLAMACPP, Toolchain.ONNX_GENAI, Toolchain.OPENVINO, Toolchain.MLX)


def figures(options: argparse.Namespace | None = None) -> list[Figure]:
    """For each toolchain's plain INT4: the delta's share of the artifact's bytes."""
    options = options or parse([])
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        make_sample(folder / "sample")
        drift = fine_tune(folder / "sample", folder / "tuned", options.steps)
        home, profile = Home(folder / "home"), load_profile("iot-x86")
        store, found = FolderStore(home.artifacts), []
        for toolchain in TOOLCHAINS:
            recipe = Recipe(toolchain=toolchain, precision=Precision.INT4, target=Target.CPU)
            old, new = (
                build(resolve_model(folder / each), profile, recipe, home, threads=2) for each in ("sample", "tuned")
            )
            found.append(compared(store, old, new, f"weights moved by {drift:.2%} on average"))
    return found


def compared(store: FolderStore, old: Manifest, new: Manifest, note: str) -> Figure:
    try:
        share = make_delta(store, new, old, threads=2).deltas[-1].wire_bytes / new.size
    except UsageError:
        share = 1.0
    largest = max(new.files, key=lambda file: file.size).path
    patch = patched(store.files(old.id) / largest, store.files(new.id) / largest)
    return Figure(
        f"update after a fine-tune, {new.toolchain.value} INT4, {new.size / 1e6:.0f} MB", share, "of its bytes",
        "zstd --patch-from", patch, at_most=0.15, note=note,
    )  # fmt: skip


def patched(old: Path, new: Path) -> float:
    """Share of the new file's bytes that a generic patch takes."""
    from backports import zstd

    window = max(old.stat().st_size, new.stat().st_size).bit_length() + 1
    options = {
        zstd.CompressionParameter.compression_level: 12,
        zstd.CompressionParameter.window_log: min(window, 30),
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    dictionary = zstd.ZstdDict(old.read_bytes(), is_raw=True)
    return len(zstd.compress(new.read_bytes(), options=options, zstd_dict=dictionary.as_prefix)) / new.stat().st_size


def fine_tune(source: Path, out: Path, steps: int) -> float:
    """Train an adapter, merge it and write the checkpoint; returns how far the weights moved, on average."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

        def forward(self, x: Any) -> Any:
            return self.base(x) + (x @ self.a.T) @ self.b.T * (ALPHA / RANK)

    for parameter in model.parameters():
        parameter.requires_grad = False
    adapted = []
    for layer in model.model.layers:
        for parent, name in (
            (layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"),
            (layer.mlp, "down_proj"),
        ):  # fmt: skip
            setattr(parent, name, Adapted(getattr(parent, name)))
            adapted.append((parent, name))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"training: step {step + 1} of {steps}, loss {loss.item():.3f}", end="\r", file=sys.stderr, flush=True)
    moved = []
    for parent, name in adapted:
        one = getattr(parent, name)
        change = (one.b @ one.a).detach() * (ALPHA / RANK)
        moved.append((change.norm() / one.base.weight.norm()).item())
        one.base.weight.data += change
        setattr(parent, name, one.base)
    shutil.copytree(source, out)
    trained = model.state_dict()
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        merged = {name: trained[name].to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
        save_file(merged, path, metadata={"format": "pt"})
    return sum(moved) / len(moved)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(table(figures(parse(sys.argv[1:]))))
