"""Artifacts that were built, behind a Protocol."""
