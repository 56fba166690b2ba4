"""The `phifleet` command: lists its commands, and imports one only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from agent.contract.exit_codes import ExitCode
from agent.platform.arguments import hoisted

if TYPE_CHECKING:
    from fleet.settings import FleetSettings

#: They take a value, and are accepted after the command too: people type them where they think of them.
GLOBAL_OPTIONS = ("--config", "--home", "--server", "--log-level", "--log-format")
#: Name of a command: where it is, and its line in the help. The text is here so that --help imports nothing.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "init": ("fleet.cli.trust:init", "Make the keys and the signed metadata of a new fleet."),
    "sample-model": ("fleet.cli.build:sample_model", "Make a small speaking Phi-3-architecture checkpoint."),
    "profiles": ("fleet.cli.profiles:profiles", "List, show and check device profiles."),
    "plan": ("fleet.cli.plan:plan", "Say which builds are possible for a model and a profile, and why not others."),
    "build": ("fleet.cli.build:build", "Quantize a model for one or more device profiles."),
    "artifacts": ("fleet.cli.artifacts:artifacts", "List and compare what was built."),
    "serve": ("fleet.cli.serve:serve", "Run the controller."),
    "device": ("fleet.cli.devices:device", "Add, list, show and remove devices."),
    "deploy": ("fleet.cli.deploy:deploy", "Order devices to run an artifact."),
    "rollout": ("fleet.cli.rollouts:rollout", "Change many devices in waves that stop by themselves."),
    "cancel": ("fleet.cli.orders:cancel", "Cancel what devices were ordered and have not ended."),
    "rollback": ("fleet.cli.orders:rollback", "Order devices what they had committed to before."),
    "release": ("fleet.cli.names:release", "Name the variants of a model as one thing."),
    "selector": ("fleet.cli.names:selector", "Save selectors under names."),
    "status": ("fleet.cli.status:status", "Show the fleet: presence, deployment, speed."),
    "audit": ("fleet.cli.audit:audit", "Read and verify the record of who did what."),
    "token": ("fleet.cli.access:token", "Make and revoke tokens of the API."),
    "dashboard": ("fleet.cli.access:dashboard", "Print a link that opens the page, signed in."),
    "webhook": ("fleet.cli.access:webhook", "Send what happens to other programs."),
    "db": ("fleet.cli.db:db", "Show and upgrade the tables of the database."),
    "broker": ("fleet.cli.broker:broker", "Write what a broker needs to serve this fleet."),
    "stick": ("fleet.cli.stick:stick", "Carry orders to devices without a network, and their reports back."),
    "trust": ("fleet.cli.trust:trust", "Show, renew and rotate keys and metadata."),
    "completion": ("fleet.cli.completion:completion", "Print the script that completes commands in a shell."),
    "simulate": ("fleet.cli.simulate:simulate", "Run simulated devices; with --rollout, a rollout that stops itself."),
    "demo": ("fleet.cli.demo:demo", "All of it on this machine, in one go."),
}
#: They make a fleet, or have nothing to do with one. For every other command a home that holds none is a mistake, and
#: nothing is made there.
WITHOUT_A_FLEET = frozenset({"init", "sample-model", "profiles", "plan", "build", "completion", "simulate", "demo"})
#: They work at a server too; the others need the controller's home.
AT_A_SERVER = frozenset(
    {
        "device",
        "deploy",
        "rollout",
        "cancel",
        "rollback",
        "release",
        "selector",
        "status",
        "audit",
        "token",
        "webhook",
        "dashboard",
    }
)
#: With these a command says something about itself, and does nothing.
ASKS_ONLY = frozenset({"-h", "--help", "--show-config"})


class LazyGroup(click.Group):
    """Imports a command's module when the command is called, not before: `phifleet status` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if error.name == module:
                raise click.ClickException(f"`phifleet {cmd_name}` is not part of this version") from None
            if package in ("agent", "fleet"):
                raise
            from agent.platform.packages import install_command

            extra = "fleet" if package in ("sqlalchemy", "rich", "iotcore", "fastcdc", "cryptography") else "quantize"
            raise click.ClickException(f"`phifleet {cmd_name}` needs {package}: {install_command(extra)}") from None
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list, out of COMMANDS alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return names near matches of a command that there is not."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no command is named {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"phifleet {version('phifleet')}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print it and end.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings.")
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, artifacts and database.")
@click.option("--server", help="URL of a controller's API, with server_token: to work from another machine.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Lowest level logged.")
@click.option("--log-format", type=click.Choice(["auto", "json", "console"]), help="auto: readable on a terminal.")
@click.option("--show-config", is_flag=True, help="Print each setting and where it came from, and end.")
@click.pass_context
def cli(
    ctx: click.Context,
    config: Path | None,
    home: Path | None,
    server: str | None,
    log_level: str | None,
    log_format: str | None,
    show_config: bool,
) -> None:
    """Quantize Phi per device profile, sign it, deliver it over MQTT, and see how well it runs."""
    if ctx.invoked_subcommand is None and not show_config:
        click.echo(ctx.get_help())
        return
    from agent.platform import logs
    from fleet.cli.context import Context

    asks_only = bool(ctx.obj)  # what ``run`` has found in the arguments
    ctx.obj = Context.load({"home": home, "server": server, "log_level": log_level, "log_format": log_format}, config)
    logs.configure(ctx.obj.settings.log_level, ctx.obj.settings.log_format)
    if show_config:
        ctx.obj.show_config()
        ctx.exit()
    command = ctx.invoked_subcommand
    if command is not None and command in COMMANDS and command not in WITHOUT_A_FLEET and not asks_only:
        _require_a_fleet(command, ctx.obj.settings)


def _require_a_fleet(command: str, settings: FleetSettings) -> None:
    if settings.server is None:
        from fleet.operations.fleet import require_fleet

        require_fleet(settings)
    elif command not in AT_A_SERVER:
        from fleet.errors import UsageError

        where = f"run it on the controller, without the server {settings.server}"
        raise UsageError(f"`phifleet {command}` works on the controller's home: {where}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command; the exit code is the error's (fleet/errors.py), 2 for wrong usage, 130 when interrupted."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    from fleet.errors import FleetError

    given = hoisted(sys.argv[1:] if arguments is None else arguments, GLOBAL_OPTIONS)
    try:
        asks_only = not ASKS_ONLY.isdisjoint(given)
        result: Any = cli.main(given, prog_name="phifleet", standalone_mode=False, obj=asks_only)
    except FleetError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # `phifleet status | head`: nobody reads any more
        sys.stderr.close()
        return ExitCode.NOBODY_READS
    except OSError as error:  # whatever no command has made an error of its own of
        click.echo(f"error: {_of_system(error)}", err=True)
        return ExitCode.FAILED
    return result if isinstance(result, int) else 0


def _of_system(error: OSError) -> str:
    paths = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{paths}: {reason}" if paths else reason
