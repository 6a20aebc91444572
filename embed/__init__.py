"""Texts to vectors, from a file to a file."""
