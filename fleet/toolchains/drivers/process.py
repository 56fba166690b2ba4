"""Runs a toolchain in a process of its own: its memory, its crashes and its prints stay there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import BaseModel

from agent.platform.resources import available_bytes
from fleet.errors import BuildError, FleetError, ModelError, ProfileError, UsageError
from fleet.toolchains.drivers.base import DISK_FULL, Converted, ConvertJob, SpeakJob
from fleet.toolchains.progress import Progress, ProgressCallback

_TAIL_LINES = 15
_TAIL_BYTES = 64 * 1024
_GRACE_S = 3.0
_RAISED = (BuildError, ModelError, ProfileError, UsageError)
_KINDS: dict[str, type[FleetError]] = {kind.__name__: kind for kind in _RAISED}
_NO_SPACE_BYTES = 4 * 1024 * 1024
#: No hub, no bars, no telemetry, and the same order of everything in every run.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_MININTERVAL": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    # Else MKL sums in an order that depends on the number of threads and on where memory lies, and two builds differ.
    "MKL_CBWR": "AVX2,STRICT",
    # Torch's own kernels too, which else sum in vectors as wide as the processor has them.
    "ATEN_CPU_CAPABILITY": "avx2",
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # NNCF sends no telemetry where this is set; see also ``child``.
    "NNCF_CI": "1",
    # Threads that spin at a barrier while others hold the cores make torch ten times slower on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def convert(job: ConvertJob, log: Path, progress: ProgressCallback) -> Converted:
    """Convert in a child process. The log is removed after success and kept after failure.

    Raises:
        BuildError: the toolchain failed or was killed; the message has the tail of its log, and says where that is.
        ModelError: the toolchain found the checkpoint wrong.
    """
    answer = _Child("convert", job, log, progress).run()
    return Converted.model_validate(answer["result"])


def speak(job: SpeakJob, log: Path, progress: ProgressCallback) -> str:
    """Generate with an artifact in a child process, in the artifact's own runtime.

    Raises:
        BuildError: the runtime cannot load it, or crashed.
    """
    return str(_Child("speak", job, log, progress).run()["result"]["text"])


def run(kind: str, job: BaseModel, log: Path, progress: ProgressCallback) -> dict[str, Any]:
    """Any other job that the child knows, such as a measurement; what it returned.

    Raises:
        BuildError: it failed or was killed; the message has the tail of its log, and ends with where that is.
    """
    return dict(_Child(kind, job, log, progress).run()["result"])


#: What has failed, by the kind of job.
_FAILED = {
    "convert": "did not convert",
    "speak": "built an artifact that its own runtime cannot run",
    "reference": "could not run the FP32 model in transformers",
    "measure": "built an artifact that its own runtime cannot measure",
}


_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()
#: Of both: no child begins, or leaves the set, while all are being stopped.
_lock = threading.Lock()


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Gives what ends every child, in whatever thread; from then on none begins until the block is left."""

    def stop() -> None:
        with _lock:
            _stopped.set()
            for child in _running:
                _signal_group(child, "SIGKILL")

    try:
        yield stop
    finally:
        _stopped.clear()


