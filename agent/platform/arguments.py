"""Options of a whole program, accepted before and after its command. Shared with fleet/."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def hoisted(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Return the arguments with every one of the ``options``, each of which takes a value, moved to the front.

    What follows ``--`` stays where it is, and so does an option at the end that lacks its value: its own error is told.
    """
    front: list[str] = []
    rest: list[str] = []
    left = list(arguments)
    while left:
        one = left.pop(0)
        if one == "--":
            rest += [one, *left]
            break
        name, equals, _ = one.partition("=")
        if name not in options or (not equals and not left):
            rest.append(one)
        elif equals:
            front.append(one)
        else:
            front += [one, left.pop(0)]
    return front + rest
