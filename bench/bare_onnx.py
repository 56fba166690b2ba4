"""The peer of the endpoint: ONNX Runtime GenAI's own loop, in a process that does nothing else.

Reads ``{"prompt": str, "tokens": int}`` a line, writes ``{"ttft_ms": float, "tokens": int, "tokens_per_s": float}``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import onnxruntime_genai as og


def main(folder: str) -> None:
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(model, tokenizer, json.loads(line))), flush=True)


def generate(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, float]:
    began = time.perf_counter()
    tokens = tokenizer.encode(request["prompt"])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + request["tokens"], do_sample=False)
    generator = og.Generator(model, params)
    stream = tokenizer.create_stream()
    generator.append_tokens(tokens)
    times = []
    while not generator.is_done():
        generator.generate_next_token()
        stream.decode(generator.get_next_tokens()[0])
        times.append(time.perf_counter())
    return {
        "ttft_ms": 1000 * (times[0] - began),
        "tokens": len(times),
        "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
    }


if __name__ == "__main__":
    main(sys.argv[1])
