"""Vectors: what computes them, and files and caches that hold them."""
