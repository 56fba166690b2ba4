"""Where a sequence goes: what it finds there is its beginning; without much of that it goes to neighbours."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from agent.runtimes.engines.slots import LEAST_PIECE, WORTH_COPYING, WORTH_KEEPING, choose, piece_of


@dataclass
class Place:
    number: int
    tokens: list[int] = field(default_factory=list)
    used: int = 0
    sequence: str | None = None


def places(*at_work: int, count: int = 8, **tokens: list[int]) -> list[Place]:
    """``p3=[...]``: what place 3 holds; the higher the number, the later it was left."""
    return [
        Place(number, tokens.get(f"p{number}", []), number, "at work" if number in at_work else None)
        for number in range(count)
    ]


BEGINNING = list(range(200))
PROMPT = [*BEGINNING, 7, 7, 7]


def test_idle_the_one_left_longest_ago():
    assert choose(places(), PROMPT).slot.number == 0


def test_beside_those_at_work_and_into_gaps():
    assert choose(places(4), PROMPT).slot.number in (3, 5)
    assert choose(places(2, 4), PROMPT).slot.number in (1, 3, 5)
    assert choose(places(0, 1, 2), PROMPT).slot.number == 3


def test_what_every_prompt_begins_with_is_no_reason_to_go_far():
    few = places(0, 1, p7=BEGINNING[: WORTH_KEEPING - 1])
    assert choose(few, PROMPT).slot.number == 2
    many = places(0, 1, p7=BEGINNING)
    chosen = choose(many, PROMPT)
    assert (chosen.slot.number, chosen.shared, chosen.donor) == (7, len(BEGINNING), None)


def test_a_long_beginning_of_one_at_work_is_copied_to_a_neighbour():
    chosen = choose(places(3, p3=[*BEGINNING, 9]), PROMPT)
    assert chosen.donor is not None
    assert (chosen.donor.number, chosen.shared) == (3, len(BEGINNING))
    assert chosen.slot.number in (2, 4)


def test_the_end_is_always_computed():
    chosen = choose(places(p5=[*PROMPT, 1, 2]), PROMPT)
    assert (chosen.slot.number, chosen.shared) == (5, len(PROMPT) - LEAST_PIECE)
    assert choose(places(p5=[1, 2]), [1]).shared == 0


@given(st.integers(1, 3000), st.lists(st.integers(1, 600), min_size=1, max_size=8))
def test_no_piece_of_a_prompt_is_a_single_token(length: int, rooms: list[int]):
    missing, waited = length, 0
    for room in itertools.cycle(rooms):
        size = piece_of(missing, room)
        assert 0 <= size <= room
        assert size != 1 or length == 1
        missing -= size
        waited = waited + 1 if size == 0 else 0
        assert missing != 1
        if missing == 0 or waited > len(rooms):
            break
    assert missing == 0 or max(rooms) < 3, "with room for three it comes to its end"


texts = st.lists(st.integers(0, 1), max_size=6).map(lambda bits: [bit for bit in bits for _ in range(40)])


@given(st.lists(st.tuples(texts, st.booleans(), st.integers(0, 9)), min_size=1, max_size=8), texts.filter(len))
def test_what_is_shared_is_the_prompts_own_beginning(held: list[tuple[list[int], bool, int]], prompt: list[int]):
    slots = [Place(n, tokens, used, "x" if busy else None) for n, (tokens, busy, used) in enumerate(held)]
    if all(slot.sequence for slot in slots):
        slots[0].sequence = None
    chosen = choose(slots, prompt)
    source = chosen.donor or chosen.slot
    assert chosen.slot.sequence is None
    assert 0 <= chosen.shared < len(prompt)
    assert source.tokens[: chosen.shared] == prompt[: chosen.shared]
    if chosen.donor is not None:
        assert chosen.donor is not chosen.slot
        assert chosen.shared > WORTH_COPYING
