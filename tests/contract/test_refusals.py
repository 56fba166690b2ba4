"""What the contract refuses, and the sentence that it says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from agent.contract.director import DirectorKeys
from agent.contract.manifest import ArtifactFile, Chat, SamplingDefaults
from agent.contract.messages import ArtifactRef, ChunkRange, Desired
from agent.contract.profile import DeviceProfile
from agent.contract.templates import TemplateFailedError, render
from fleet.profiles_loader import load_profile
from tests.contract.test_contract import MANIFEST

AT = datetime(2026, 11, 23, tzinfo=UTC)


def test_an_order_that_has_ended_before_it_was_made():
    with pytest.raises(ValidationError, match="expires_at is not after issued_at"):
        Desired(
            device="pi-1",
            sequence=1,
            deployment="d1",
            issued_at=AT,
            expires_at=AT - timedelta(seconds=1),
            artifacts=(ArtifactRef(id="phi", digest="0" * 64),),
        )


def test_a_range_of_chunks_that_runs_backwards():
    with pytest.raises(ValidationError, match="last 1 is before first 2"):
        ChunkRange(first=2, last=1)


def test_more_signatures_than_there_are_keys():
    with pytest.raises(ValidationError, match="threshold 2 is more than the 1 keys"):
        DirectorKeys(threshold=2, keys={"one": {}})


def test_chunks_that_are_not_the_whole_file():
    with pytest.raises(ValidationError, match="do not add up to 5 bytes"):
        ArtifactFile(path="w", size=5, sha256="0" * 64, chunks=((4, "0" * 64),))


def test_sampling_defaults_are_those_of_the_manifest_or_of_greedy_search():
    assert MANIFEST.sampling_defaults == (MANIFEST.sampling or SamplingDefaults()).model_dump(exclude_none=True)


def chat(template: str) -> Chat:
    return Chat(template=template, bos_token="<s>", eos_token="</s>")


def now() -> datetime:
    return AT


def test_a_template_has_what_transformers_gives_it():
    template = (
        "{{ bos_token }}{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}{{ tools }}"
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<é>"}]
    text = render(chat(template), messages, now=now)
    assert text == '<s>{"role": "user", "content": "<é>"}2026>None'
    assert render(chat("{{ tools | length }}"), messages, now=now, tools=[{}, {}], opened=False) == "2"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only users speak here') }}", "^only users speak here$"),
        ("{{ messages.nothing.at_all }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_says_how(template: str, words: str):
    with pytest.raises(TemplateFailedError, match=words):
        render(chat(template), [], now=now)


def test_a_recipe_for_an_accelerator_that_the_profile_has_not():
    profile = load_profile("iot-x86").model_dump(mode="json")
    profile["recipes"][0]["target"] = "npu"
    profile["accelerators"] = []
    with pytest.raises(ValidationError, match=r"target npu is not among the accelerators \(none\)"):
        DeviceProfile.model_validate(profile)
