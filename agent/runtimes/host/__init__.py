"""The daemon's side: starts workers, proves artifacts, serves models and replaces them."""
