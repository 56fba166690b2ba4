"""The gate's error rates, by simulation of whole waves that are looked at after every report."""

from __future__ import annotations

import itertools
import math
import random
from types import MappingProxyType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.core.evidence import (
    Figures,
    Gate,
    GroupEvidence,
    Metric,
    Signs,
    _at_least,
    compare,
    detectable,
    e_value,
    failure_e_value,
    judge,
)

GATE = Gate()


def pair(draw: random.Random, slower: float, noise: float) -> tuple[Figures, Figures]:
    """One device: noise on each side, and one pair in twenty disturbed by something else."""
    base = draw.uniform(5, 200)
    disturbed = math.exp(draw.gauss(0, 0.3)) if draw.random() < 0.05 else 1.0
    before, after = (base * math.exp(draw.gauss(0, noise)) for _ in range(2))
    ttft = 10 * base
    return (
        Figures(20, 0, ttft * math.exp(draw.gauss(0, noise)), before),
        Figures(20, 0, ttft * math.exp(draw.gauss(0, noise)), after * (1 + slower) * disturbed),
    )


def stopped(draw: random.Random, slower: dict[str, float], devices: int, noise: float = 0.05) -> bool:
    """One wave over several profiles, judged after each report, as the controller does."""
    evidence = {name: GroupEvidence() for name in slower}
    for _ in range(devices):
        for name, effect in slower.items():
            evidence[name] = evidence[name].with_pair(*pair(draw, effect, noise), GATE)
            evidence[name] = evidence[name].with_outcomes([draw.random() < 0.01], GATE)
        if judge(evidence, GATE).stop:
            return True
    return False


def share(count: int, seed: int, slower: dict[str, float], devices: int, noise: float = 0.05) -> float:
    draw = random.Random(seed)
    return sum(stopped(draw, slower, devices, noise) for _ in range(count)) / count


@pytest.mark.thorough
@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_a_healthy_rollout_is_stopped_in_at_most_one_of_a_hundred(noise: float):
    assert share(1000 if noise < 0.1 else 400, 1, {"pi-5": 0.0, "copilot-pc": 0.0}, 30, noise) <= 0.01


@pytest.mark.thorough
def test_at_the_margin_itself_it_is_still_at_most_one_of_a_hundred():
    assert share(400, 2, {"pi-5": GATE.margin}, 60) <= 0.01


@pytest.mark.thorough
def test_a_fifth_slower_on_one_profile_stops_in_the_first_wave_of_thirty():
    assert share(1000, 3, {"pi-5": 0.2, "copilot-pc": 0.0}, 30) >= 0.99


@pytest.mark.thorough
def test_a_slow_profile_is_found_because_profiles_are_judged_apart():
    draw = random.Random(4)
    mixed = 0
    for _ in range(200):
        group = GroupEvidence()
        for index in range(60):
            group = group.with_pair(*pair(draw, 0.2 if index % 4 == 0 else 0.0, 0.05), GATE)
        mixed += judge({"all": group}, GATE).stop
    assert mixed / 200 < 0.1, "a quarter of the devices hides among the others"
    assert share(200, 5, {"slow": 0.2, "a": 0.0, "b": 0.0, "c": 0.0}, 30) >= 0.97


@pytest.mark.thorough
def test_what_the_plan_says_can_be_found_is_found():
    for devices in (10, 20, 30, 100):
        effect = detectable(devices, GATE)
        if effect is not None:
            assert share(300, devices, {"pi-5": effect}, devices) >= 0.8, (devices, effect)
    assert detectable(7, GATE) is None, "too few devices to judge"
    found = [detectable(devices, GATE) or math.inf for devices in (8, 20, 30, 100)]
    assert found == sorted(found, reverse=True), "more devices see more"
    assert found[2] <= 0.2


def test_a_wave_of_any_size_can_be_planned() -> None:
    """The ways to choose a thousand of two thousand devices fit into no float."""
    found = [detectable(devices, GATE) for devices in (1_000, 2_000, 10_000, 100_000)]
    assert all(one is not None and one <= 0.1 for one in found)
    assert found == sorted(found, key=lambda one: -(one or 0))


@example(needed=1, devices=0, chance=1.0)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 1))
def test_the_chance_of_a_tail_is_that_of_all_ways_together(needed: int, devices: int, chance: float) -> None:
    ways = sum(math.comb(devices, k) * chance**k * (1 - chance) ** (devices - k) for k in range(needed, devices + 1))
    assert _at_least(needed, devices, chance) == pytest.approx(ways, abs=1e-9)


