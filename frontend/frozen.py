"""The frozen-dimension report."""

from __future__ import annotations


def frozen_dimensions(graph, names, loop):
    return ()


def baked_constants(constants):
    return ()
