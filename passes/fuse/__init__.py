"""Fusion: rules that put operators together for an engine, each pattern, check, rewrite."""
