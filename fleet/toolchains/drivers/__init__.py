"""One driver a toolchain, and the process that each runs in."""
