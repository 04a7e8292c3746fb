"""Cutting the network into pieces that a schedule can fill each on their own."""
