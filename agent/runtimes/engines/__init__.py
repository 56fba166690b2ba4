"""The worker process and one engine a runtime; nothing here is imported into the daemon."""
