"""How a checkpoint is spoken to: its chat template, the tokens that end a turn, and its sampling defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from agent.contract.base import explain
from agent.contract.manifest import Chat, SamplingDefaults
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


class _NamedToken(_Token):
    special: bool = False


class _AddedToken(_NamedToken):
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
    added_tokens_decoder: dict[Annotated[_TokenId, Field(strict=False)], str | _NamedToken] | None = None


class _Generation(ModelFile):
    """generation_config.json."""

    eos_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(description="0 or -1: off")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None


def end_ids(path: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of generation_config.json, or else of config.json."""
    return _end_ids(path / "generation_config.json") or _end_ids(path / "config.json")


def _end_ids(file: Path) -> tuple[int, ...]:
    ids = read_as(_Generation, file).eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def chat_of(path: Path, architecture: str) -> Chat:
    """Return how to speak to the checkpoint in ``path``.

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
    ends = [special[i] for i in _end_ids(path / "generation_config.json") if i in special]
    ends += [token for token in _TURN_ENDS if token in special.values() and token in template]
    stop = tuple(dict.fromkeys(token for token in [eos, *ends] if token))
    try:
        chat = Chat(
            template=template,
            bos_token=_text(config.bos_token),
            eos_token=eos,
            stop=stop,
            special=_control_tokens(path, config),
        )
    except ValidationError as error:
        raise ModelError(f"{file}: the chat cannot be delivered: {explain(error)}; shorten it") from None
    try:
        render(chat, "Hello")  # now, not after minutes of converting
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None
    return chat


def sampling_of(path: Path) -> SamplingDefaults:
    """Return how the authors of the checkpoint in ``path`` want tokens to be drawn.

    Greedy where they state ``do_sample: false`` or nothing, which is what transformers does too. ``do_sample: true``
    without a temperature is temperature 1. A temperature without ``do_sample`` is meant as it stands.

    Raises:
        ModelError: generation_config.json has a value that no runtime can draw with.
    """
    stated = read_as(_Generation, path / "generation_config.json")
    temperature = stated.temperature if stated.temperature is not None else float(stated.do_sample is True)
    return SamplingDefaults(
        temperature=0.0 if stated.do_sample is False else temperature,
        top_p=_unless(stated.top_p, 1.0),
        top_k=stated.top_k if stated.top_k is not None and stated.top_k > 0 else None,
        min_p=_unless(stated.min_p, 0.0),
        repetition_penalty=_unless(stated.repetition_penalty, 1.0),
    )


def _unless(value: float | None, off: float) -> float | None:
    """None for the value that means "off", which many files state."""
    return None if value == off else value


def _template(path: Path, config: _TokenizerConfig) -> tuple[Path, str]:
    """Return the file that has the chat template, and the template, empty where there is none."""
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


def _control_tokens(path: Path, config: _TokenizerConfig) -> tuple[str, ...]:
    """Return what a text must not hold that comes from outside, sorted.

    Beside those that the tokenizer calls special, these are added tokens that look like marks, as some checkpoints
    leave out the flag; but not runs of spaces, which are added tokens too.
    """
    added: list[_NamedToken] = list(read_as(_Tokenizer, path / "tokenizer.json").added_tokens or [])
    named = [token for token in (config.added_tokens_decoder or {}).values() if isinstance(token, _NamedToken)]
    marks = {
        token.content
        for token in [*added, *named]
        if token.special or (token.content[:1] + token.content[-1:]) in ("<>", "[]", "{}")
    }
    ends = {_text(config.bos_token), _text(config.eos_token)}
    return tuple(sorted(mark for mark in marks | ends if len(mark.strip()) > 1))


def _special_tokens(path: Path, config: _TokenizerConfig) -> dict[int, str]:
    found = {i: _text(token) for i, token in (config.added_tokens_decoder or {}).items()}
    added = read_as(_Tokenizer, path / "tokenizer.json").added_tokens or []
    return found | {token.id: token.content for token in added}
