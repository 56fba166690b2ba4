"""When bytes may be fetched, from where and how many, is the profile's, and an operator in a hurry says so."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from agent.contract.messages import ArtifactRef
from agent.contract.profile import Delivery
from fleet.operations.deploy import DeployOptions, make_order
from fleet.profiles_loader import load_profile
from fleet.registry import Actor

NIGHTS = ("daily 22:00-05:00 Europe/Paris",)


@pytest.mark.parametrize(("now", "windows"), [(False, NIGHTS), (True, ())])
def test_an_order_has_the_windows_of_its_profile_unless_it_is_for_now(now: bool, windows: tuple[str, ...]) -> None:
    profile = load_profile("iot-arm64")
    nightly = profile.model_copy(update={"delivery": profile.delivery.model_copy(update={"windows": NIGHTS})})
    ref = ArtifactRef(id="phi-onnx_genai-int4-cpu-0123456789ab", digest="ab" * 32)
    actor = Actor("anna", datetime(2026, 11, 23, 12, tzinfo=UTC))
    made = make_order(("pi-1", 1, "d-1"), [(ref, 10)], nightly, DeployOptions(transfer_now=now), actor, 86_400)
    assert made.transfer.windows == windows
    assert (b'"windows"' in made.to_json()) is bool(windows), "agents of the first release see what they always saw"


def test_a_window_that_is_none_is_told_where_it_stands() -> None:
    with pytest.raises(ValidationError, match=r"windows\.0[^$]*'22-5' is no window: write DAYS HH:MM-HH:MM ZONE"):
        Delivery(bandwidth_bytes_per_s=1, windows=("22-5",))


def test_an_order_has_the_mirrors_of_its_profile() -> None:
    profile = load_profile("iot-arm64")
    mirrors = ("https://models.example/{digest}/{path}",)
    ref = ArtifactRef(id="phi-onnx_genai-int4-cpu-0123456789ab", digest="ab" * 32)
    actor = Actor("anna", datetime(2026, 11, 23, 12, tzinfo=UTC))
    for given in ((), mirrors):
        one = profile.model_copy(update={"delivery": profile.delivery.model_copy(update={"mirrors": given})})
        made = make_order(("pi-1", 1, "d-1"), [(ref, 10)], one, DeployOptions(), actor, 86_400)
        assert made.transfer.mirrors == given
        assert (b'"mirrors"' in made.to_json()) is bool(given), "agents of the first release see what they always saw"


@pytest.mark.parametrize(("now", "metered"), [(False, 0), (False, 5_000_000), (True, None)])
def test_a_metered_network_is_the_profiles_unless_it_is_for_now(now: bool, metered: int | None) -> None:
    profile = load_profile("iot-arm64")
    delivery = profile.delivery.model_copy(update={"metered_bytes": 5_000_000 if metered is None else metered})
    ref = ArtifactRef(id="phi-onnx_genai-int4-cpu-0123456789ab", digest="ab" * 32)
    actor = Actor("anna", datetime(2026, 11, 23, 12, tzinfo=UTC))
    one = profile.model_copy(update={"delivery": delivery})
    made = make_order(("pi-1", 1, "d-1"), [(ref, 10)], one, DeployOptions(transfer_now=now), actor, 86_400)
    assert made.transfer.metered_bytes == metered
    assert (b'"metered_bytes"' in made.to_json()) is (metered is not None)
