"""Clients of a running server: embeddings, metrics, what it serves."""
