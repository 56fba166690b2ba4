"""What the two programs exit with: one table, so that a code means one thing. Shared with fleet/."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Service managers and scripts may rely on these; ``docs/operations.md`` has the same table."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    PROFILE = 4
    BUILD = 5
    REPOSITORY = 6
    BROKER = 7
    DATABASE = 8
    NOT_COMMITTED = 9
    MODEL = 10
    INTERRUPTED = 130
    NOBODY_READS = 141


#: What each means to whoever called the command; what trying again changes.
MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "it failed; the message says why, and trying again may help",
    ExitCode.USAGE: "a flag, a setting, an id or a file that was given cannot be used; trying again changes nothing",
    ExitCode.NOT_RUNNING: "`phifleet-agent status`: no agent runs (as the LSB has it)",
    ExitCode.PROFILE: "a device profile is wrong, or no toolchain can give what it asks for",
    ExitCode.BUILD: "a toolchain is missing or failed, or an artifact is damaged",
    ExitCode.REPOSITORY: "the signed metadata, its keys or the device CA cannot be used",
    ExitCode.BROKER: "the broker cannot be reached, or refuses",
    ExitCode.DATABASE: "the database cannot be used",
    ExitCode.NOT_COMMITTED: "devices that were waited for did not commit",
    ExitCode.MODEL: "a checkpoint is missing, damaged, or not a Phi",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C or SIGTERM",
    ExitCode.NOBODY_READS: "nobody reads the output any more",
}
