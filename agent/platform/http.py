"""How both programs ask an HTTP API that is given a secret."""

from __future__ import annotations

import ssl
import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token goes where it was sent, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """Return what opens URLs and follows no redirect; ``context`` None: TLS as the system has it."""
    secure = [urllib.request.HTTPSHandler(context=context)] if context is not None else []
    return urllib.request.build_opener(*secure, _NoRedirects())
