"""What both ONNX engines need of an artifact of the model builder: its description, its tokenizer, its end markers."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from agent.core.inference import TokenLogprob
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.text import Pieces
from agent.runtimes.engines.token_bytes import TokenBytes
from agent.runtimes.protocol.engine import ModelSource

#: Past this length LongRoPE models switch factors, and every key must be computed again. The library does so itself
#: only in ``generate_next_token`` (its generators.cpp, phi3 at 4097).
LONGROPE_SWITCH = 4096
#: Bytes of a graph without its weights; larger ones have them inside, and are not read for a look.
_GRAPH_LIMIT = 64 << 20


class OnnxFiles:
    """An artifact's folder. The tokenizer is the library's, which loads it without the model."""

    def __init__(self, og: Any, source: ModelSource) -> None:
        self.folder = source.path if source.path.is_dir() else source.path.parent
        file = self.folder / "genai_config.json"
        if not file.is_file():
            raise RuntimeLoadError(f"{self.folder} holds no genai_config.json: it is no ONNX Runtime GenAI artifact")
        try:
            self.model: dict[str, Any] = json.loads(file.read_text("utf-8"))["model"]
            self.decoder: dict[str, Any] = self.model["decoder"]
            self.max_context = int(self.model["context_length"])
            self.vocabulary = int(self.model["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RuntimeLoadError(f"{file} describes no model: {error}") from error
        self._og = og
        self._source = source
        self._token_bytes = TokenBytes(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The library's."""
        return self._og.Tokenizer(str(self.folder))

    @cached_property
    def ends(self) -> frozenset[int]:
        """The checkpoint's end markers and the chat template's."""
        ends = {int(token) for token in self.tokenizer.eos_token_ids}
        for text in self._source.stop_tokens:
            ids = self.encode(text)
            if len(ids) == 1:
                ends.add(ids[0])
        return frozenset(ends)

    @property
    def graph(self) -> Path:
        """The decoder's graph."""
        return self.folder / str(self.decoder.get("filename", "model.onnx"))

    def graph_names(self, word: bytes) -> bool:
        """Return whether a name appears in the graph, weights aside."""
        graph = self.graph
        return graph.is_file() and graph.stat().st_size < _GRAPH_LIMIT and word in graph.read_bytes()

    @cached_property
    def longrope(self) -> bool:
        """Whether the graph holds the second, long table of rotary factors that the builder gives to LongRoPE."""
        return self.graph_names(b"cos_cache_large")

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are parsed."""
        return [int(token) for token in self.tokenizer.encode(text)]

    def logprob(self, token: int, logprob: float) -> TokenLogprob:
        """With the token's text and bytes."""
        text = self._pieces.after(token)
        return TokenLogprob(text, logprob, token, self._token_bytes.of(token, text))

    @cached_property
    def _pieces(self) -> Pieces:
        import numpy as np

        return Pieces(lambda tokens: str(self.tokenizer.decode(np.array(tokens, np.int32))), self.encode("a")[-1])

    def stream(self) -> TokenStream:
        """Return a detokenizer for one sequence."""
        return TokenStream(self.tokenizer.create_stream())


class TokenStream:
    """The library's own incremental detokenizer."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def feed(self, token: int, /) -> str:
        """Return text that is complete now."""
        return str(self._stream.decode(token))

    def flush(self) -> str:
        """It keeps nothing that could be shown."""
        return ""
