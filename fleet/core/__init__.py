"""Decisions of the controller without IO."""
