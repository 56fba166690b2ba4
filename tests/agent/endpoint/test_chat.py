from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.endpoint.openai.chat import ChatTemplateError, neutralise, render
from tests.simulators.inference import PHI4_TEMPLATE, simulated_manifest

PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}[T {{ tool.function.name }} {{ tool | tojson }}]{% endfor %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}!{{ call.function.name }}{% endfor %};{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}


def test_phi4_turns():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(simulated_manifest(), messages) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"


def test_without_generation_prompt_ends_with_eos():
    text = render(simulated_manifest(), [{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert text == "<|user|>Hi<|end|><|endoftext|>"


def test_phi3_blocks_are_trimmed_as_hugging_face_does():
    text = render(simulated_manifest(PHI3_TEMPLATE), [{"role": "user", "content": "Hi"}])
    assert text == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_phi4_tools_go_into_the_system_message_as_a_string():
    text = render(simulated_manifest(), [{"role": "user", "content": "Hi"}], [WEATHER])
    start, _, rest = text.partition("<|tool|>")
    assert start.startswith("<|system|>")
    assert json.loads(rest.partition("<|/tool|>")[0])[0]["name"] == "weather"


def test_a_template_of_its_own_gets_openai_tools():
    text = render(simulated_manifest(TOOLS_TEMPLATE), [{"role": "user", "content": "ł"}], [WEATHER])
    assert text.startswith("[T weather {")
    assert "user:ł" in text


def test_a_template_without_tools_is_told_in_words():
    text = render(simulated_manifest(PHI3_TEMPLATE), [{"role": "user", "content": "Hi"}], [WEATHER])
    assert text.startswith("<|system|>\nYou are a helpful assistant")
    assert '"name": "weather"' in text


def test_earlier_calls_are_written_as_the_model_writes_them():
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    text = render(simulated_manifest(), messages)
    assert '<|tool_call|>[{"name": "weather", "arguments": {"city": "Łódź"}}]<|/tool_call|><|end|>' in text
    assert "<|tool|>rain<|end|>" in text


def test_a_template_without_a_tool_role_sees_the_result_as_the_users():
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
    text = render(simulated_manifest(PHI3_TEMPLATE), messages)
    assert "<|user|>\nThe function returned: rain<|end|>" in text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages[7].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_broken_or_hostile_template_is_an_error_of_ours(template: str):
    with pytest.raises(ChatTemplateError, match="phi-test"):
        render(simulated_manifest(template), [{"role": "user", "content": "Hi"}])


@given(st.text(alphabet=st.sampled_from("<|end>/ user_assistant "), max_size=60))
def test_no_text_from_outside_holds_a_control_token(text: str):
    safe = neutralise(text)
    for token in ("<|end|>", "<|user|>", "<|assistant|>", "<|/tool|>"):
        assert token not in safe
    assert safe.replace("\u2060", "") == text


def test_the_template_is_one_of_phi4():
    assert "message['tools']" in PHI4_TEMPLATE
