"""Health: percentiles, limits, and a verdict that one bad minute does not sway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.failures import FailureCode
from agent.contract.profile import HealthLimits
from agent.core.health import HealthWindow, Judge, Sample, Verdict, Vitals, breach, percentile


def vitals(**more: object) -> Vitals:
    fields: dict[str, object] = {
        "requests": 10, "errors": 0, "ttft_ms_p50": 20.0, "ttft_ms_p95": 40.0, "tpot_ms_p50": 10.0,
        "tpot_ms_p95": 15.0, "tokens_per_s": 100.0, "restarts": 0, "memory_bytes": 1000,
    }  # fmt: skip
    return Vitals(**(fields | more))  # type: ignore[arg-type]


LIMITS = HealthLimits(
    ttft_ms_p95=100, tokens_per_s_min=50, error_rate_max=0.1, worker_restarts_max=1, memory_bytes_max=2000
)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, None),
        ({"ttft_ms_p95": 101.0}, FailureCode.HEALTH_TTFT),
        ({"tokens_per_s": 49.0}, FailureCode.HEALTH_SPEED),
        ({"errors": 2}, FailureCode.HEALTH_ERRORS),
        ({"restarts": 2}, FailureCode.HEALTH_RESTARTS),
        ({"memory_bytes": 2001}, FailureCode.HEALTH_MEMORY),
        ({"requests": 2, "errors": 2}, None),
        ({"requests": 0, "ttft_ms_p95": None, "tokens_per_s": None, "memory_bytes": 9999}, FailureCode.HEALTH_MEMORY),
    ],
)
def test_each_limit_has_its_code_and_tells_both_numbers(change: dict[str, object], code: FailureCode | None):
    found = breach(vitals(**change), LIMITS)
    assert (found.code if found else None) is code
    if found:
        assert any(letter.isdigit() for letter in found.message)


def test_no_limits_no_verdict_on_speed():
    assert breach(vitals(ttft_ms_p95=1e9, tokens_per_s=0.001, memory_bytes=10**12), HealthLimits()) is None


def test_three_bad_windows_condemn_and_two_good_ones_acquit():
    judge = Judge()
    seen = []
    for errors in (0, 5, 5, 0, 0, 5, 5, 5, 0, 0):
        judge = judge.judge(vitals(errors=errors), LIMITS)
        seen.append(judge.verdict.value)
    assert seen == [
        "healthy", "suspect", "suspect", "suspect", "healthy",
        "suspect", "suspect", "unhealthy", "unhealthy", "healthy",
    ]  # fmt: skip


def test_nothing_asked_is_unknown_not_healthy():
    assert Judge().judge(vitals(requests=0, ttft_ms_p95=None), LIMITS).verdict is Verdict.UNKNOWN


def test_samples_leave_the_window():
    window = HealthWindow(seconds=10)
    window.add(Sample(at=0, ttft_ms=500, tpot_ms=50, tokens=9))
    window.add(Sample(at=8, ttft_ms=100, tpot_ms=10, tokens=9))
    window.restarted(at=0)
    assert window.vitals(now=9).requests == 2
    late = window.vitals(now=12)
    assert (late.requests, late.restarts, late.ttft_ms_p95, late.tokens_per_s) == (1, 0, 100, 100)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_one_of_the_values_and_at_least_its_share_lies_below(values: list[float], share: float):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * share / 100 - 1e-6
