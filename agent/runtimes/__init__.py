"""Runtimes: a registry, the worker process, and one file a runtime."""
