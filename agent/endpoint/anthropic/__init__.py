"""Anthropic's Messages API: requests as chat requests of our own, and answers and errors in its shapes. Pure.

Source: https://docs.anthropic.com/en/api/messages.
"""
