"""Artifacts on disk, content-addressed, and the crash-safe journal."""
