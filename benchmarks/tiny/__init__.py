"""Tiny pipeline folders with random weights, made of the configurations of published checkpoints."""
