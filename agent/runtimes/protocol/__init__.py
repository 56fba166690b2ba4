"""What the host and the engines agree on: the worker's wire, the engine's Protocol, and the list of runtimes."""
