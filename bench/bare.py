"""Peers of the endpoint: each runtime's own loop, in a process that does nothing else.

``python -m bench.bare NAME PATH`` reads ``{"prompts": [str], "tokens": int, "streams": int}`` a line and writes
``{"ttft_ms": [float], "tokens": int, "seconds": float, "tokens_per_s": float}``: the last over the time between an
answer's first and last token where there is one stream, while all of them are busy where there are several.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

THREADS = 2
#: From a prompt and a number of tokens to the moments at which tokens came.
Loop = Callable[[str, int], Iterator[float]]


def onnx_genai(path: str) -> Loop:
    import onnxruntime_genai as og

    model = og.Model(path)
    tokenizer = og.Tokenizer(model)

    def loop(prompt: str, count: int) -> Iterator[float]:
        tokens = tokenizer.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + count, do_sample=False)
        generator = og.Generator(model, params)
        stream = tokenizer.create_stream()
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            stream.decode(generator.get_next_tokens()[0])
            yield time.perf_counter()

    return loop


def llamacpp(path: str) -> Loop:
    from agent.runtimes.engines.llamacpp_quirks import without_amx

    with without_amx():  # else it crashes on processors that have AMX
        import llama_cpp

        model = llama_cpp.Llama(path, n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def loop(prompt: str, count: int) -> Iterator[float]:
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        for number, token in enumerate(model.generate(tokens, temp=0.0)):
            if token == model.token_eos() or number == count:
                return
            model.detokenize([token])
            yield time.perf_counter()

    return loop


def openvino(path: str) -> Loop:
    import openvino_genai

    model = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=THREADS)

    def loop(prompt: str, count: int) -> Iterator[float]:
        times: list[float] = []

        def note(_: str) -> bool:
            times.append(time.perf_counter())
            return False

        model.generate(prompt, max_new_tokens=count, do_sample=False, apply_chat_template=False, streamer=note)
        yield from times

    return loop


def mlx(path: str) -> Loop:
    import mlx_lm

    model, tokenizer = mlx_lm.load(path)

    def loop(prompt: str, count: int) -> Iterator[float]:
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        for _ in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=count):
            yield time.perf_counter()

    return loop


def openvino_batched(path: str) -> Callable[[Sequence[str], int, int], dict[str, Any]]:
    """Several at once: one more for each that ends, as clients in a closed loop would. Counted until none is left."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = 1024
    scheduler.max_num_seqs = 8
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        path, scheduler, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    )
    config = openvino_genai.GenerationConfig()
    config.apply_chat_template = False

    def run(prompts: Sequence[str], count: int, streams: int) -> dict[str, Any]:
        config.max_new_tokens = count
        waiting = list(enumerate(prompts))
        running: dict[int, Any] = {}
        begun: dict[int, float] = {}
        ttft: list[float] = []
        tokens, seconds, began = 0, 1e-9, time.perf_counter()
        while waiting or running:
            while waiting and len(running) < streams:
                number, prompt = waiting.pop(0)
                encoded = pipeline.get_tokenizer().encode(prompt, add_special_tokens=False).input_ids
                running[number] = pipeline.add_request(number, encoded, config)
                begun[number] = time.perf_counter()
            pipeline.step()
            for number, handle in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        tokens += len(output.generated_ids) if waiting else 0
                        if (since := begun.pop(number, None)) is not None:
                            ttft.append(1000 * (time.perf_counter() - since))
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    del running[number]
            if waiting:
                seconds = time.perf_counter() - began
        return {"ttft_ms": ttft, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}

    return run


LOOPS = {"onnx_genai": onnx_genai, "llamacpp": llamacpp, "openvino": openvino, "mlx": mlx}


def one_by_one(loop: Loop, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    ttft, count, seconds = [], 0, 0.0
    for prompt in prompts:
        began = time.perf_counter()
        times = list(loop(prompt, tokens))
        ttft.append(1000 * (times[0] - began))
        count += len(times) - 1
        seconds += times[-1] - times[0]
    return {"ttft_ms": ttft, "tokens": count, "seconds": seconds, "tokens_per_s": count / seconds}


def main(name: str, path: str) -> None:
    if name == "openvino_batched":
        run = openvino_batched(path)
    else:
        loop = LOOPS[name](path)

        def run(prompts: Sequence[str], tokens: int, streams: int) -> dict[str, Any]:
            return one_by_one(loop, prompts, tokens)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["prompts"], request["tokens"], request.get("streams", 1))), flush=True)


class Bare:
    """The other end of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, prompts: Sequence[str], tokens: int, streams: int = 1) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = {"prompts": list(prompts), "tokens": tokens, "streams": streams}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line of JSON; libraries write there too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the bare loop ended with {self._process.wait()}")


@contextmanager
def bare(name: str, folder: Path) -> Iterator[Bare]:
    """A process with the loop of that name, loaded."""
    path = next(iter(folder.glob("*.gguf")), folder)
    command = [sys.executable, "-m", "bench.bare", name, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        loop = Bare(process)
        try:
            loop._answer()
            yield loop
        finally:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