@dataclass
class _Child:
    kind: str
    job: BaseModel
    log: Path
    progress: ProgressCallback
    peak_bytes: int = 0

    def run(self) -> dict[str, Any]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        child = self._begin()
        try:
            answer = self._follow(child)
        finally:
            with _lock:
                _running.discard(child)
            _stop(child)
        if "result" not in answer:
            raise self._failure(answer, child.returncode)
        self.log.unlink(missing_ok=True)
        return answer

    def _begin(self) -> subprocess.Popen[bytes]:
        with _lock, self.log.open("ab") as log:
            if _stopped.is_set():
                raise BuildError("interrupted")
            child = subprocess.Popen(
                [sys.executable, "-m", "fleet.toolchains.build.child"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": _python_path()}, start_new_session=True,
            )  # fmt: skip
            _running.add(child)
        return child

    def _follow(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Pass progress on until the child has answered or is gone; the last event that is no progress."""
        ended = threading.Event()
        threading.Thread(target=self._measure, args=(child.pid, ended), daemon=True).start()
        answer: dict[str, Any] = {}
        try:
            if child.stdin is None or child.stdout is None:
                raise AssertionError("both were asked for as pipes")
            request = {"kind": self.kind, "job": self.job.model_dump(mode="json")}
            with contextlib.suppress(BrokenPipeError):  # it died at once; the log says why
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
            # Not the end of the pipe is waited for: what a toolchain forks holds it open, and may outlive its parent.
            events: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            threading.Thread(target=_read, args=(child.stdout, events), daemon=True).start()
            while not answer and (line := _next(events, child)):
                event = json.loads(line)
                if "progress" in event:
                    self.progress(Progress(**event["progress"]))
                else:
                    answer = event
            child.wait()
        finally:
            ended.set()
        return answer

    def _measure(self, pid: int, ended: threading.Event) -> None:
        while not ended.wait(0.1):
            try:
                self.peak_bytes = max(self.peak_bytes, psutil.Process(pid).memory_info().rss)
            except psutil.Error:
                return

    def _failure(self, answer: dict[str, Any], code: int) -> FleetError:
        kind, reason = answer.get("kind"), answer.get("error") or self._death(code)
        if kind in _KINDS and kind != BuildError.__name__:
            return _KINDS[kind](reason)
        if kind == DISK_FULL or _disk_is_full(self.job):
            reason = f"the disk is full ({reason})"
        if kind != BuildError.__name__:  # which says by itself what did not go
            reason = f"{getattr(self.job, 'toolchain', 'toolchain')} {_FAILED[self.kind]}: {reason}"
        # The library's words are between two lines of ours: people read the first line and the last.
        return BuildError("\n".join(part for part in (reason, tail(self.log), f"the whole log: {self.log}") if part))

    def _death(self, code: int) -> str:
        if code >= 0:
            return f"its process ended with code {code}"
        name = signal.Signals(-code).name
        held = f"it held {self.peak_bytes / 2**30:.1f} GiB of memory at most"
        if -code == getattr(signal, "SIGKILL", 9):
            free = available_bytes() / 2**30
            why = "which is what the kernel does when memory runs out"
            return f"its process was killed by {name}, {why}; {held}, and {free:.1f} GiB are available now"
        return f"its process was killed by {name}; {held}"


def _read(pipe: IO[bytes], events: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in pipe:
            events.put(line)
    events.put(None)


def _next(events: queue.SimpleQueue[bytes | None], child: subprocess.Popen[bytes]) -> bytes | None:
    """Return the next line; None once there is no more, or the child has been gone for a while."""
    while True:
        gone = child.poll() is not None
        try:
            return events.get(timeout=0.5)
        except queue.Empty:
            if gone:
                return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tail(log: Path) -> str:
    """Return the last lines of a log, without the frames of progress bars."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join(f"  | {line[:300]}" for line in [line for line in lines if line][-_TAIL_LINES:])


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything that it started; it leads its own session."""
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    for name in ("SIGTERM", "SIGKILL"):
        if child.poll() is None:
            _signal_group(child, name)
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(child, "SIGKILL")
    if child.stdout is not None:
        child.stdout.close()


def _signal_group(child: subprocess.Popen[bytes], name: str) -> None:
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, getattr(signal, name))
        except (ProcessLookupError, PermissionError):  # PermissionError: macOS, of a group of zombies
            return
    elif child.poll() is None:
        child.kill()


def _disk_is_full(job: BaseModel) -> bool:
    out = getattr(job, "out", None)  # a folder, or a file that is not there yet
    try:
        return out is not None and psutil.disk_usage(str(Path(out).parent)).free < _NO_SPACE_BYTES
    except OSError:
        return False


def _python_path() -> str:
    """Return the child must find this package however the parent found it."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
