"""`phifleet artifacts delta`."""

from __future__ import annotations

import json

from fleet.home import Home
from fleet.store import FolderStore
from tests.agent.store.test_delta import put, trained
from tests.fleet.cli.conftest import Phifleet
from tests.simulators.artifacts import noise


def test_it_makes_one_shows_it_and_says_what_is_wrong(phifleet: Phifleet) -> None:
    store = FolderStore(Home(phifleet.home).artifacts)
    old, new = (put(store, {"weights": trained(noise(600_000, 5), seed)}, f"v{seed}") for seed in (1, 2))
    told = phifleet("artifacts", "delta", new.id, "--from", old.digest[:12], "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert (found["artifact"], found["base"], found["artifact_bytes"]) == (new.id, old.id, new.size)
    assert 0 < found["bytes"] < new.size
    assert f"delta                from {old.id}, " in phifleet("artifacts", "show", new.id).out
    assert "`phifleet deploy` it" in phifleet("artifacts", "delta", new.id, "--from", old.id).out
    assert "devices may as well fetch it whole" in phifleet("artifacts", "delta", new.id).err
    text = put(store, {"tokenizer.json": b"a token, " * 50_000}, "text")
    assert "compressed: 0.0 MB of 0.5 MB" in phifleet("artifacts", "delta", text.id).out
    missing = phifleet("artifacts", "delta", new.id, "--from", "no-such")
    assert missing.code != 0 and "no artifact is named no-such" in missing.err
    assert (
        "devices may as well fetch it whole"
        in phifleet("artifacts", "delta", new.id, "--from", put(store, {"weights": noise(600_000, 9)}, "other").id).err
    )
