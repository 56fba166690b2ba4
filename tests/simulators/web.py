"""Debian's nginx with folders to serve, alone or before another as a site's cache."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.simulators.broker import free_port
from tests.waiting import wait_until

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
HAVE = Path(NGINX).exists()


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer: its status, and the bytes of its body."""

    status: int
    size: int


@dataclass(frozen=True, slots=True)
class Web:
    port: int
    log: Path

    @property
    def template(self) -> str:
        return f"http://127.0.0.1:{self.port}/{{digest}}/{{path}}"

    def sent(self) -> list[Sent]:
        """What it has sent so far."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [Sent(*map(int, line.split())) for line in lines]


@contextmanager
def nginx(folder: Path, *, root: Path | None = None, before: Web | None = None) -> Iterator[Web]:
    """Serves the files below ``root``, or keeps what it is asked for of ``before``; ``folder`` is made."""
    folder.mkdir(parents=True)
    port, log = free_port(), folder / "access.log"
    place = f"root {root};"
    if before is not None:
        place = f"""
            location / {{
                slice 1m; proxy_cache site; proxy_cache_key $uri$slice_range; proxy_cache_valid 200 206 30d;
                proxy_set_header Range $slice_range; proxy_http_version 1.1; proxy_cache_lock on;
                proxy_pass http://127.0.0.1:{before.port};
            }}
        """
    (folder / "nginx.conf").write_text(f"""
        pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; user root;
        events {{}}
        http {{
            log_format sizes '$status $body_bytes_sent';
            access_log {log} sizes;
            proxy_cache_path {folder}/cache keys_zone=site:1m max_size=1g;
            server {{ listen 127.0.0.1:{port}; {place} }}
        }}
    """)
    running = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        wait_until((folder / "nginx.pid").exists, "nginx runs")
        yield Web(port, log)
    finally:
        running.terminate()
        running.wait(10)
