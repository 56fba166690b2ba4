"""The wire contract, version 1: everything the agent and the fleet say to each other.

A leaf package: pure data and pure functions, no IO. `docs/protocol.md` is generated from it.
"""
