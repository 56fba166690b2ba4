"""Newer, older, cloned: what is kept when messages come late, twice, out of order and from two agents."""

from __future__ import annotations

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from agent.contract.messages import Boot
from fleet.core.boots import RIVAL_MESSAGES, Judged, Note, Runs, judge

A, B, C = ("a" * 16, "b" * 16, "c" * 16)


def boot(run: str, number: int, counter: int | None) -> Boot:
    return Boot(id=run, number=number, counter=counter)


def say(
    runs: Runs, run: str, number: int, counter: int | None, topic: str = "reported", *, live: bool = True, at: float = 0
) -> Judged:
    return judge(runs, boot(run, number, counter), topic, live=live, at=at)


@given(st.permutations(range(8)), st.integers(0, 2**53 - 1))
def test_whatever_the_order_the_newest_of_each_topic_is_kept(order: list[int], number: int):
    runs, kept = Runs(), {}
    for counter in [*order, *order]:
        topic = ("presence", "reported")[counter % 2]
        judged = say(runs, A, number, counter, topic)
        runs = judged.runs
        if judged.newer:
            kept[topic] = counter
    assert kept == {"presence": 6, "reported": 7}


def test_the_run_with_the_higher_number_is_the_newer_one():
    runs = say(Runs(), A, 100, 50).runs
    judged = say(runs, B, 101, 1)
    assert judged.newer and judged.runs.id == B
    assert not say(judged.runs, A, 100, 51).newer, "what the old run had under way comes late"


def test_the_will_of_an_earlier_run_does_not_take_the_new_one_offline():
    runs = say(Runs(), A, 100, 50, "presence").runs
    assert say(runs, A, 100, None, "presence").newer
    runs = say(runs, B, 101, 1, "presence").runs
    assert not say(runs, A, 100, None, "presence").newer
    assert say(runs, B, 101, None, "presence").newer


def test_two_agents_that_both_go_on_speaking_are_a_clone_and_are_told_once():
    runs, notes = say(Runs(), B, 200, 1, at=0).runs, []
    for turn in range(1, 20):
        for judged in (say(runs, A, 100, turn, at=turn * 10),):
            assert not judged.newer, "the higher number is believed"
            runs = judged.runs
            notes.append(judged.note)
        runs = say(runs, B, 200, turn + 1, at=turn * 10 + 5).runs
    assert [note for note in notes if note] == [Note.CLONED]
    assert runs.cloned_at is not None
    assert runs.id == B


def test_a_few_late_messages_of_the_run_before_are_no_clone():
    runs = say(say(Runs(), A, 100, 1, at=0).runs, B, 101, 1, at=1).runs
    for turn in range(20):  # all within a moment, as a queue that was held up lets them go
        judged = say(runs, A, 100, 2 + turn, at=2 + turn / 100)
        runs = say(judged.runs, B, 101, 2 + turn, at=2 + turn / 100).runs
        assert judged.note is None and not judged.newer
    assert runs.cloned_at is None


def test_a_device_whose_numbers_begin_anew_is_believed_again_when_the_old_run_is_silent():
    runs, turn = say(Runs(), A, 1_764_000_000_000, 9, at=0).runs, 0
    while runs.id == A:
        turn += 1
        assert turn < 50, "it would never be heard again"
        judged = say(runs, B, 3, turn, at=1000 + turn * 10)
        runs = judged.runs
    assert judged.newer and judged.note is Note.RENUMBERED
    assert turn >= RIVAL_MESSAGES
    assert say(runs, B, 3, turn + 1, at=2000).newer


def test_what_the_broker_had_retained_never_makes_a_rival():
    runs = say(Runs(), B, 200, 1, at=0).runs
    for turn in range(20):
        judged = say(runs, A, 100, turn, live=False, at=turn * 10)
        assert judged == Judged(False, runs)


def test_an_agent_of_the_first_release_is_taken_at_its_word():
    assert judge(Runs(), None, "facts", live=False, at=0).newer
    runs = say(Runs(), A, 100, 1).runs
    assert judge(runs, None, "facts", live=True, at=0).newer, "it was downgraded"
    assert not judge(runs, None, "facts", live=False, at=0).newer, "that is from before the upgrade"


@given(st.randoms(use_true_random=False))
def test_what_is_remembered_survives_being_stored(draw: random.Random):
    runs = Runs()
    for step in range(60):
        run, number = draw.choice([(A, 1), (B, 2), (C, 2)])
        counter = draw.choice([None, step])
        judged = say(
            runs, run, number, counter, draw.choice(["presence", "health"]), live=draw.random() < 0.8, at=step * 9
        )
        assert Runs.from_json(json.loads(json.dumps(judged.runs.to_json()))) == judged.runs
        assert judged.runs.number >= runs.number or judged.note is Note.RENUMBERED
        runs = judged.runs
