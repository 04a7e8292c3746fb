"""Attention over fewer keys."""
