"""`make bench [BENCH="transfer idle"]`: runs the benchmarks named, or all; prints tables and writes JSON."""

from __future__ import annotations

import importlib
import json
import signal
import sys

from bench.figures import Figure, save, table

#: Each is a module of this package with ``figures() -> list[Figure]``.
BENCHMARKS = (
    "transfer", "large", "delta", "endpoint", "streams", "recovery", "update", "idle", "quantize", "loss", "loss_qnn",
    "demo", "fleet", "fleet_load", "dashboard",
)  # fmt: skip


def main(names: list[str]) -> int:
    """Run them one after the other: two at once would measure each other."""
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    everything: list[Figure] = []
    for name in names or BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        figures = importlib.import_module(f"bench.{name}").figures()
        print(table(figures), flush=True)
        save(name, figures)
        everything += figures
    missed = [figure.name for figure in everything if figure.holds is False]
    summary = {figure.name: round(figure.judged, 4) for figure in everything}
    print("\n" + json.dumps({"figures": summary, "targets_missed": missed}), flush=True)
    return 0


if __name__ == "__main__":
    # As Ctrl-C does: whoever began a broker, an agent or a controller ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted")