@given(st.integers(1, 400))
def test_the_more_devices_are_worse_the_larger_the_evidence(devices: int) -> None:
    found = [e_value(Signs(worse, devices - worse)) for worse in range(devices + 1)]
    assert all(earlier <= later * (1 + 1e-9) for earlier, later in itertools.pairwise(found))


@pytest.mark.thorough
def test_a_healthy_share_of_failures_does_not_stop_it_and_a_large_one_does():
    draw = random.Random(6)

    def stops(chance: float) -> bool:
        group = GroupEvidence()
        for _ in range(200):
            group = group.with_outcomes([draw.random() < chance], GATE)
            if judge({"x": group}, GATE).stop:
                return True
        return False

    assert sum(stops(GATE.healthy_failure_share) for _ in range(500)) / 500 <= 0.01
    assert sum(stops(0.15) for _ in range(100)) >= 99


def test_three_of_the_first_five_stop_it_at_once_and_say_so():
    group = GroupEvidence().with_outcomes([True, False, True], GATE)
    assert not judge({"pi-5": group}, Gate(cap_of=5, healthy_failure_share=0.4)).stop
    verdict = judge({"pi-5": group.with_outcomes([True], GATE)}, Gate(healthy_failure_share=0.4))
    assert verdict.stop
    assert verdict.reasons[0].startswith("pi-5: 3 of 4 deployments failed, 3 of the first 4; e = ")


def test_the_reason_is_a_sentence_with_its_figures():
    group = GroupEvidence(MappingProxyType({Metric.TPOT: Signs(17, 1)}))
    (reason,) = judge({"pi-5, int4": group}, GATE).reasons
    assert reason.startswith("pi-5, int4: 17 of 18 devices are over 5% slower per token than before; e = ")
    few = judge({"pi-5": GroupEvidence(MappingProxyType({Metric.TPOT: Signs(7, 0)}))}, Gate(alpha=0.4))
    assert not few.stop, "fewer pairs than the gate wants"


@given(st.integers(0, 400), st.integers(0, 400))
def test_evidence_is_a_number_and_grows_with_each_worse_device(worse: int, better: int):
    e = e_value(Signs(worse, better))
    assert e > 0
    assert e_value(Signs(worse + 1, better)) >= e * 0.999
    assert e_value(Signs(worse, better + 1)) <= e
    assert e_value(Signs(0, better)) <= 1 + 1e-9


@given(st.integers(1, 30))
def test_a_fair_coin_wins_nothing_on_average(pairs: int):
    expected = sum(
        math.comb(pairs, worse) * 0.5**pairs * e_value(Signs(worse, pairs - worse)) for worse in range(pairs + 1)
    )
    assert expected == pytest.approx(1.0)


@given(st.integers(1, 40), st.floats(0.001, 0.4))
def test_a_healthy_fleet_wins_nothing_on_average(ended: int, healthy: float):
    expected = sum(
        math.comb(ended, failed)
        * healthy**failed
        * (1 - healthy) ** (ended - failed)
        * failure_e_value(failed, ended, healthy)
        for failed in range(ended + 1)
    )
    assert expected == pytest.approx(1.0)


hostile = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e300, 5e-324]))
figures = st.builds(Figures, st.integers(0, 2**53), st.integers(0, 2**53), hostile, hostile, st.integers(0, 2**53))


@given(figures, figures)
def test_no_figure_of_any_device_breaks_the_gate(before: Figures, after: Figures):
    assert set(compare(before, after, GATE)) <= set(Metric)
    judge({"x": GroupEvidence().with_pair(before, after, GATE)}, GATE)


def test_too_few_requests_on_a_side_are_no_comparison():
    assert compare(Figures(4, 0, 10, 10), Figures(100, 0, 99, 99), GATE) == {}
    assert compare(Figures(100, 0, 10, 10), Figures(4, 0, 99, 99), GATE) == {}
    assert compare(Figures(5, 0, 10, 10, 1), Figures(5, 5, 99, 9, 2), GATE) == {
        Metric.TTFT: Signs(1, 0),
        Metric.TPOT: Signs(0, 1),
        Metric.ERRORS: Signs(1, 0),
        Metric.RESTARTS: Signs(1, 0),
    }
