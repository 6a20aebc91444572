"""Clients of a running server: embeddings, metrics, and its description of itself."""
