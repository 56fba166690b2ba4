"""Decisions without IO: the clock, randomness and every effect are passed in or returned."""
