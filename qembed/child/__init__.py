"""A process of its own, with limits, for reading files that are not trusted."""
