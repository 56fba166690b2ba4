"""Which program is at the other end of a connection, so that those on this machine take turns."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
#: Linux's struct ucred: process, user and group.
_UCRED = struct.Struct("3i")


async def program_at(transport: asyncio.BaseTransport) -> str:
    """Return a name for the program: its process where the system tells, else its user, else its connection or address.

    A look into ``/proc`` takes milliseconds, so it runs in a thread; callers keep the answer for the connection.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        return "unknown"
    if sock.family == getattr(socket, "AF_UNIX", None):
        return _unix_peer(sock) or f"connection {id(transport)}"
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not peer or not own:
        return "unknown"
    if not _is_loopback(peer[0]):
        return str(peer[0])
    return await asyncio.to_thread(_loopback_peer, peer[1], own[1]) or f"connection {peer[0]}:{peer[1]}"


def _unix_peer(sock: Any) -> str | None:
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    try:
        process, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    return f"process {process}" if process > 0 else f"user {user}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _loopback_peer(peer_port: int, own_port: int) -> str | None:
    """By Linux's tables of sockets; None where there are none, or the connection is not in them."""
    for user, inode in _sockets(peer_port, own_port):
        process = _holder(user, inode)
        return f"process {process}" if process is not None else f"user {user}"
    return None


def _sockets(peer_port: int, own_port: int) -> Iterator[tuple[int, str]]:
    """User and inode of the sockets that go from the peer's port to ours."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (_PROC / "net" / table).read_text("ascii").splitlines()[1:]:
                fields = line.split()
                if _port(fields[1]) == peer_port and _port(fields[2]) == own_port:
                    yield int(fields[7]), fields[9]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _holder(user: int, inode: str) -> int | None:
    """Return the process that has the socket open; None where we may not look into it."""
    wanted = f"socket:[{inode}]"
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if folder.stat().st_uid == user and any(_points_to(fd, wanted) for fd in (folder / "fd").iterdir()):
                return int(folder.name)
    return None


def _points_to(link: Path, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(link) == wanted  # noqa: PTH115 - it is no path
    return False
