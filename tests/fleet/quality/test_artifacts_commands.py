"""`phifleet artifacts`, `profiles` and `plan`, as a person calls them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.contract.manifest import BuildSpeed, Manifest, Quality, Toolchain
from fleet.cli.artifacts import artifacts
from fleet.cli.plan import plan
from fleet.cli.profiles import profiles
from fleet.errors import FleetError, ModelError, ProfileError, UsageError
from fleet.home import Home
from fleet.store import FolderStore
from tests.simulators.repository import make_manifest

FIELDS = [
    "id", "model", "toolchain", "precision", "target", "bytes", "kl_divergence", "kl_divergence_p99", "perplexity",
    "perplexity_ratio", "same_top_token", "foreign_kl_divergence", "ttft_ms", "tpot_ms", "peak_memory_bytes", "profile",
]  # fmt: skip


@dataclass
class Context:
    home: Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def add(home: Home, name: str, size: int, loss: float | None, toolchain: Toolchain = Toolchain.LLAMACPP) -> Manifest:
    quality = loss if loss is None else Quality(
        kl_divergence=loss, kl_divergence_se=loss / 20, kl_divergence_p99=5 * loss, perplexity=10 + loss,
        perplexity_ratio=1 + loss / 10, same_top_token=0.9, tokens=100, evaluation="phifleet-eval-1:abc",
    )  # fmt: skip
    speed = BuildSpeed(machine="a machine", ttft_ms=20, tpot_ms=12, peak_memory_bytes=2**28) if quality else None
    made = make_manifest(name.encode() * size, id=name, quality=quality, speed=speed, toolchain=toolchain)
    made = made.model_copy(update={"model": made.model.model_copy(update={"source_digest": "0" * 64})})
    (home.artifacts / name).mkdir(parents=True)
    FolderStore(home.artifacts).save_manifest(made)
    return made


def call(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(artifacts, list(arguments), obj=Context(home), catch_exceptions=True)


def test_the_list_has_every_field_also_where_nothing_was_measured(home: Home) -> None:
    add(home, "small", 10, 0.4)
    add(home, "unmeasured", 20, None)
    rows = json.loads(call(home, "list", "--json").stdout)
    assert [list(row) for row in rows] == [FIELDS, FIELDS]
    assert rows[0]["kl_divergence"] == 0.4
    assert rows[0]["tpot_ms"] == 12
    assert rows[1]["kl_divergence"] is rows[1]["peak_memory_bytes"] is None
    shown = call(home, "list").stdout
    assert "0.4000 ± 0.0200" in shown
    assert "unmeasured" in shown


def test_an_empty_home_and_a_damaged_artifact_are_told(home: Home) -> None:
    assert "no artifacts yet" in call(home, "list").stdout
    assert f"{home.root} holds no artifacts" in str(call(home, "compare", "--plot", "x").exception)
    add(home, "small", 10, 0.4)
    (home.artifacts / "broken").mkdir()
    (home.artifacts / "broken" / "manifest.json").write_text("{}")
    found = call(home, "list", "--json")
    assert len(json.loads(found.stdout)) == 1
    assert "broken" in found.stderr


def test_one_is_shown_with_where_its_figures_are_from(home: Home) -> None:
    add(home, "small", 10, 0.4)
    shown = call(home, "show", "smal").stdout
    assert "100 tokens of phifleet-eval-1:abc" in shown
    assert "a machine" in shown
    assert Manifest.from_json(call(home, "show", "small", "--json").stdout).id == "small"
    assert isinstance(call(home, "show", "absent").exception, UsageError)


def test_they_are_compared_and_drawn(home: Home, tmp_path: Path) -> None:
    for name, size, loss, toolchain in (
        ("small", 10, 0.4, Toolchain.LLAMACPP), ("large", 30, 0.1, Toolchain.OPENVINO),
        ("beaten", 40, 0.2, Toolchain.ONNX_GENAI), ("for-a-mac", 50, 0.05, Toolchain.MLX),
    ):  # fmt: skip
        add(home, name, size, loss, toolchain)
    plot = tmp_path / "loss.png"
    found = call(home, "compare", "--json", "--profile", "iot-x86", "--plot", str(plot))
    rows = {row["id"]: row for row in json.loads(found.stdout)}
    assert [name for name, row in rows.items() if row["frontier"]] == ["small", "large", "for-a-mac"]
    assert [name for name, row in rows.items() if row["best"]] == ["large"], (
        "what a device may have, not the least loss"
    )
    assert "the recipes of profile iot-x86 are" in rows["for-a-mac"]["misses"][0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    svg = plot.with_suffix(".svg")
    drawn = [text.text for text in ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"llamacpp", "openvino", "onnx_genai", "mlx", "frontier", "size, MB"} <= set(drawn)
    assert drawn.count("int4") == 4, "a label for each point"
    before = (plot.read_bytes(), svg.read_bytes())
    call(home, "compare", "--plot", str(tmp_path / "loss"))
    assert (plot.read_bytes(), svg.read_bytes()) == before
    assert "large best *" in call(home, "compare", "--profile", "iot-x86").stdout


def test_a_plot_that_cannot_be_is_refused(home: Home, tmp_path: Path) -> None:
    add(home, "unmeasured", 20, None)
    assert isinstance(call(home, "compare", "--plot", str(tmp_path / "x.png")).exception, UsageError)
    add(home, "small", 10, 0.4)
    found = call(home, "compare", "--plot", str(tmp_path / "absent" / "x.png"))
    assert isinstance(found.exception, UsageError)
    assert "cannot be written" in str(found.exception)


def test_the_name_of_a_plot_is_kept_and_a_folder_is_none(home: Home, tmp_path: Path) -> None:
    add(home, "small", 10, 0.4)
    call(home, "compare", "--plot", str(tmp_path / "loss-1.5"))
    assert (tmp_path / "loss-1.5.png").is_file() and (tmp_path / "loss-1.5.svg").is_file()
    assert "is a folder" in str(call(home, "compare", "--plot", str(tmp_path)).exception)


def test_artifacts_scored_on_two_texts_are_not_compared(home: Home) -> None:
    add(home, "small", 10, 0.4)
    mine = add(home, "mine", 5, 0.01)
    assert mine.quality is not None
    quality = mine.quality.model_copy(update={"evaluation": "text-mine:1"})
    FolderStore(home.artifacts).save_manifest(mine.model_copy(update={"quality": quality}))
    refused = str(call(home, "compare").exception)
    assert "different texts" in refused and "text-mine:1: mine" in refused
    assert call(home, "compare", "mine").exit_code == 0


def test_what_cannot_be_read_is_not_called_nothing(home: Home) -> None:
    (home.artifacts / "broken").mkdir(parents=True)
    listed = call(home, "list")
    assert "broken" in listed.stderr and "no artifacts yet" not in listed.output
    assert "no artifact that can be read" in str(call(home, "compare").exception)


def test_artifacts_of_two_models_are_not_compared(home: Home) -> None:
    add(home, "small", 10, 0.4)
    other = add(home, "other", 5, 0.01)
    facts = other.model.model_copy(update={"name": "phi-other", "source_digest": "ab" * 32})
    FolderStore(home.artifacts).save_manifest(other.model_copy(update={"model": facts}))
    refused = str(call(home, "compare").exception)
    assert "name one with --model" in refused and "phi-other (abababababab)" in refused
    for named in ("phi-other", "abab"):
        assert [row["id"] for row in json.loads(call(home, "compare", "--json", "--model", named).stdout)] == ["other"]
    assert "no artifact is of model phi-9" in str(call(home, "compare", "--model", "phi-9").exception)


def test_profiles_are_listed_shown_and_checked(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "raspberry-pi-5" in runner.invoke(profiles, ["list"]).stdout
    names = [one["name"] for one in json.loads(runner.invoke(profiles, ["list", "--json"]).stdout)]
    assert len(names) == 14
    shown = runner.invoke(profiles, ["show", "iot-x86"]).stdout
    assert "# Bytes that the model may take" in shown
    assert json.loads(runner.invoke(profiles, ["show", "iot-x86", "--json"]).stdout)["name"] == "iot-x86"
    mine = tmp_path / "mine.toml"
    mine.write_text(shown, encoding="utf-8")
    assert "is valid" in runner.invoke(profiles, ["check", str(mine)]).stdout
    mine.write_text(shown.replace("[health]", "[helth]"), encoding="utf-8")
    assert "helth is unknown, did you mean health?" in str(runner.invoke(profiles, ["check", str(mine)]).exception)


def test_a_plan_is_a_table_and_is_json() -> None:
    runner = CliRunner()
    found = runner.invoke(plan, ["--model", "microsoft/Phi-4-mini-instruct", "--profile", "ai-pc-npu", "--json"])
    rows = json.loads(found.stdout)
    assert [row["target"] for row in rows] == ["npu", "npu", "cpu"]
    assert [row["recipe"] for row in rows] == [1, 2, 3]
    assert rows[0]["options"]["group_size"] == -1
    shown = runner.invoke(plan, ["--model", "phi-2", "--profile", "copilot-pc-qnn"]).stdout
    assert "refused: qnn-network" in shown
    assert "first choice" in shown


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["--model", "phi-9", "--profile", "iot-x86"], ModelError, "phi-4-mini"),
        (["--model", "phi-4", "--profile", "pi"], ProfileError, "raspberry-pi-5"),
        (["--model", "phi-3.5-moe", "--profile", "iot-x86"], ProfileError, "no toolchain can give"),
    ],
)
def test_a_plan_that_cannot_be_says_why(arguments: list[str], kind: type[FleetError], said: str) -> None:
    found = CliRunner().invoke(plan, arguments)
    assert isinstance(found.exception, kind)
    assert said in str(found.exception)
