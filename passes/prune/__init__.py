"""Passes that remove channels, heads and blocks."""
