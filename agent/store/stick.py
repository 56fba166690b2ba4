"""A stick, read: the order for this device, metadata by name, chunks by number."""

from __future__ import annotations

from pathlib import Path

from agent.contract.base import MalformedMessageError
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.stick import ARTIFACTS, INDEX, METADATA, ORDERS, StickIndex
from agent.core.chunks import ChunkTable
from agent.errors import AgentError
from agent.platform.files import reason


class StickError(AgentError):
    """The stick cannot be used; the text says why, and what to do."""

    default_code = FailureCode.TRANSFER_UNAVAILABLE


class Stick:
    """Opened, and found whole by its index. Blocking; every read may raise ``StickError``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifests: dict[str, tuple[Manifest, ChunkTable]] = {}
        try:
            data = (folder / INDEX).read_bytes()
        except FileNotFoundError:
            raise StickError(
                f"{folder} is no stick, or was not written to its end: it has no {INDEX}. Write it again with "
                "`phifleet stick write`"
            ) from None
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self.index = StickIndex.from_json(data)
        except MalformedMessageError as error:
            raise StickError(f"{folder / INDEX} is damaged: {error}; write the stick again") from None
        self._names = {file.path for file in self.index.files}
        self._compare()

    def order(self, device: str) -> bytes:
        """Return the signed order for a device."""
        data = self._read(f"{ORDERS}/{device}.json")
        if data is None:
            there = sorted(self.index.devices)
            more = f" and {len(there) - 10} more" if len(there) > 10 else ""
            raise StickError(
                f"the stick has no order for {device}; it has some for {', '.join(there[:10]) or 'no device'}{more}"
            )
        return data

    def metadata(self, name: str) -> bytes | None:
        """Return a metadata file, None where the stick has none of this name."""
        return self._read(f"{METADATA}/{name}")

    def chunk(self, digest: str, number: int) -> bytes | None:
        """Return a chunk of an artifact, None where the stick has no such one."""
        if digest not in self._manifests:
            found = self._manifest(digest)
            if found is None:
                return None
            self._manifests[digest] = found
        manifest, table = self._manifests[digest]
        if number >= len(table):
            return None
        place = table.places(table.first[number])[0]
        path = self.folder / ARTIFACTS / digest / manifest.files[place.file].path
        try:
            with path.open("rb") as source:
                source.seek(place.offset)
                return source.read(table.sizes[number])
        except OSError as error:
            raise self._unreadable(error) from error

    def _manifest(self, digest: str) -> tuple[Manifest, ChunkTable] | None:
        """Of what the stick says itself; the device compares each chunk with the manifest that is signed."""
        name = next((name for name in self._names if name.endswith(f".{digest}.json")), "")
        data = self._read(name)
        if data is None:
            return None
        try:
            manifest = Manifest.from_json(data)
        except MalformedMessageError as error:
            raise StickError(f"the stick's manifest of artifact {digest[:12]} is damaged: {error}") from None
        return manifest, ChunkTable(manifest)

    def _compare(self) -> None:
        """Whether every file is there in its full size: a copy that was cut short is the usual fault."""
        for file in self.index.files:
            try:
                size = (self.folder / file.path).stat().st_size
            except FileNotFoundError:
                size = 0
            except OSError as error:
                raise self._unreadable(error) from error
            if size != file.size:
                raise StickError(
                    f"the stick is not whole: {file.path} has {size} of {file.size} bytes; copy or write it again"
                )

    def _read(self, name: str) -> bytes | None:
        if name not in self._names:
            return None
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> StickError:
        return StickError(
            f"the stick {self.folder} cannot be read: {reason(error, self.folder)}. The agent reads it as its own "
            "user: mount it so that others may read it, and leave it in until the device is done"
        )
