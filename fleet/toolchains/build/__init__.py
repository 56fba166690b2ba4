"""One artifact from checkpoint, profile and recipe, and many side by side."""
