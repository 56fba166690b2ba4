from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import MemoryNeed
from agent.core.memory import USABLE_SHARE, Placement, plan

_NEED = MemoryNeed(weights_bytes=500, kv_bytes_per_token=1, overhead_bytes=100)


@pytest.mark.parametrize(
    ("available", "held", "limit", "expected"),
    [
        (10_000, 0, None, Placement.BESIDE),
        (10_000, 800, None, Placement.BESIDE),
        (770, 800, None, Placement.SWAP),
        (700, 0, None, Placement.REFUSED),
        (300, 300, None, Placement.REFUSED),
        (10_000, 0, 699, Placement.REFUSED),
        (10_000, 0, 700, Placement.BESIDE),
    ],
)
def test_where_it_goes(available: int, held: int, limit: int | None, expected: Placement) -> None:
    chosen = plan(_NEED, context=100, sequences=4, available=available, held=held, limit=limit)
    assert chosen.placement is expected
    assert chosen.need_bytes == 700
    assert "needs" in chosen.sentence()


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 16), st.none() | st.integers(1, 10**6))
def test_the_cache_is_at_least_a_context_and_never_too_large(
    available: int, held: int, sequences: int, limit: int | None
) -> None:
    chosen = plan(_NEED, context=100, sequences=sequences, available=available, held=held, limit=limit)
    assert 100 <= chosen.kv_tokens <= 100 * sequences
    if chosen.placement is not Placement.REFUSED:
        room = available + (held if chosen.placement is Placement.SWAP else 0)
        assert _NEED.at_context(chosen.kv_tokens) <= room * USABLE_SHARE + 1
        assert limit is None or _NEED.at_context(chosen.kv_tokens) <= limit
