"""The agent's TUF client behind the command line that the public suite theupdateframework/tuf-conformance calls.

The updates, the clock and the files are the agent's own; only what lies below them is another: HTTP for the broker,
and no director's keys, since the suite's repositories have none. docs/trust.md says how to run the suite.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from agent.contract.director import DIRECTOR_TARGET
from agent.errors import AgentError
from agent.platform.clock import SystemClock
from agent.trust.fetcher import METADATA_URL, TARGETS_URL
from agent.trust.time import VerifiedClock
from agent.trust.updates import Updates

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
_PIECE = 64 * 1024


class _HttpFetcher(FetcherInterface):
    def __init__(self, metadata_url: str, targets_url: str) -> None:
        self._places = {METADATA_URL: metadata_url, TARGETS_URL: targets_url}

    def _fetch(self, url: str) -> Iterator[bytes]:
        prefix = next(prefix for prefix in self._places if url.startswith(prefix))
        place = f"{self._places[prefix].rstrip('/')}/{url.removeprefix(prefix)}"
        try:
            with urllib.request.urlopen(place, timeout=30) as answer:
                while piece := answer.read(_PIECE):
                    yield piece
        except urllib.error.HTTPError as error:
            raise DownloadHTTPError(f"{place}: {error}", error.code) from error
        except OSError as error:
            raise DownloadError(f"{place}: {error}") from error


class _Updates(Updates):
    def target(self, updater: Updater, path: str) -> bytes:
        return b"" if path == DIRECTOR_TARGET else super().target(updater, path)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 where anything was refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args(arguments)

    folder: Path = given.metadata_dir.parent
    if (given.metadata_dir.name, (given.target_dir or folder / "targets")) != ("metadata", folder / "targets"):
        parser.error("the agent keeps both kinds of files in one folder, as metadata/ and targets/")
    bundled = folder / "bundled_root.json"
    if given.command == "init":
        bundled.write_bytes(given.trusted_root.read_bytes())
        return 0
    clock = VerifiedClock(SystemClock(), folder / "time.json", _LONG_AGO)
    updates = _Updates(folder, bundled.read_bytes(), clock)
    try:
        updater = updates.refresh(_HttpFetcher(given.metadata_url, given.target_base_url))  # type: ignore[arg-type]
        for name in given.target_name:
            updates.target(updater, name)
    except AgentError as error:
        sys.stderr.write(f"{error.code.value}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
