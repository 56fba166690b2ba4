"""Rounding weights so that what the network computes changes least."""
