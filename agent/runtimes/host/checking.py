"""Which runtimes work here, found out without importing anything native into the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from agent.contract.messages import RuntimeFact
from agent.runtimes.host.child import ChildProcess, describe_exit
from agent.runtimes.host.supervisor import KILL_TIMEOUT_S
from agent.runtimes.protocol.registry import RuntimeSpec, missing, versions

log = structlog.get_logger(component=__name__)

#: How long the output of a check that has ended is waited for, where a process of its own holds the pipe.
_LAST_OUTPUT_S = 2.0


class Checker:
    """Checks each runtime once for each set of package versions; results may be kept in a file."""

    def __init__(self, timeout_s: float, cache_file: Path | None = None) -> None:
        self._timeout_s = timeout_s
        self._file = cache_file
        self._cache = {key: kept for key, kept in read_cache(cache_file).items() if _is_answer(kept)}
        # One check at a time: it imports a whole runtime. Whoever asks meanwhile shares its result.
        self._lock = asyncio.Lock()

    async def fact(self, spec: RuntimeSpec) -> RuntimeFact:
        """Usable, or why not. Never raises."""
        installed = versions(spec)
        if installed is None:
            return RuntimeFact(name=spec.name, usable=False, reason=missing(spec))
        async with self._lock:
            answer = await self._answer(spec, environment(spec))
        main = next(iter(installed.values()), "")
        if "error" in answer:
            return RuntimeFact(name=spec.name, version=main, usable=False, reason=str(answer["error"]))
        devices = tuple(str(device) for device in answer["devices"])
        return RuntimeFact(name=spec.name, version=main or str(answer["version"]), devices=devices, usable=True)

    async def _answer(self, spec: RuntimeSpec, key: str) -> dict[str, Any]:
        known: dict[str, Any] | None = self._cache.get(key)
        if known is not None:
            return known
        log.info("checking runtime", runtime=spec.name, timeout_s=self._timeout_s)
        answer = await _check(spec, self._timeout_s)
        self._cache[key] = answer
        if "error" not in answer:
            # A failure is not kept past this process: it may have been a full memory, or a driver since repaired.
            await asyncio.to_thread(write_cache, self._file, self._kept())
        return answer

    def _kept(self) -> dict[str, Any]:
        return {key: answer for key, answer in self._cache.items() if "error" not in answer}


def read_cache(file: Path | None) -> dict[str, Any]:
    """Return what was kept; a damaged or missing file is an empty one."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_cache(file: Path | None, content: dict[str, Any]) -> None:
    """Keep it, if the disk lets us: it is only a cache."""
    if file is None:
        return
    temporary = file.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), "utf-8")
        temporary.replace(file)


def _is_answer(kept: Any) -> bool:
    return isinstance(kept, dict) and isinstance(kept.get("devices"), list) and "version" in kept


def environment(spec: RuntimeSpec) -> str:
    """Return all that a measurement depends on: a new package, Python, kernel or driver is a new environment."""
    packages = ",".join(f"{name}={version}" for name, version in (versions(spec) or {}).items())
    return f"{spec.module};{packages};{platform.python_version()};{platform.release()};{_drivers()}"


def _drivers() -> str:
    found = []
    for path in ("/proc/driver/nvidia/version", "/etc/nv_tegra_release"):
        with contextlib.suppress(OSError):
            found.append(Path(path).read_text("utf-8", "replace").splitlines()[0])
    return "|".join(found)


async def _check(spec: RuntimeSpec, timeout_s: float) -> dict[str, Any]:
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", "agent.runtimes.engines.worker", spec.module, "--check"]
    try:
        child = await ChildProcess.start(
            spec.name, command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, stdin=null, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        return {"error": f"cannot start a process to check it: {error}"}
    try:
        status = await child.ended(timeout_s)
        if status is None:
            return {"error": f"importing it took longer than {timeout_s:.0f} s"}
        await child.drained(_LAST_OUTPUT_S)
        return _answer(bytes(child.output), child.last_lines, status)
    finally:
        child.kill()
        await child.ended(KILL_TIMEOUT_S)
        child.close()


def _answer(output: bytes, errors: Sequence[str], status: int) -> dict[str, Any]:
    try:
        answer = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        last = errors[-1][:300] if errors else "no output"
        return {"error": f"importing it failed ({describe_exit(status)}): {last}"}
    return (
        answer
        if isinstance(answer, dict) and ("error" in answer or _is_answer(answer))
        else {"error": f"checking it gave an unexpected answer: {str(answer)[:300]}"}
    )
