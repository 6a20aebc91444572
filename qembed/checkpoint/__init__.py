"""A model's folder: finding it, reading it, and the tensor layouts that qembed adds to it."""
