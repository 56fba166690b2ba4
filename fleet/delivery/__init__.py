"""Chunking, and the chunk and metadata servers."""
