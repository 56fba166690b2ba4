"""A home that is mistyped: every command that there is says the same, and makes nothing. New commands are covered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fleet.cli import main as entry
from tests.fleet.cli.conftest import Phifleet


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


def needed(command: click.Command, tmp_path: Path) -> list[str]:
    """The least that the command line wants, drawn from what the command says of itself."""
    given: list[str] = []
    for parameter in command.params:
        if not parameter.required:
            continue
        value = "x"
        if isinstance(parameter.type, click.Choice):
            value = str(parameter.type.choices[0])
        elif isinstance(parameter.type, click.Path):
            value = str(tmp_path / "given")
        given += [value] if isinstance(parameter, click.Argument) else [parameter.opts[0], value]
    return given


LEAVES = [(path, command) for path, command in leaves(entry.cli) if path[0] not in entry.WITHOUT_A_FLEET]


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_where_no_fleet_is_every_command_says_so_and_makes_nothing(
    phifleet: Phifleet, tmp_path: Path, path: tuple[str, ...], command: click.Command, kind: str
):
    if kind == "empty":
        phifleet.home.mkdir()
    elif kind == "file":
        phifleet.home.write_text("no folder")
    (tmp_path / "given").write_text("{}")
    before = sorted(str(found) for found in tmp_path.rglob("*"))
    result = phifleet(*path, *needed(command, tmp_path))
    assert sorted(str(found) for found in tmp_path.rglob("*")) == before, "nothing was made"
    assert result.out == ""
    assert result.code == 2
    advice = "`phifleet init` makes one there, and --home names another folder"
    assert result.err == f"error: {phifleet.home} holds no fleet; {advice}\n"


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_help_needs_no_fleet(phifleet: Phifleet, path: tuple[str, ...], command: click.Command):
    result = phifleet(*path, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Usage: phifleet {' '.join(path)}" in result.out
    assert command.help, "every command says what it does"
