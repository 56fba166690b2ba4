"""How a checkpoint is spoken to: its chat template and the tokens that end a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from agent.contract.base import explain
from agent.contract.manifest import Chat
from fleet.core.plan_shape import ModelFile
from fleet.errors import ModelError
from fleet.toolchains.checkpoint.chat import render
from fleet.toolchains.checkpoint.checkpoint_files import read_as, read_text

#: From the card of microsoft/phi-2, whose tokenizer has no template.
_PHI_2_TEMPLATE = (
    "{% for message in messages %}{{ ('Output: ' if message['role'] == 'assistant' else 'Instruct: ')"
    " + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"
)
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")

_TokenId = Annotated[int, Field(ge=0)]


class _Token(ModelFile):
    content: str


class _AddedToken(_Token):
    id: _TokenId


class _Tokenizer(ModelFile):
    """tokenizer.json, but for its words."""

    added_tokens: list[_AddedToken] | None = None


class _NamedTemplate(ModelFile):
    name: str
    template: str


class _TokenizerConfig(ModelFile):
    """tokenizer_config.json; of it, chat_template.json has the template alone."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    added_tokens_decoder: dict[Annotated[_TokenId, Field(strict=False)], str | _Token] | None = None


class _Generation(ModelFile):
    """generation_config.json."""

    eos_token_id: int | list[int] | None = None


def chat_of(path: Path, architecture: str) -> Chat:
    """How to speak to the checkpoint in ``path``.

    Raises:
        ModelError: there is no chat template, it is too long to deliver, or a file of the tokenizer is garbled.
    """
    config = read_as(_TokenizerConfig, path / "tokenizer_config.json")
    file, template = _template(path, config)
    if not template and architecture == "PhiForCausalLM":
        template = _PHI_2_TEMPLATE
    if not template:
        raise ModelError(f"{path}: its tokenizer has no chat template; add chat_template.jinja, "
                         "or chat_template in tokenizer_config.json")  # fmt: skip
    special = _special_tokens(path, config)
    eos = _text(config.eos_token)
    ids = read_as(_Generation, path / "generation_config.json").eos_token_id
    ends = [special[i] for i in (ids if isinstance(ids, list) else [ids]) if i in special]
    ends += [token for token in _TURN_ENDS if token in special.values() and token in template]
    stop = tuple(dict.fromkeys(token for token in [eos, *ends] if token))
    try:
        chat = Chat(template=template, bos_token=_text(config.bos_token), eos_token=eos, stop=stop)
    except ValidationError as error:
        raise ModelError(f"{file}: the chat cannot be delivered: {explain(error)}; shorten it") from None
    try:
        render(chat, "Hello")  # now, not after minutes of converting
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None
    return chat


def _template(path: Path, config: _TokenizerConfig) -> tuple[Path, str]:
    """The file that has the chat template, and the template, empty where there is none."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file, read_text(file)
    file = path / "tokenizer_config.json"
    if not (found := config.chat_template):
        file = path / "chat_template.json"
        found = read_as(_TokenizerConfig, file).chat_template or ""
    if isinstance(found, list):
        found = next((one.template for one in found if one.name == "default"), "")
    return file, found


def _text(token: str | _Token | None) -> str:
    return token.content if isinstance(token, _Token) else token or ""


def _special_tokens(path: Path, config: _TokenizerConfig) -> dict[int, str]:
    found = {i: _text(token) for i, token in (config.added_tokens_decoder or {}).items()}
    added = read_as(_Tokenizer, path / "tokenizer.json").added_tokens or []
    return found | {token.id: token.content for token in added}
