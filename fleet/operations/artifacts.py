"""Withdrawing artifacts: what is withdrawn is not published again by the next order that names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.contract.manifest import Manifest
from fleet.errors import ConflictError, UsageError
from fleet.operations.fleet import Fleet
from fleet.registry import Actor


def withdraw_artifact(fleet: Fleet, digest: str, reason: str | None, actor: Actor) -> str:
    """Take an artifact out of the signed targets, and refuse to publish it until it is reinstated.

    ``digest`` may be the beginning of one. Returns the whole digest.

    Raises:
        UsageError: no published artifact, or more than one, has a digest that begins so.
        RepositoryError: the targets cannot be signed; nothing is recorded then.
    """
    published = set(fleet.repository.published())
    found = _one(digest, published | set(fleet.registry.artifacts.withdrawals()))
    if found in published:
        fleet.repository.withdraw(found)
    fleet.registry.artifacts.withdraw(found, reason, actor)
    return found


def reinstate_artifact(fleet: Fleet, digest: str, actor: Actor) -> str:
    """Let an artifact be published again by the next order that names it. Returns the whole digest.

    Raises:
        UsageError: no withdrawn artifact, or more than one, has a digest that begins so.
    """
    found = _one(digest, fleet.registry.artifacts.withdrawals())
    fleet.registry.artifacts.reinstate(found, actor)
    return found


def refuse_withdrawn(fleet: Fleet, artifacts: Sequence[Manifest]) -> None:
    """Before anything is signed.

    Raises:
        UsageError: one of the artifacts was withdrawn; says when, by whom, why, and how that is taken back.
    """
    withdrawn = fleet.registry.artifacts.withdrawals()
    for manifest in artifacts:
        if (row := withdrawn.get(manifest.digest)) is not None:
            why = f" ({row.reason})" if row.reason else ""
            raise ConflictError(
                f"{manifest.id} was withdrawn on {row.at:%Y-%m-%d %H:%M} UTC by {row.who}{why}; "
                f"`phifleet trust reinstate {manifest.digest[:12]}` allows it again"
            )


def publish(fleet: Fleet, artifacts: Sequence[Manifest], actor: Actor, forced: str | None = None) -> None:
    """Sign artifacts for devices, all of them or none; ``forced`` says why in spite of what does not fit.

    Raises:
        StoreError: an artifact's files are not what was built.
        RepositoryError: it cannot be signed.
    """
    published = fleet.repository.published()
    for manifest in artifacts:
        if manifest.digest not in published:
            fleet.artifacts.verify(manifest)
    for manifest in artifacts:
        fleet.repository.publish(manifest, fleet.artifacts.index(manifest))
        fleet.registry.artifacts.record(manifest, actor, forced=forced)


def _one(digest: str, known: Iterable[str]) -> str:
    found = [each for each in sorted(known) if each.startswith(digest)]
    if len(found) != 1:
        raise UsageError(f"{digest!r} is the beginning of {len(found)} digests, not of one")
    return found[0]
