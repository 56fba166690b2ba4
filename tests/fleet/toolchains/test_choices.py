"""What each width costs: measured once, kept, and never a reason to fail."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.cli.plan import plan
from fleet.core.allocation import Choice
from fleet.errors import BuildError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import build, choices_file, expected_loss, plan_build
from fleet.toolchains.progress import Progress
from fleet.toolchains.recovery.choices import Choices, keep, kept, measured
from tests.models import checkpoint, few_texts

SOME = Choices(64, {"a": [Choice("Q4_0", 18, 0.125), Choice("Q8_0", 34, 1e-7)], "b": [Choice("Q4_0", 18, 0.25)]})


@dataclass(frozen=True)
class Context:
    home: Home


def test_they_are_measured_once(tmp_path: Path) -> None:
    path, asked = tmp_path / "choices" / "x.json", []

    def measure() -> Choices:
        asked.append(1)
        return SOME

    assert measured(path, measure) == measured(path, measure) == kept(path) == SOME
    assert len(asked) == 1
    assert measured(None, measure) == SOME and len(asked) == 2, "where nothing is kept it is measured each time"


names = st.text(min_size=1, max_size=20)
costs = st.builds(Choice, names, st.integers(0, 2**53), st.floats(0, 1e6, allow_nan=False))


@given(st.dictionaries(names, st.lists(costs, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 2**40))
def test_what_is_kept_is_what_was_measured(tmp_path_factory: pytest.TempPathFactory, of: dict, weights: int) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("kept") / "x.json"
    keep(path, Choices(weights, of))
    assert kept(path) == Choices(weights, of)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"7", b'{"weights": 1}', b'{"weights": 1, "of": {}}',
        b'{"weights": 1, "of": {"a": []}}', b'{"weights": "x", "of": {"a": [["Q", 1, 2]]}}',
        b'{"weights": 1, "of": {"a": [["Q", 1]]}}', b'{"weights": 1, "of": {"a": [["Q", "x", 2]]}}',
        b'{"weights": 1, "of": {"a": 5}}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_what_is_damaged_is_measured_again(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert kept(path) is None
    assert measured(path, lambda: SOME) == SOME
    assert kept(path) == SOME


def test_a_full_disk_costs_the_next_build_its_time_alone(tmp_path: Path) -> None:
    with patch("fleet.toolchains.recovery.choices.write_atomic", side_effect=OSError(errno.ENOSPC, "full")):
        assert measured(tmp_path / "x.json", lambda: SOME) == SOME
    assert kept(tmp_path / "x.json") is None


def test_a_budget_that_nothing_fits_is_told() -> None:
    assert SOME.spend(8.0).names == {"a": "Q8_0", "b": "Q4_0"}
    with pytest.raises(BuildError, match=r"a budget of 4 bits a weight is too small: the smallest widths take 4\.50"):
        SOME.spend(4.0)


@pytest.mark.toolchain
def test_a_second_budget_is_spent_on_what_the_first_build_measured(tiny_dir: Path, tmp_path: Path) -> None:
    """And a plan tells what a budget would cost before it is built."""
    text = {"calibration": few_texts()}
    profile, home, model = load_profile("iot-x86"), Home(tmp_path), checkpoint(tiny_dir)

    def recipe(budget: float) -> Recipe:
        return Recipe(
            toolchain=Toolchain.LLAMACPP, precision=Precision.INT4, target=Target.CPU,
            options={"budget": budget, **text},
        )  # fmt: skip

    def phases(budget: float) -> set[str]:
        seen: list[Progress] = []
        manifest = build(model, profile, recipe(budget), home, progress=seen.append)
        made.append(manifest.recipe["allocated"]["expected_kl"])
        return {one.phase for one in seen}

    made: list[float] = []
    assert expected_loss(plan_build(model, profile, recipe(5.0)), home) is None
    assert "measuring sensitivity" in phases(5.0)
    planned = [expected_loss(plan_build(model, profile, recipe(budget)), home) for budget in (5.0, 5.5, 4.3)]
    assert planned[0] == pytest.approx(made[0], abs=1e-4)
    assert planned[2] is None, "nothing is so small"
    assert not {"measuring sensitivity", "measuring what each width costs"} & phases(5.5)
    assert planned[1] == pytest.approx(made[1], abs=1e-4) and made[1] < made[0]
    path = choices_file(plan_build(model, profile, recipe(5.0)), home)
    assert path is not None and [path] == list(path.parent.iterdir())


def test_a_plan_shows_the_loss_where_it_is_asked_for_and_known(tiny_dir: Path, tmp_path: Path) -> None:
    home = Home(tmp_path)
    arguments = ["--model", str(tiny_dir), "--profile", "iot-x86"]
    profile = load_profile("iot-x86")
    number = next(n for n, one in enumerate(profile.recipes) if one.options.get("budget"))
    path = choices_file(plan_build(checkpoint(tiny_dir), profile, profile.recipes[number]), home)
    assert path is not None
    keep(path, Choices(32, {"a": [Choice("Q4_0", 18, 0.0625)]}))
    plain = CliRunner().invoke(plan, arguments, catch_exceptions=False)
    assert plain.exit_code == 0 and "expected loss" not in plain.output
    told = CliRunner().invoke(plan, [*arguments, "--loss"], obj=Context(home), catch_exceptions=False)
    assert told.exit_code == 0 and "expected loss" in told.output and "0.062 nats" in told.output
    rows = json.loads(CliRunner().invoke(plan, [*arguments, "--loss", "--json"], obj=Context(home)).stdout)
    assert [row["expected_kl"] for row in rows][number] == pytest.approx(0.0625)
    assert {row["expected_kl"] for row in rows} == {None, 0.0625}
