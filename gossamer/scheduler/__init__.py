"""Continuous batching in pure Python."""
