"""Modules a decoder is built of."""
