"""One file a revision; each goes up and down with its data."""
