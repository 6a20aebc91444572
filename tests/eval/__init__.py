"""Tests of qembed.eval."""
