"""A stick, read: the order for this device, metadata by name, chunks by number."""

from __future__ import annotations

from pathlib import Path

from agent.contract.base import MalformedMessageError
from agent.contract.chunk_index import Layout, index_content
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.stick import ARTIFACTS, INDEX, INDEXES, METADATA, ORDERS, StickIndex
from agent.errors import AgentError
from agent.platform.files import reason


class StickError(AgentError):
    """The stick cannot be used; the text says why, and what to do."""

    default_code = FailureCode.TRANSFER_UNAVAILABLE


class Stick:
    """Opened, and found whole by its index. Blocking; every read may raise ``StickError``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents: dict[str, tuple[list[Path], Layout]] = {}
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
        """Return a chunk of an artifact or an index, None where the stick has no such one."""
        if digest not in self._contents:
            found = self._artifact(digest) or self._index(digest)
            if found is None:
                return None
            self._contents[digest] = found
        paths, layout = self._contents[digest]
        if number >= len(layout):
            return None
        place = layout.place(number)
        try:
            with paths[place.file].open("rb") as source:
                source.seek(place.offset)
                return source.read(layout.sizes[number])
        except OSError as error:
            raise self._unreadable(error) from error

    def _artifact(self, digest: str) -> tuple[list[Path], Layout] | None:
        manifest = self._manifest(digest)
        if manifest is None:
            return None
        packed = self._read(f"{INDEXES}/{manifest.index.sha256}") if manifest.index else None
        try:
            layout = Layout(manifest.files, packed)
        except ValueError as error:
            raise StickError(f"the stick's index of artifact {digest[:12]} is damaged: {error}") from None
        return [self.folder / ARTIFACTS / digest / file.path for file in manifest.files], layout

    def _index(self, digest: str) -> tuple[list[Path], Layout] | None:
        for name in self._names:
            manifest = self._manifest_in(name) if name.startswith(f"{METADATA}/targets/indexed/") else None
            content = index_content(manifest) if manifest is not None else None
            if content is not None and content.digest == digest:
                return [self.folder / INDEXES / digest], Layout(content.files)
        return None

    def _manifest(self, digest: str) -> Manifest | None:
        name = next((name for name in sorted(self._names, reverse=True) if name.endswith(f".{digest}.json")), "")
        return self._manifest_in(name)

    def _manifest_in(self, name: str) -> Manifest | None:
        """Of what the stick says itself; the device compares each chunk with the manifest that is signed."""
        data = self._read(name)
        if data is None:
            return None
        try:
            return Manifest.from_json(data)
        except MalformedMessageError as error:
            digest = name.split(".")[-2]
            raise StickError(f"the stick's manifest of artifact {digest[:12]} is damaged: {error}") from None

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
