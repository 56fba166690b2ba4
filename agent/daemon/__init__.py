"""Performs the effects that ``agent.core.deployment`` decides, and feeds the results back as events."""
