"""`python -m fleet` and the `phifleet` command: the commands are in ``fleet/cli``."""

from __future__ import annotations

from fleet.cli.main import main

if __name__ == "__main__":
    main()
