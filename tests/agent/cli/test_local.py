"""Commands of the person at the device: what is told is what is known, and a conversation survives Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from agent.cli.conversation import Conversation
from agent.cli.local import NotRunningError, _following, _whole_lines, ask
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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_is_told_as_whom_to_read_the_log():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # not below pytest's own folder
        folder = Path(name)
        (folder / "logs").mkdir(mode=0o700)
        (folder / "logs" / "agent.log").write_text("{}\n")
        folder.chmod(0o755)
        code = (
            "import os, sys; from agent.__main__ import main\n"
            "os.setgid(65534); os.setuid(65534); os.environ['HOME'] = '/nonexistent'\n"
            "sys.exit(main())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "--state-dir", name, "logs"], check=False, capture_output=True, text=True
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "may not be read by this user" in done.stderr and "sudo -u" in done.stderr


def rotating(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Writes a numbered line with the agent's own handler, which turns the file over every few lines."""
    monkeypatch.setattr(logs, "FILE_BYTES", 400)
    write = logs._file_writer(folder)  # what `configure` puts into structlog

    def line(number: int) -> None:
        write(None, "info", {"event": "line", "number": number, "filler": "ü" * 50})

    return line


def test_no_line_is_lost_when_the_log_is_rotated_twice_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, path = rotating(tmp_path, monkeypatch), tmp_path / "agent.log"
    write(0)
    number = 1
    files = {path.stat().st_ino}
    with path.open("rb") as source:
        found = _following(path, source)
        assert json.loads(next(found))["number"] == 0
        while len(files) < 3:
            write(number)
            files.add(path.stat().st_ino)
            number += 1
        assert [json.loads(next(found))["number"] for _ in range(number - 1)] == list(range(1, number))


def test_a_line_that_is_half_written_is_shown_once_and_whole(tmp_path: Path):
    path = tmp_path / "agent.log"
    text = "ü whole\n".encode()
    path.write_bytes(text[:1])  # in the middle of a character
    with path.open("rb") as source:
        assert not list(_whole_lines(source))
        with path.open("ab") as sink:
            sink.write(text[1:])
        assert list(_whole_lines(source)) == ["ü whole\n"]
        assert not list(_whole_lines(source))


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
        if body["messages"][-1]["content"] == "too long":
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "the prompt is too long"}}')
            return
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


class Terminal:
    """A chat on a terminal of its own, with what it has shown."""

    def __init__(self, state_dir: Path) -> None:
        self._ours, theirs = pty.openpty()
        # The first terminal that a session's leader opens controls it: Ctrl-C is then a signal, as for a person.
        tty = os.ttyname(theirs)
        program = [sys.executable, "-m", "agent", "--state-dir", str(state_dir), "chat"]
        command = ["sh", "-c", f'exec "$@" <{tty} >{tty} 2>&1', "sh", *program]
        self.process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"TERM": "xterm"})
        self._theirs = theirs
        self.screen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self._ours, 4096):
                self.screen.extend(piece)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def sees(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.screen.count(text.encode()) >= times, f"{text!r} on the screen")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self._theirs)
        self._reader.join(10)
        os.close(self._ours)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    _Endpoint.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = {"serving": {"model": "phi"}, "endpoint": f"http://127.0.0.1:{server.server_address[1]}"}
    with control(json.dumps(status).encode() + b"\n") as port:
        write_control(tmp_path, port)
        opened = Terminal(tmp_path)
        try:
            opened.sees("> ")
            yield opened
        finally:
            opened.close()
            server.shutdown()


def asked() -> list[list[str]]:
    return [[message["content"] for message in messages] for messages in _Endpoint.asked]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(terminal: Terminal):
    terminal.press("go on\n")
    terminal.sees("word ", 4)
    terminal.press("\x03")
    terminal.sees("answer stopped")
    terminal.press("hello\n")
    terminal.sees("the answer was cut")
    terminal.press("/bye\n")
    assert terminal.process.wait(30) == 0
    assert asked() == [["go on"], ["hello"]]


@pytest.mark.parametrize("keys", ["/bye\n", "/quit\n", "/exit\n", "\x04"])
def test_each_way_to_end_a_conversation(terminal: Terminal, keys: str):
    terminal.press(keys)
    assert terminal.process.wait(30) == 0
    assert not asked()


def test_commands_do_not_reach_the_model(terminal: Terminal):
    for number, command in enumerate(("/?", "/help", "/nonsense"), 2):
        terminal.press(command + "\n")
        terminal.sees("/clear forgets", number)
    terminal.sees("no command is named /nonsense")
    terminal.press("hello\n")
    terminal.sees("the answer was cut")
    terminal.press("/clear\n")
    terminal.sees("conversation is forgotten")
    terminal.press("again\n")
    terminal.sees("the answer was cut", 2)
    assert asked() == [["hello"], ["again"]]


def test_a_line_is_edited_and_repeated(terminal: Terminal):
    terminal.press("ello\x01h\n")  # Ctrl-A: to the begin of the line
    terminal.sees("the answer was cut")
    terminal.press("\x1b[A!\n")  # up: the line before
    terminal.sees("the answer was cut", 2)
    assert [question[-1] for question in asked()] == ["hello", "hello!"]


def test_a_refused_question_ends_no_conversation_and_is_forgotten(terminal: Terminal):
    terminal.press("too long\n")
    terminal.sees("the endpoint refuses: the prompt is too long")
    terminal.press("hello\n")
    terminal.sees("the answer was cut")
    assert asked() == [["too long"], ["hello"]]


@contextlib.contextmanager
def endpoint(reply: bytes) -> Iterator[str]:
    """An endpoint that sends these bytes to each request and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    request = connection.makefile("rb")  # read to its end: what is left unread resets the connection
                    length = 0
                    while (line := request.readline()).strip():
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                    request.read(length)
                    connection.sendall(reply)
                    request.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


PIECE = b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        OK + b"\r\n" + PIECE,
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(PIECE) + PIECE + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % (2 * len(PIECE)) + PIECE,
        OK + b"\r\n" + PIECE + b"data: {not json\n\n",
        b"no HTTP at all\r\n\r\n",
    ],
    ids=["closed", "a chunk is missing", "a chunk is cut", "no JSON", "no HTTP"],
)
def test_an_answer_that_breaks_off_is_never_shown_as_whole(reply: bytes):
    with endpoint(reply) as url:
        conversation = Conversation(url, "phi", None, 10, None)
        with pytest.raises(AgentError):
            list(conversation.say("hello"))


def test_a_whole_answer_needs_no_more_than_its_reason_to_end():
    with endpoint(OK + b"\r\n" + PIECE + END) as url:
        conversation = Conversation(url, "phi", None, 10, None)
        assert list(conversation.say("hello")) == ["half"] and not conversation.cut
