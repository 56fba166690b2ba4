from __future__ import annotations

import os

#: It takes minutes and needs root, debootstrap and systemd-nspawn: `make test-bare` runs it.
collect_ignore = [] if os.environ.get("PHIFLEET_BARE_TESTS") else ["test_on_bare_debian.py"]
