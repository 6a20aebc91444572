"""Readers of users' own data for the tasks: files to texts with labels, scores or relevance."""
