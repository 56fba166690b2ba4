"""The files of an artifact of static graphs: description, tables and tokenizer. Whoever opens it runs the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent.contract.base import MalformedMessageError
from agent.contract.static_graph import DESCRIPTION, Run, StaticModel, StaticSequence, embedded


class StaticFolder:
    """A folder that holds ``static_graph.json``, whether or not its graphs are compiled.

    Raises:
        MalformedMessageError: it holds none, or its files are not those described; says which.
    """

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from tokenizers import Tokenizer

        self.folder = folder
        try:
            self.model = StaticModel.from_json((folder / DESCRIPTION).read_bytes())
        except FileNotFoundError:
            raise MalformedMessageError(
                f"{folder} holds no {DESCRIPTION}: it is no artifact of static graphs"
            ) from None
        except (OSError, MalformedMessageError) as error:
            raise MalformedMessageError(f"{folder / DESCRIPTION} describes no graphs: {error}") from error
        model = self.model
        table, rows = model.embedding, model.vocabulary
        try:
            values = np.memmap(folder / table.values, np.uint8, "r").reshape(rows, -1)
            scales = np.memmap(folder / table.scales, np.float16, "r").reshape(rows, -1)
            self._sizes = np.fromfile(folder / model.sizes, np.float32).reshape(model.layers, 2, model.hidden)
        except (OSError, ValueError) as error:
            raise MalformedMessageError(f"{folder}: its tables are not those described: {error}") from error
        self._embed = partial(embedded, table, model.hidden, values, scales)
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises Exception itself
            raise MalformedMessageError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error

    def sequence(self, run: Run) -> StaticSequence:
        """Begin one, whose graphs ``run`` runs."""
        return StaticSequence(self.model, self._embed, run, self._sizes)

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are parsed."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens have no text."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
