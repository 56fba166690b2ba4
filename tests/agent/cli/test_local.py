"""Commands of the person at the device: what is told is what is known, and a conversation survives Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from agent.cli.local import NotRunningError, ask
from agent.errors import AgentError
from agent.platform import logs
from tests.simulators.broker import free_port
from tests.waiting import wait_until

TOKEN = "t" * 32


def write_control(folder: Path, port: int) -> Path:
    path = folder / "control.json"
    path.write_text(json.dumps({"port": port, "token": TOKEN}))
    return path


@contextlib.contextmanager
def control(answer: bytes | None) -> Iterator[int]:
    """A port that answers each request so; None ends the connection without a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.makefile("rb").readline()
                    if answer is not None:
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_the_agents_own_refusal_is_passed_on(tmp_path: Path):
    with control(b'{"error": "the disk is full"}\n') as port:
        write_control(tmp_path, port)
        with pytest.raises(AgentError, match="the disk is full") as caught:
            ask(tmp_path, "pause")
        assert not isinstance(caught.value, NotRunningError)


def test_an_agent_that_ends_the_connection_runs_and_is_not_said_to_be_away(tmp_path: Path):
    with control(None) as port:
        write_control(tmp_path, port)
        with pytest.raises(AgentError, match="without an answer to `pause`") as caught:
            ask(tmp_path, "pause")
        assert not isinstance(caught.value, NotRunningError)


def test_without_an_agent_nobody_answers(tmp_path: Path):
    with pytest.raises(NotRunningError, match="no agent answers"):
        ask(tmp_path, "status")
    write_control(tmp_path, free_port())  # what an agent that was killed leaves behind
    with pytest.raises(NotRunningError, match="no agent answers"):
        ask(tmp_path, "status")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"port": "x", "token": "y"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "control.json").write_text(text)
    with pytest.raises(AgentError, match=r"control\.json is damaged") as caught:
        ask(tmp_path, "status")
    assert not isinstance(caught.value, NotRunningError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("folder_mode", [0o755, 0o700])
def test_another_user_is_told_that_it_cannot_be_known(folder_mode: int):
    # Not below pytest's own folder, which no other user may look into.
    folder = Path("/tmp") / f"phifleet-agent-{os.getpid()}-{folder_mode:o}"
    folder.mkdir()
    try:
        write_control(folder, 1).chmod(0o600)
        folder.chmod(folder_mode)
        code = (
            "import sys; from pathlib import Path; from agent.cli.local import ask, NotRunningError\n"
            "import os; os.setgid(65534); os.setuid(65534)\n"
            "try: ask(Path(sys.argv[1]), 'status')\n"
            "except NotRunningError: print('away')\n"
            "except Exception as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    finally:
        folder.chmod(0o700)
        (folder / "control.json").unlink()
        folder.rmdir()
    assert "may not be read by this user" in done.stdout
    assert "sudo -u" in done.stdout


def test_logs_follow_over_a_rotation_and_lose_no_line(tmp_path: Path):
    """With the agent's own rotating file."""
    command = [sys.executable, "-m", "agent", "--state-dir", str(tmp_path), "logs", "-n", "1", "-f"]
    writer = (
        "import sys, structlog; from pathlib import Path; from agent.platform import logs\n"
        "logs.FILE_BYTES = 4096\n"
        "logs.configure('info', 'json', Path(sys.argv[1]))\n"
        "log = structlog.get_logger()\n"
        "log.info('begin')\n"
        "import time\n"
        "for line in sys.stdin:\n"
        "    for number in range(200): log.info('line', number=number, filler='x' * 100); time.sleep(0.002)\n"
    )
    assert logs.FILE_BYTES > 4096
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path / "logs")],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as agent:
        wait_until((tmp_path / "logs" / "agent.log").exists, "the log")
        seen: list[int] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as follower:
            assert follower.stdout is not None and agent.stdin is not None
            assert json.loads(follower.stdout.readline())["event"] == "begin"
            agent.stdin.write("go\n")
            agent.stdin.close()
            for line in follower.stdout:
                seen.append(json.loads(line)["number"])
                if seen[-1] == 199:
                    break
            follower.terminate()
    # One older file is kept: what is rotated twice between two looks is gone, and what is there comes in order.
    assert seen[-1] == 199 and seen == sorted(set(seen))


class _Endpoint(BaseHTTPRequestHandler):
    """Streams an answer: endless and slow to the first question, short and cut to the second."""

    asked: ClassVar[list[list[dict[str, str]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["messages"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        endless = body["messages"][-1]["content"] == "go on"
        with contextlib.suppress(OSError):
            for _ in range(600 if endless else 1):
                self._send({"choices": [{"delta": {"content": "word "}}]})
                time.sleep(0.05 if endless else 0)
            self._send({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 1}})

    def _send(self, event: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_ctrl_c_ends_the_answer_and_commands_do_not_reach_the_model(tmp_path: Path):
    _Endpoint.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = {"serving": {"model": "phi"}, "endpoint": f"http://127.0.0.1:{server.server_address[1]}"}
    with control(json.dumps(status).encode() + b"\n") as port:
        write_control(tmp_path, port)
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "agent", "--state-dir", str(tmp_path), "chat"]
        chat = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        screen = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):
                while piece := os.read(ours, 4096):
                    screen.extend(piece)

        threading.Thread(target=read, daemon=True).start()

        def type_(text: str) -> None:
            os.write(ours, text.encode() + b"\n")

        wait_until(lambda: b"> " in screen, "the prompt")
        type_("/?")
        wait_until(lambda: screen.count(b"/clear forgets") >= 2, "the help")
        type_("/nonsense")
        wait_until(lambda: b"no command is named /nonsense" in screen, "the unknown command to be named")
        type_("go on")
        wait_until(lambda: screen.count(b"word ") > 3, "the answer to begin")
        os.kill(chat.pid, signal.SIGINT)
        wait_until(lambda: b"answer stopped" in screen, "the answer to stop")
        type_("hello")
        wait_until(lambda: b"the answer was cut" in screen, "the cut answer to be told")
        type_("/bye")
        assert chat.wait(30) == 0
        os.close(ours)
    server.shutdown()
    assert [[message["content"] for message in messages] for messages in _Endpoint.asked] == [["go on"], ["hello"]]
