"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is up to the machine, and says nothing about the code.
settings.register_profile("phifleet")
settings.load_profile("phifleet")
