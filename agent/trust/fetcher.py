"""python-tuf's fetcher, over the link: ngclient runs in a thread, the link on the event loop.

Imports tuf, so it is imported when something is verified, not when the daemon starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from agent.errors import TrustError
from agent.trust.requests import MetadataRequests, NotFoundError, Segment

#: Where ngclient takes metadata and targets to be; the rest of the URL is the name that is asked for.
METADATA_URL = "metadata/"
TARGETS_URL = "targets/"


class LinkFetcher(FetcherInterface):
    """Each file is read segment by segment, no further than ngclient reads: its size caps hold."""

    def __init__(self, requests: MetadataRequests, loop: asyncio.AbstractEventLoop) -> None:
        self._requests = requests
        self._loop = loop
        self._stopped = False
        self._under_way: Future[Segment] | None = None

    def stop(self) -> None:
        """The download under way ends, and no other begins."""
        self._stopped = True
        if self._under_way is not None:
            self._under_way.cancel()

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(METADATA_URL)
        began, received, total = time.monotonic(), 0, 1
        while received < total:
            if self._requests.retry_policy.is_over(time.monotonic() - began, received):
                raise SlowRetrievalError(f"{name}: {received} of {total} bytes in {time.monotonic() - began:.0f} s")
            segment = self._segment(name, received)
            if received and segment.total != total:
                raise DownloadError(f"{name} changed from {total} to {segment.total} bytes while it came")
            total = segment.total
            received += len(segment.data)
            yield segment.data

    def _segment(self, name: str, offset: int) -> Segment:
        if self._stopped:
            raise DownloadError(f"{name}: given up")
        try:
            self._under_way = asyncio.run_coroutine_threadsafe(self._requests.segment(name, offset), self._loop)
            return self._under_way.result()
        except CancelledError:
            raise DownloadError(f"{name}: given up") from None
        except NotFoundError as error:
            raise DownloadHTTPError(str(error), 404) from error
        except TrustError as error:
            raise DownloadError(str(error)) from error
