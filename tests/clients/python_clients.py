"""Python programs that people point at an endpoint, each with its own real package: run in an environment of theirs.

    python python_clients.py URL MODEL [CHECK]...

Prints a line of JSON for each check: its name, and the traceback of one that failed. URL has no path.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr

CHECKS: dict[str, Callable[[str, str], None]] = {}
#: Short: what is tried is whether they understand each other.
ASKED, MOST = "What is the capital of France?", 64


class Lamp(BaseModel):
    """Switch the lamp."""

    # Else a small model may go on with properties of its own until it is cut.
    model_config = ConfigDict(extra="forbid")

    state: Literal["on", "off"]


def check(function: Callable[[str, str], None]) -> Callable[[str, str], None]:
    CHECKS[function.__name__] = function
    return function


def _lamp(state: Literal["on", "off"]) -> str:
    """Switch the lamp on or off."""
    return f"the lamp is {state}"


def _langchain(url: str, model: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=SecretStr("none"), temperature=0, max_retries=0,
                      max_completion_tokens=MOST, **options)  # fmt: skip


@check
def langchain_invoke(url: str, model: str) -> None:
    said = _langchain(url, model).invoke(ASKED)
    assert said.content and said.usage_metadata["output_tokens"] > 0


@check
def langchain_stream(url: str, model: str) -> None:
    pieces = list(_langchain(url, model, stream_usage=True).stream(ASKED))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.content == _langchain(url, model).invoke(ASKED).content
    assert whole.usage_metadata["total_tokens"] > 0


@check
def langchain_async_batch(url: str, model: str) -> None:
    said = asyncio.run(_langchain(url, model).abatch([ASKED, "Say hello."]))
    assert all(one.content for one in said)


@check
def langchain_tools(url: str, model: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    tools = _langchain(url, model).bind_tools([Lamp], tool_choice="Lamp")
    asked = HumanMessage("Switch the lamp on.")
    said = tools.invoke([asked])
    (call,) = said.tool_calls
    assert call["name"] == "Lamp" and call["args"]["state"] in ("on", "off")
    answered = (
        _langchain(url, model).bind_tools([Lamp]).invoke([asked, said, ToolMessage("done", tool_call_id=call["id"])])
    )
    assert answered.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")
    streamed = None
    for piece in tools.stream([asked]):
        streamed = piece if streamed is None else streamed + piece
    assert streamed.tool_calls[0]["args"] == call["args"]


@check
def langchain_structured(url: str, model: str) -> None:
    for method in ("json_schema", "function_calling"):  # json_mode is any JSON, which a small model's may well be
        said = _langchain(url, model).with_structured_output(Lamp, method=method).invoke("Switch the lamp on.")
        assert said.state in ("on", "off"), method


@check
def langchain_responses_api(url: str, model: str) -> None:
    said = _langchain(url, model, use_responses_api=True).invoke(ASKED)
    assert said.text and said.usage_metadata["output_tokens"] > 0
    pieces = [piece.text for piece in _langchain(url, model, use_responses_api=True).stream(ASKED)]
    assert "".join(pieces) == said.text


def _langchain_anthropic(url: str, model: str) -> Any:
    from langchain_anthropic import ChatAnthropic

    return ChatAnthropic(model_name=model, base_url=url, api_key=SecretStr("none"), temperature=0, max_retries=0,
                         max_tokens_to_sample=MOST, timeout=None, stop=None)  # fmt: skip


@check
def langchain_anthropic(url: str, model: str) -> None:
    said = _langchain_anthropic(url, model).invoke(ASKED)
    assert said.text and said.usage_metadata["output_tokens"] > 0
    assert "".join(piece.text for piece in _langchain_anthropic(url, model).stream(ASKED)) == said.text


@check
def langchain_anthropic_tools(url: str, model: str) -> None:
    tools = _langchain_anthropic(url, model).bind_tools([Lamp], tool_choice="Lamp")
    (call,) = tools.invoke("Switch the lamp on.").tool_calls
    assert call["args"]["state"] in ("on", "off")


def _litellm(url: str, model: str, /, **options: Any) -> Any:
    import litellm

    litellm.suppress_debug_info = True
    messages = [{"role": "user", "content": ASKED}]
    given = {"model": f"openai/{model}", "api_base": f"{url}/v1", "messages": messages, "temperature": 0}
    return litellm.completion(**given | {"api_key": "none", "max_tokens": MOST, "num_retries": 0} | options)


@check
def litellm_chat(url: str, model: str) -> None:
    said = _litellm(url, model)
    assert said.choices[0].message.content and said.usage.completion_tokens > 0
    for provider in ("hosted_vllm", "lm_studio"):
        again = _litellm(url, model, model=f"{provider}/{model}")
        assert again.choices[0].message.content == said.choices[0].message.content, provider


@check
def litellm_stream(url: str, model: str) -> None:
    pieces = list(_litellm(url, model, stream=True, stream_options={"include_usage": True}))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == _litellm(url, model).choices[0].message.content


@check
def litellm_tools_and_schema(url: str, model: str) -> None:
    tool = {"type": "function", "function": {"name": "lamp", "parameters": Lamp.model_json_schema()}}
    said = _litellm(url, model, tools=[tool], tool_choice={"type": "function", "function": {"name": "lamp"}})
    Lamp.model_validate_json(said.choices[0].message.tool_calls[0].function.arguments)
    Lamp.model_validate_json(_litellm(url, model, response_format=Lamp).choices[0].message.content)


@check
def litellm_anthropic_and_text(url: str, model: str) -> None:
    import litellm

    said = _litellm(url, model, model=f"anthropic/{model}", api_base=url)
    assert said.choices[0].message.content
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="Once", api_base=f"{url}/v1", api_key="none", max_tokens=4
    )
    assert text.choices[0].text
    answer = litellm.responses(model=f"openai/{model}", input=ASKED, api_base=f"{url}/v1", api_key="none")
    assert answer.output


@check
def llm_command(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        listed = [{"model_id": "phi", "model_name": model, "api_base": f"{url}/v1", "api_key_name": "none",
                   "supports_schema": True, "supports_tools": True}]  # fmt: skip
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(listed))  # which is YAML, too
        (Path(folder) / "keys.json").write_text('{"none": "x"}')
        environment = {**os.environ, "LLM_USER_PATH": folder}

        def llm(*arguments: str) -> str:
            command = [str(Path(sys.executable).parent / "llm"), *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stdout

        options = ("-o", "temperature", "0", "-o", "max_tokens", str(MOST))
        streamed = llm("-m", "phi", *options, ASKED)
        assert streamed.strip() and streamed == llm("-m", "phi", "--no-stream", *options, ASKED)
        assert llm("-m", "phi", "-c", *options, "And of Italy?").strip()
        Lamp.model_validate_json(llm("-m", "phi", "--schema", json.dumps(Lamp.model_json_schema()), *options, "On."))


def _pydantic_ai(url: str, model: str, *, responses: bool = False) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind = OpenAIResponsesModel if responses else OpenAIChatModel
    return kind(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


@check
def pydantic_ai(url: str, model: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput

    settings: Any = {"temperature": 0, "max_tokens": MOST}
    for responses in (False, True):
        chosen = _pydantic_ai(url, model, responses=responses)
        said = Agent(chosen, instructions="Be brief.", model_settings=settings).run_sync(ASKED)
        assert said.output and said.usage.output_tokens > 0
        for output in (NativeOutput(Lamp), ToolOutput(Lamp)):
            found = Agent(chosen, output_type=output, model_settings=settings).run_sync("Switch the lamp on.")
            assert found.output.state in ("on", "off"), (responses, output)

    async def streamed() -> str:
        async with Agent(_pydantic_ai(url, model), model_settings=settings).run_stream(ASKED) as result:
            return str(await result.get_output())

    assert asyncio.run(streamed())


@check
def instructor_modes(url: str, model: str) -> None:
    import instructor
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        found = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=model, response_model=Lamp, max_retries=0, temperature=0, max_tokens=MOST,
            messages=[{"role": "user", "content": "Switch the lamp on."}],
        )  # fmt: skip
        assert found.state in ("on", "off"), mode


@check
def openai_agents(url: str, model: str) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)

    def client() -> openai.AsyncOpenAI:  # of the event loop that uses it
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    lamp = agents.function_tool(_lamp, name_override="lamp")
    # What is cut is a failure to this one.
    settings = agents.ModelSettings(temperature=0, max_tokens=400)
    forced = agents.ModelSettings(temperature=0, max_tokens=400, tool_choice="lamp")
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):

        def switches(kind: Any = kind) -> Any:
            return agents.Agent(name="phi", instructions="You switch lamps.", tools=[lamp], model=kind(model, client()),
                                model_settings=forced, tool_use_behavior="stop_on_first_tool")  # fmt: skip

        done = agents.Runner.run_sync(switches(), "Switch the lamp on.")
        assert done.final_output in ("the lamp is on", "the lamp is off"), kind

        async def streamed(switches: Any = switches) -> str:
            running = agents.Runner.run_streamed(switches(), "Switch the lamp on.")
            async for _ in running.stream_events():
                pass
            return str(running.final_output)

        assert asyncio.run(streamed()).startswith("the lamp is"), kind
        plain = agents.Agent(name="phi", instructions="Be brief.", model=kind(model, client()), model_settings=settings)
        assert agents.Runner.run_sync(plain, ASKED).final_output


def main(url: str, model: str, *wanted: str) -> None:
    for name, function in CHECKS.items():
        if wanted and name not in wanted:
            continue
        try:
            function(url, model)
            failure = None
        except Exception:
            failure = traceback.format_exc()
        sys.stdout.write(json.dumps({"check": name, "failure": failure}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
