"""Vectors: what computes them, and the files and caches that store them."""
